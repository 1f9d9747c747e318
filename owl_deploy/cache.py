"""Where things live that are made once and used again: converted models, generated text, engines."""

from __future__ import annotations

import os
from pathlib import Path


def owl_deploy_cache() -> Path:
    """Return the cache folder: `OWL_DEPLOY_CACHE` if set, else `~/.cache/owl-deploy`. Not created."""
    override = os.environ.get("OWL_DEPLOY_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "owl-deploy"
