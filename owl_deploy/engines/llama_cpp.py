"""The environment of llama.cpp, compiled on the machine that it is to run on."""

from __future__ import annotations

import os
import shutil

from owl_deploy.engines.environment import EngineEnvironment

__all__ = ["LLAMA_CPP", "has_compiler"]

_VERSION = "0.3.36"


def has_compiler() -> bool:
    """Return whether there is a C++ compiler where builds look for one."""
    return bool(os.environ.get("CXX")) or any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def _build_obstacle() -> str | None:
    """Say that there is no C++ compiler; None when there is one."""
    if has_compiler():
        return None
    return "llama.cpp comes as source and there is no C++ compiler on PATH: install g++ and run this again"


LLAMA_CPP = EngineEnvironment(
    name="llama.cpp",
    title="llama.cpp (llama-cpp-python)",
    version=_VERSION,
    # Source only: compiled with llama.cpp's defaults, which take the instruction sets that this machine has.
    pins=(f"llama-cpp-python=={_VERSION}", "numpy==2.2.6"),
    modules=("llama_cpp",),
    oldest=(3, 10),
    newest=(3, 12),
    licence="MIT",
    notice="llama.cpp is compiled from source: on two cores this takes about a quarter of an hour.",
    build_obstacle=_build_obstacle,
)
