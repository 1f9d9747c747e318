"""The depth stage: a checkpoint goes in, one with fewer decoder blocks comes out, dense and otherwise unchanged.

In: a model name and `DepthSettings`. Out: a Hugging Face folder that loads like any other, with `owl.json` (settings,
data, the blocks that went and the figure of each) and `measured.json` (time and memory of this very run). Nothing is
retrained, and nothing inside a block changes.

A block may do what it does because of where it stands: a sliding window in every other one, experts from the third
one on. What the configuration lists per block is cut with the blocks; then every block of the new checkpoint is
compared with the one that it was, and run beside it on a few tokens. A model whose blocks cannot move is refused.
"""

from __future__ import annotations

import copy
import gc
import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from owl_deploy.block_importance import block_influences, perplexities_without, taylor_scores
from owl_deploy.calibration import Calibration, calibration_tokens
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.errors import OwlDeployError, RecipeError, UnsupportedModelError
from owl_deploy.files import new_folder, write_json, write_tensors
from owl_deploy.memory import peak_rss_bytes, release_free_memory, reset_peak_rss
from owl_deploy.observation import advance_
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import DepthSettings
from owl_deploy.skeleton import Skeleton, open_skeleton
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import versions

__all__ = ["DepthReport", "prune_depth"]

_PROBE_TOKENS = 16

_POSITIONS = frozenset({"layer_idx", "layer_id", "layer_number", "block_idx"})
"""Attributes that number a block inside the model; all others must stay as they were."""

_SCALED_BY_NUMBER = "scale_attn_by_inverse_layer_idx"
"""Attribute of GPT-2's attention."""

_NUMBER_LISTS = ("moe_layers", "mlp_only_layers", "attn_layer_indices", "full_attn_idxs")
"""Keys of configurations that list numbers of blocks."""

_FIRST_COUNTS = ("max_window_layers", "first_k_dense_replace")
"""Keys of configurations that say how many of the first blocks are of one kind."""

_OUR_FILES = ("config.json", "owl.json", "allocation.json", "measured.json")
"""Not copied: written anew, or about blocks as they were numbered before."""


@dataclass(frozen=True)
class DepthReport:
    """What depth pruning did, or with `checkpoint` None would do; `facts` are the JSON keys of owl.json."""

    checkpoint: Path | None
    facts: dict[str, Any]
    seconds: float
    peak_rss_bytes: int

    @property
    def removed(self) -> list[int]:
        """Numbers, in the source, of the blocks that went; ascending."""
        return list(self.facts["removed"])

    def to_json(self) -> dict[str, Any]:
        """Return the document that `owl-deploy depth --json` prints."""
        return {
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            **{key: self.facts["recipe"]["depth"][key] for key in ("method", "criterion")},
            **{key: self.facts[key] for key in ("removed", "figures", "n_blocks", "n_parameters")},
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "tokens_sha256": (self.facts["calibration"] or {}).get("tokens_sha256"),
        }


