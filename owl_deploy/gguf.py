"""GGUF files turned into Hugging Face folders, once, in the cache.

transformers dequantises the weights to float32 and rebuilds the tokenizer. One thing it ignores (seen
with 4.57) is put right from the file's own metadata: whether a begin-of-sequence token is added.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from owl_deploy.cache import owl_deploy_cache
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.files import file_sha256, new_folder

__all__ = ["converted_gguf"]

log = logging.getLogger(__name__)

# Part of the cache key: raise it when the conversion changes, so that older folders are not reused.
_CONVERSION = 1


def converted_gguf(file: Path) -> Path:
    """Return the safetensors folder made from a GGUF file, making it first where it is not cached.

    The whole model is held once in float32 while it is converted.

    Raises:
        UnsupportedModelError: the file is damaged, or transformers cannot read its architecture.
    """
    folder = owl_deploy_cache() / "models" / f"{file.stem}-{file_sha256(file)[:12]}-{_CONVERSION}"
    if folder.is_dir():
        return folder
    log.info("converting %s once to %s", file.name, folder)
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    try:
        fields = GGUFReader(file).fields
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        tokenizer = _tokenizer(file, {name: fields[name].contents() for name in _TOKENIZER_FIELDS if name in fields})
    except Exception as error:  # whatever a damaged file makes gguf, torch or transformers raise
        raise UnsupportedModelError(f"{file} cannot be read as a GGUF model: {error}") from error
    with new_folder(folder, replace=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


_TOKENIZER_FIELDS = ("tokenizer.ggml.add_bos_token", "tokenizer.chat_template")


def _tokenizer(file: Path, fields: dict[str, Any]) -> Any:
    """Rebuild the tokenizer of a GGUF file, true to the file's own metadata."""
    from tokenizers.processors import ByteLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    rebuilt = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = rebuilt.backend_tokenizer
    if not fields.get("tokenizer.ggml.add_bos_token", False):
        backend.post_processor = ByteLevel(trim_offsets=False)  # adds no token
    special = {key: getattr(rebuilt, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=fields.get("tokenizer.chat_template"), **special
    )