def prune_depth(
    model: str,
    settings: DepthSettings,
    *,
    out: Path | None,
    seed: int = 0,
    threads: int | Literal["auto"] = "auto",
    force: bool = False,
    offline: bool = False,
    on_step: OnStep = silent,
) -> DepthReport:
    """Remove whole decoder blocks, and write the smaller dense checkpoint.

    All blocks are chosen from figures of the dense model, in one shot, lowest first; of equal ones the one nearer to
    the input goes first. shortgpt and shortened by perplexity hold one block and hidden states (see
    `block_influences`, `perplexities_without`), shortened by Taylor scores the whole model twice (`taylor_scores`),
    tail holds one block (arXiv 2411.15558: the last ones go, without any figure).

    Args:
        model: local folder, `.gguf` file, hub id or `demo:` name; pruned checkpoints keep their zeros.
        settings: method, number of blocks to remove, calibration.
        out: folder of the smaller checkpoint; None to choose the blocks and write nothing.
        seed: of the calibration samples.
        threads: torch threads.
        force: replace `out` if it exists.
        offline: never ask a hub.
        on_step: told of every finished block.

    Raises:
        RecipeError: there are not that many blocks to remove.
        UnsupportedModelError: the blocks of this architecture cannot do without each other, or cannot move.
        OwlDeployError: and its other subclasses; nothing half-written is left under `out`.
    """
    started = time.perf_counter()
    if out is not None and out.exists() and not force:
        raise OwlDeployError(f"{out} exists already: give another --out, or --force to replace it")
    torch.set_num_threads(resolve_threads(threads).n)
    checkpoint = open_checkpoint(model, offline=offline)
    skeleton = open_skeleton(checkpoint)
    n_blocks = len(skeleton.blocks)
    candidates = _candidates(settings, n_blocks)
    _refuse_shared_blocks(skeleton)
    _text_section(skeleton, checkpoint.config)  # refuses a configuration that does not count the blocks

    calibration = None
    if settings.method != "tail":
        calibration = calibration_tokens(checkpoint, settings, seed=seed, on_step=on_step)
        if calibration.source == "generated":
            gc.collect()  # sampling held the whole model
    release_free_memory()
    reset_peak_rss()
    figures = _figures(skeleton, settings, calibration, candidates, on_step)
    removed = _lowest(figures, candidates, settings.n_blocks)
    kept = [index for index in range(n_blocks) if index not in removed]
    facts = _facts(skeleton, settings, calibration, seed, figures, candidates, removed)
    if out is not None:
        with new_folder(out, replace=force) as folder:
            _write_model(skeleton, kept, folder, on_step)
            sparsity = _check_model(skeleton, kept, folder, on_step)
            write_json(folder / "owl.json", {**facts, **({"sparsity": sparsity} if sparsity else {})})
            measured = {"seconds": round(time.perf_counter() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
            write_json(folder / "measured.json", measured)
    return DepthReport(out, facts, time.perf_counter() - started, peak_rss_bytes())


# --- Which blocks -------------------------------------------------------------------------------


def _candidates(settings: DepthSettings, n_blocks: int) -> list[int]:
    """Return the blocks that may go. Raises RecipeError where they are too few."""
    first, last = (settings.protect_first, settings.protect_last) if settings.method == "shortened" else (0, 0)
    if settings.n_blocks >= n_blocks:
        raise RecipeError(
            f"n_blocks {settings.n_blocks} would leave nothing of a model of {n_blocks} blocks: "
            f"remove at most {n_blocks - 1}"
        )
    candidates = list(range(first, n_blocks - last))
    if len(candidates) < settings.n_blocks:
        raise RecipeError(
            f"n_blocks {settings.n_blocks} is more than the {len(candidates)} of {n_blocks} blocks that protect_first "
            f"{first} and protect_last {last} leave to choose from: lower n_blocks or protect fewer"
        )
    return candidates


def _figures(
    skeleton: Skeleton,
    settings: DepthSettings,
    calibration: Calibration | None,
    candidates: Sequence[int],
    on_step: OnStep,
) -> dict[int, float]:
    """Return the figure of each block by which they are ranked, lowest first to go; blocks without one may lack it."""
    if calibration is None:
        return {index: float(-index) for index in candidates}
    tokens = torch.from_numpy(calibration.tokens)
    if settings.method == "shortgpt":
        figures = dict(enumerate(block_influences(skeleton, tokens, on_step)))
    elif settings.criterion == "perplexity":
        figures = perplexities_without(skeleton, tokens, candidates, on_step)
    else:
        figures = dict(enumerate(taylor_scores(skeleton, tokens, on_step)))
    for index, figure in figures.items():
        if not math.isfinite(figure):
            raise OwlDeployError(f"the {_figure_name(settings)} of block {index} is {figure}: no blocks can be ranked")
    return figures


def _figure_name(settings: DepthSettings) -> str | None:
    """Return what the figure of a block is called in owl.json; None where there is none."""
    return {"shortgpt": "block_influence", "shortened": settings.criterion, "tail": None}[settings.method]


def _lowest(figures: dict[int, float], candidates: Sequence[int], n: int) -> list[int]:
    """Return the n candidates of the lowest figures, ascending."""
    return sorted(sorted(candidates, key=lambda index: (figures[index], index))[:n])


# --- What remains -------------------------------------------------------------------------------


def _refuse_shared_blocks(skeleton: Skeleton) -> None:
    """Refuse blocks that use the weights of another: without it they would be something else."""
    owners: dict[int, int] = {}
    for index, block in enumerate(skeleton.blocks):
        for name, parameter in block.named_parameters(remove_duplicate=False):
            owner = owners.setdefault(id(parameter), index)
            if owner != index:
                raise UnsupportedModelError(
                    f"blocks {owner} and {index} of {skeleton.checkpoint.path} share the weight {name}: "
                    "a model whose blocks share weights cannot lose single ones"
                )


def _text_section(skeleton: Skeleton, document: dict[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """Return the configuration of the decoder, its part of a config.json, and the key that counts its blocks.

    Raises:
        UnsupportedModelError: no key counts them.
    """
    config = skeleton.model.config
    text = config.get_text_config(decoder=True)
    section = document
    for name, value in vars(config).items():
        if value is text and isinstance(document.get(name), dict):
            section = document[name]
    key = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    counted = getattr(text, key, None)
    if counted != len(skeleton.blocks):
        raise UnsupportedModelError(
            f"{skeleton.checkpoint.path}: the model has {len(skeleton.blocks)} blocks, and {key} in config.json is "
            f"{counted}: blocks of this architecture cannot be removed"
        )
    return text, section, key


def _cut_config_(skeleton: Skeleton, document: dict[str, Any], kept: list[int]) -> None:
    """Let a config.json describe the kept blocks alone: their number, and all that is listed per block."""
    from transformers import PretrainedConfig

    text, section, key = _text_section(skeleton, document)
    n_blocks = len(skeleton.blocks)
    position = {index: i for i, index in enumerate(kept)}
    # What all configurations have, such as token ids, may be a list of that length by accident.
    general = PretrainedConfig().to_dict().keys()
    for name, value in text.to_dict().items():
        if name in general or name.startswith("_"):
            continue
        if name in _NUMBER_LISTS and isinstance(value, list | tuple):
            section[name] = [position[index] for index in value if index in position]
        elif isinstance(value, list | tuple) and len(value) == n_blocks:
            section[name] = [value[index] for index in kept]
        elif name in _FIRST_COUNTS and isinstance(value, int):
            section[name] = sum(index < value for index in kept)
    section[key] = len(kept)
    if "num_hidden_layers" in section:
        section["num_hidden_layers"] = len(kept)


def _write_model(skeleton: Skeleton, kept: list[int], folder: Path, on_step: OnStep) -> None:
    """Write configuration, tokenizer and the tensors of the kept blocks, one block at a time."""
    checkpoint = skeleton.checkpoint
    for file in sorted(checkpoint.path.iterdir()):
        is_wanted = file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(".index.json")
        if file.is_file() and is_wanted and file.name not in _OUR_FILES:
            shutil.copyfile(file, folder / file.name)
    document = copy.deepcopy(checkpoint.config)
    _cut_config_(skeleton, document, kept)
    write_json(folder / "config.json", document)

    shards = _new_names(skeleton, kept)
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {new: checkpoint.read(old) for old, new in names.items()}
        write_tensors(folder / file_name, tensors)
        weight_map |= dict.fromkeys(tensors, file_name)
        total_size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        del tensors
        release_free_memory()
        on_step(Step("writing blocks", number + 1, len(shards)))
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _new_names(skeleton: Skeleton, kept: list[int]) -> list[dict[str, str]]:
    """Return, per shard, the checkpoint's tensors -> their new names: those outside the blocks, then block by block.

    Buffers move with their block. Blocks behind the last one, which some checkpoints have for predicting several
    tokens, move up.
    """
    parameter, tensor = next(iter(skeleton.block_tensors(0).items()))
    start = tensor.removesuffix(parameter.removeprefix(f"{skeleton.prefix}."))  # "0.input_layernorm.weight"
    n_blocks = len(skeleton.blocks)
    n_removed = n_blocks - len(kept)
    position = {index: i for i, index in enumerate(kept)}
    shards: list[dict[str, str]] = [{} for _ in range(len(kept) + 1)]
    for name in skeleton.checkpoint.tensors:
        found = re.match(rf"{re.escape(start)}(\d+)(\..+)", name)
        if found is None:
            shards[0][name] = name
        elif int(found[1]) >= n_blocks:
            shards[0][name] = f"{start}{int(found[1]) - n_removed}{found[2]}"
        elif int(found[1]) in position:
            new = position[int(found[1])]
            shards[new + 1][name] = f"{start}{new}{found[2]}"
    return [names for names in shards if names]


@torch.inference_mode()
def _check_model(skeleton: Skeleton, kept: list[int], folder: Path, on_step: OnStep) -> dict[str, float] | None:
    """Open the new checkpoint, and compare each of its blocks with the one that it was.

    Returns:
        The sparsity of what remains, where the source was pruned; a dense model's own zeros are not counted.

    Raises:
        UnsupportedModelError: a block became another one.
    """
    source = skeleton.checkpoint
    try:
        after = open_skeleton(open_checkpoint(str(folder)))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{source.path} cannot lose blocks: {str(error).replace(str(folder), 'the smaller model')}"
        ) from error
    vocabulary = skeleton.model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    old_inputs, new_inputs = skeleton.capture(tokens), after.capture(tokens)
    counts = _Zeros()
    for position, index in enumerate(kept):
        with skeleton.filled(index) as old, after.filled(position) as new:
            difference = _difference(old, new)
            advance_(old, old_inputs, index)
            advance_(new, new_inputs, position)
            a, b = old_inputs.hidden_states[0], new_inputs.hidden_states[0]
            # transformers does so in eager attention alone, which is not what runs here.
            if position != index and any(getattr(module, _SCALED_BY_NUMBER, False) for module in old.modules()):
                difference = "its attention is scaled by its number"
            if difference is None and not torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max())):
                difference = "its output on the same input is another"
            if difference is not None:
                raise UnsupportedModelError(
                    f"block {index} of {source.path} cannot be block {position} of a smaller model, because "
                    f"{difference}: this architecture makes a block what it is by its position"
                )
            for linear in after.linears(position).values():
                counts.add(linear.weight, is_mlp=linear.role != "other")
        on_step(Step("comparing blocks", position + 1, len(kept)))
    target = ((source.manifest or {}).get("sparsity") or {}).get("target")
    if target is None:
        return None
    return counts.sparsity(float(target), sum(parameter.numel() for parameter in after.model.parameters()))


@dataclass
class _Zeros:
    """Zeros and elements of the linears seen, and of those of gated MLPs."""

    linears: tuple[int, int] = (0, 0)
    mlp: tuple[int, int] = (0, 0)

    def add(self, weight: torch.Tensor, *, is_mlp: bool) -> None:
        zeros, size = int((weight == 0).sum()), weight.numel()
        self.linears = (self.linears[0] + zeros, self.linears[1] + size)
        if is_mlp:
            self.mlp = (self.mlp[0] + zeros, self.mlp[1] + size)

    def sparsity(self, target: float, n_parameters: int) -> dict[str, float]:
        """Return what owl.json of a pruned checkpoint says of its sparsity."""
        return {
            "target": target,
            "linears": self.linears[0] / self.linears[1],
            "model": self.linears[0] / n_parameters,
            **({"mlp": self.mlp[0] / self.mlp[1]} if self.mlp[1] else {}),
        }


def _difference(old: nn.Module, new: nn.Module) -> str | None:
    """Return in what two filled blocks differ apart from their number; None where they do not."""
    old_modules, new_modules = dict(old.named_modules()), dict(new.named_modules())
    if old_modules.keys() != new_modules.keys():
        return f"it would have other parts ({', '.join(sorted(old_modules.keys() ^ new_modules.keys())[:3])})"
    for path, module in old_modules.items():
        other = new_modules[path]
        where = f"{path or type(module).__name__}"
        if type(module) is not type(other):
            return f"its {where} would be a {type(other).__name__} instead of a {type(module).__name__}"
        before, after = _plain_attributes(module), _plain_attributes(other)
        for name in before.keys() | after.keys():
            if before.get(name) != after.get(name):
                return f"{name} of its {where} would be {after.get(name)!r} instead of {before.get(name)!r}"
    old_state, new_state = ({**dict(b.named_parameters()), **dict(b.named_buffers())} for b in (old, new))
    for name, value in old_state.items():
        other_value = new_state.get(name)
        if other_value is None or other_value.shape != value.shape or not torch.equal(other_value, value):
            return f"its {name} would be another"
    return None


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and not name.startswith("_") and name not in _POSITIONS
    }


def _facts(
    skeleton: Skeleton,
    settings: DepthSettings,
    calibration: Calibration | None,
    seed: int,
    figures: dict[int, float],
    candidates: Sequence[int],
    removed: list[int],
) -> dict[str, Any]:
    """Return the content of owl.json, apart from sparsity; the same for the same work."""
    checkpoint = skeleton.checkpoint
    n_blocks = len(skeleton.blocks)
    name = _figure_name(settings)
    n_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    n_less = sum(parameter.numel() for index in removed for parameter in skeleton.blocks[index].parameters())
    return {
        "kind": "checkpoint",
        "format_version": 1,
        "recipe": {"model": checkpoint.source, "seed": seed, "depth": settings.model_dump(mode="json")},
        "versions": versions("torch", "transformers", "safetensors"),
        "source": {"model": checkpoint.source, "sha256": checkpoint.fingerprint, **_lineage(checkpoint)},
        "calibration": calibration.facts() if calibration else None,
        "removed": removed,
        # Not "blocks", which in a sparse checkpoint are the blocks that it has.
        "figures": [
            {
                "index": index,
                **({name: figures[index]} if name is not None and index in figures else {}),
                "is_protected": index not in candidates,
                "is_removed": index in removed,
            }
            for index in range(n_blocks)
        ],
        "n_blocks": {"before": n_blocks, "after": n_blocks - len(removed)},
        "n_parameters": {"before": n_parameters, "after": n_parameters - n_less},
    }


def _lineage(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what is worth knowing of a source that is a checkpoint of ours."""
    if checkpoint.manifest is None:
        return {}
    keys = ("recipe", "source", "removed", "sparsity", "mask_sha256")
    return {"checkpoint": {key: checkpoint.manifest[key] for key in keys if key in checkpoint.manifest}}
