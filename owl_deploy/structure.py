"""The structure stage: a smaller dense checkpoint, without some attention heads and MLP channels.

In: a model name and `StructureSettings`. Out: a Hugging Face folder of the same architecture with fewer heads and
channels, loaded by transformers as any other, and `owl.json`. It is dense: every engine runs it faster, without
kernels for zeros; `prune` and `export` take it as they take any model. How the search chooses is in
`owl_deploy.policy_search`; nothing here looks at a probability.

A unit of attention is a group: one key/value head with all query heads that share it, so that grouped-query
attention stays valid. A unit of an MLP is one channel: its rows of gate and up and its column of down.

The start is the metric of Wanda-sp: for every column of o_proj and down_proj the norm of the weights times the norm
of the inputs, which is the size of what this column adds to the output; for a group, of all its columns. The official
code of arXiv 2406.10576 (`wanda_sp_init`) takes the mean absolute weight in place of the norm, and the inputs behind
blocks that are cut already; here all inputs are those of the dense model, in one pass.

Unlike in that paper the number of heads and of channels is the same in every block: config.json has one number for
all, and a checkpoint with others cannot be loaded by `AutoModelForCausalLM`.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.errors import OwlDeployError, RecipeError, UnsupportedModelError
from owl_deploy.files import new_folder, write_json, write_tensors
from owl_deploy.generation import load_torch_model
from owl_deploy.memory import peak_rss_bytes, release_free_memory, reset_peak_rss
from owl_deploy.policy_search import MIN_HELD_OUT, Check, Found, Masks, most_probable, search, start_logits
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import StructureSettings
from owl_deploy.skeleton import open_skeleton
from owl_deploy.statistics import SquaredNorm
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import versions

__all__ = ["Shape", "StructureReport", "masked", "structure", "structure_shape"]

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Architectures with separate projections, where zeroing a unit's inputs of o_proj or down_proj is removing it."""

_CUTS: dict[str, tuple[str, int]] = {
    "self_attn.q_proj": ("heads", 0),
    "self_attn.k_proj": ("heads", 0),
    "self_attn.v_proj": ("heads", 0),
    "self_attn.o_proj": ("heads", 1),
    "mlp.gate_proj": ("channels", 0),
    "mlp.up_proj": ("channels", 0),
    "mlp.down_proj": ("channels", 1),
}
"""Linear of a block -> the kind of unit it is cut by, and along which dimension."""

_READERS = {"heads": "self_attn.o_proj", "channels": "mlp.down_proj"}
"""Kind of unit -> the linear whose inputs they are."""

Readers = dict[str, list[nn.Linear]]
"""Kind of unit -> per block the linear whose inputs they are."""


_OF_THE_SOURCE = ("config.json", "owl.json", "allocation.json", "measured.json")
"""Files that say something of the source that is not true of the result."""


@dataclass(frozen=True)
class Shape:
    """What is there and what stays, in every block."""

    prefix: str
    """Name of the list of blocks in the model."""
    n_blocks: int
    n_heads: int
    n_groups: int
    """Key/value heads."""
    head_dim: int
    n_channels: int
    n_groups_kept: int
    n_channels_kept: int
    n_parameters: int
    """Of the whole model; tied ones count once."""
    n_parameters_kept: int

    @property
    def n_heads_kept(self) -> int:
        """Query heads that stay in every block."""
        return self.n_heads // self.n_groups * self.n_groups_kept

    @property
    def n_kept(self) -> dict[str, int]:
        """Kind of unit -> how many stay in every block."""
        return {"heads": self.n_groups_kept, "channels": self.n_channels_kept}

    def config(self) -> dict[str, int]:
        """Return what changes in config.json; head_dim is said outright, for hidden_size / heads is another number."""
        return {
            "num_attention_heads": self.n_heads_kept,
            "num_key_value_heads": self.n_groups_kept,
            "head_dim": self.head_dim,
            "intermediate_size": self.n_channels_kept,
        }

    def facts(self) -> dict[str, Any]:
        """Return before and after, for owl.json."""
        return {
            "n_blocks": self.n_blocks,
            "n_heads": {"before": self.n_heads, "after": self.n_heads_kept},
            "n_key_value_heads": {"before": self.n_groups, "after": self.n_groups_kept},
            "n_channels": {"before": self.n_channels, "after": self.n_channels_kept},
            "n_parameters": {"before": self.n_parameters, "after": self.n_parameters_kept},
        }


@dataclass(frozen=True)
class StructureReport:
    """What was removed; `facts` is the content of owl.json."""

    checkpoint: Path | None
    """None after a dry run, which writes nothing and has neither `kept` nor `search` in its facts."""
    facts: dict[str, Any]
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the document that `owl-deploy structure --json` prints; what is kept is listed in owl.json alone."""
        return {
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "shape": self.facts["shape"],
            "search": self.facts.get("search"),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "tokens_sha256": (self.facts.get("calibration") or {}).get("tokens_sha256"),
        }


def structure(
    model: str,
    settings: StructureSettings = StructureSettings(),
    *,
    out: Path | None,
    seed: int = 0,
    threads: int | Literal["auto"] = "auto",
    force: bool = False,
    offline: bool = False,
    on_step: OnStep = silent,
) -> StructureReport:
    """Remove heads and channels from a model and write the smaller checkpoint.

    The whole model is in memory as float32, as the loss of every mask needs all of it. The result is what the
    metric alone keeps, unless other masks gain more than chance on the held-out calibration sequences.

    Args:
        model: local folder, `.gguf` file, hub id or `demo:` name; of the Llama, Mistral, Qwen2, Qwen3 or Gemma family.
        settings: how much is kept, the search, calibration.
        out: folder of the smaller checkpoint; None only to say what its shape would be, without data or a search.
        seed: of the calibration samples and the search.
        threads: torch threads.
        force: replace `out` if it exists.
        offline: never ask a hub.
        on_step: told of every step of the search.

    Raises:
        UnsupportedModelError: another architecture.
        RecipeError: nothing would be removed.
        OwlDeployError: and its subclasses; nothing half-written is left under `out`.
    """
    started = time.perf_counter()
    if out is not None and out.exists() and not force:
        raise OwlDeployError(f"{out} exists already: give another --out, or --force to replace it")
    torch.set_num_threads(resolve_threads(threads).n)
    checkpoint = open_checkpoint(model, offline=offline)
    shape = structure_shape(checkpoint, settings)
    if out is None:
        return StructureReport(None, {"shape": shape.facts()}, time.perf_counter() - started, peak_rss_bytes())
    calibration = calibration_tokens(checkpoint, settings, seed=seed, on_step=on_step)
    gc.collect()  # sampling held the whole model
    release_free_memory()
    reset_peak_rss()
    facts = {
        "kind": "checkpoint",
        "format_version": 1,
        "recipe": {"model": checkpoint.source, "seed": seed, "structure": settings.model_dump(mode="json")},
        "versions": versions("torch", "transformers", "safetensors"),
        "source": {"model": checkpoint.source, "sha256": checkpoint.fingerprint},
        "calibration": calibration.facts(),
        "shape": shape.facts(),
    }
    masks, facts["search"] = _choose(
        checkpoint, shape, settings, torch.from_numpy(calibration.tokens), seed=seed, on_step=on_step
    )
    facts["kept"] = [
        {"index": index, **{kind: kept[index].nonzero().flatten().tolist() for kind, kept in masks.items()}}
        for index in range(shape.n_blocks)
    ]
    gc.collect()  # the model goes before the tensors of the result are read
    release_free_memory()
    _write(checkpoint, shape, masks, out, facts, started, force=force)
    return StructureReport(out, facts, time.perf_counter() - started, peak_rss_bytes())


def structure_shape(checkpoint: Checkpoint, settings: StructureSettings) -> Shape:
    """Return how many heads and channels there are and how many stay, in every block.

    Counts are rounded to the nearest, halves up: groups to whole ones, channels to a multiple of `channel_multiple`;
    at least one of each stays, and a share of 1 keeps all.

    Raises:
        UnsupportedModelError: the architecture is not one that can be cut, or the checkpoint is damaged.
        RecipeError: nothing would be removed.
    """
    family = checkpoint.config.get("model_type")
    if family not in _FAMILIES:
        raise UnsupportedModelError(
            f"{checkpoint.path} is of architecture {family!r}, whose heads and channels cannot be cut here: "
            f"structure takes {', '.join(_FAMILIES)}"
        )
    skeleton = open_skeleton(checkpoint)
    config = skeleton.model.config
    n_groups, n_channels = int(config.num_key_value_heads), int(config.intermediate_size)
    n_groups_kept = max(1, _nearest(n_groups * settings.heads_kept))
    multiple = settings.channel_multiple
    n_channels_kept = min(n_channels, multiple * max(1, _nearest(n_channels * settings.channels_kept / multiple)))
    if settings.channels_kept == 1:
        n_channels_kept = n_channels
    if (n_groups_kept, n_channels_kept) == (n_groups, n_channels):
        raise RecipeError(
            f"heads_kept {settings.heads_kept:g} and channels_kept {settings.channels_kept:g} remove nothing from "
            f"{n_groups} groups of heads and {n_channels} channels (in steps of {multiple}): lower one of them"
        )
    kept = {"heads": (n_groups_kept, n_groups), "channels": (n_channels_kept, n_channels)}
    after = 0
    for name, parameter in skeleton.model.named_parameters():
        kind, _ = _cut_of(name.removeprefix(f"{skeleton.prefix}."), parameter) or (None, 0)
        after += parameter.numel() if kind is None else parameter.numel() // kept[kind][1] * kept[kind][0]
    return Shape(
        prefix=skeleton.prefix,
        n_blocks=len(skeleton.blocks),
        n_heads=int(config.num_attention_heads),
        n_groups=n_groups,
        head_dim=skeleton.linears(0)[f"{skeleton.prefix}.0.self_attn.k_proj"].out_features // n_groups,
        n_channels=n_channels,
        n_groups_kept=n_groups_kept,
        n_channels_kept=n_channels_kept,
        n_parameters=sum(parameter.numel() for parameter in skeleton.model.parameters()),
        n_parameters_kept=after,
    )


def _nearest(value: float) -> int:
    """Round to the nearest integer, halves up; 1e-9 forgives that 0.35 * 10 is a little less than 3.5."""
    return math.floor(value + 0.5 + 1e-9)


def _cut_of(name: str, tensor: Any) -> tuple[str, int] | None:
    """Return the kind of unit and the dimension that a tensor is cut by, None where it stays whole.

    Args:
        name: of a parameter without the prefix of the blocks: `3.mlp.up_proj.weight`.
        tensor: anything with `shape`. The bias of a linear that is cut along its inputs stays whole.
    """
    linear = name.rpartition(".")[0].partition(".")[2]
    kind, dimension = _CUTS.get(linear, ("", 0))
    return (kind, dimension) if kind and dimension < len(tensor.shape) else None


def _choose(
    checkpoint: Checkpoint,
    shape: Shape,
    settings: StructureSettings,
    rows: torch.Tensor,
    *,
    seed: int,
    on_step: OnStep,
) -> tuple[Masks, dict[str, Any]]:
    """Load the model, take the metric, search; return the masks and what owl.json says of the search.

    Args:
        rows: calibration tokens (n_samples, seq_len); the last ones are held out.
    """
    n_held_out = min(max(1, _nearest(len(rows) * settings.held_out)), len(rows) - 1)
    training, held_out = range(len(rows) - n_held_out), range(len(rows) - n_held_out, len(rows))
    model = load_torch_model(checkpoint)
    readers = _readers(model, shape)
    dense = _losses(model, rows, held_out)
    metric = _metric(model, readers, shape, rows[: len(training)], on_step)

    def losses(masks: Masks, numbers: Sequence[int]) -> list[float]:
        with masked(readers, masks):
            return _losses(model, rows, numbers)

    if n_held_out < MIN_HELD_OUT:  # nothing that a search finds could be taken
        settings = settings.model_copy(update={"n_steps": 0})
    start = {kind: start_logits(values, settings.sharpness) for kind, values in metric.items()}
    found = search(start, shape.n_kept, losses, training, held_out, settings, seed=seed, on_step=on_step)
    initial = {kind: most_probable(values, shape.n_kept[kind]) for kind, values in start.items()}
    changed = {kind: int((initial[kind] & ~found.masks[kind]).sum()) for kind in start}
    return found.masks, {
        "n_training": len(training),
        "n_held_out": n_held_out,
        "n_steps": len(found.losses),
        "held_out_loss": {
            "dense": math.fsum(dense) / n_held_out,
            "metric": found.start.held_out_loss,
            "chosen": found.best.held_out_loss,
        },
        "chosen": {
            "step": found.best.step,
            "is_draw": found.best.is_draw,
            "reason": _reason(found, n_held_out),
        },
        "candidate": None if found.candidate is None else _facts(found.candidate),
        "swapped": changed,
        "losses": [_finite(loss) for loss in found.losses],
        "checks": [_facts(check) for check in found.checks],
    }


def _reason(found: Found, n_held_out: int) -> str:
    """Say why these masks are the result, for owl.json."""
    if found.best.step:
        return "the gain is above its standard error"
    if n_held_out < MIN_HELD_OUT:
        return f"no search: telling a gain from chance takes {MIN_HELD_OUT} held-out sequences, there are {n_held_out}"
    if found.candidate is None:
        return "no other masks of finite loss were tried"
    return "no gain is above its standard error"


def _facts(check: Check) -> dict[str, Any]:
    return {key: _finite(value) for key, value in asdict(check).items()}


def _finite(value: float) -> float | None:
    """Return the value, None where JSON has no word for it."""
    return value if math.isfinite(value) else None


def _readers(model: nn.Module, shape: Shape) -> Readers:
    readers: Readers = {kind: [] for kind in _READERS}
    for kind, name in _READERS.items():
        for index in range(shape.n_blocks):
            module = model.get_submodule(f"{shape.prefix}.{index}.{name}")
            assert isinstance(module, nn.Linear)
            readers[kind].append(module)
    return readers


@contextmanager
def masked(readers: Readers, masks: Masks) -> Iterator[None]:
    """Let a model run as if units were removed: what they give to o_proj and down_proj is zero.

    Args:
        readers: kind -> per block the linear whose inputs are the units, all of them equally wide.
        masks: kind -> bool (blocks, units), True = kept.
    """
    handles = []
    try:
        for kind, modules in readers.items():
            for module, kept in zip(modules, masks[kind], strict=True):
                if not kept.all():
                    columns = kept.repeat_interleave(module.in_features // len(kept))
                    handles.append(module.register_forward_pre_hook(_zeroing(columns)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeroing(columns: torch.Tensor) -> Any:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * columns.to(inputs[0].dtype), *inputs[1:])

    return hook


@torch.inference_mode()
def _losses(model: Any, rows: torch.Tensor, numbers: Sequence[int]) -> list[float]:
    """Return the mean negative log-likelihood per token, in nats, of each of these rows.

    One sequence at a time: the logits of one of 2048 tokens take 1 GiB with a vocabulary of 128 000.
    """
    found = []
    for number in numbers:
        row = rows[number]
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        found.append(float(functional.cross_entropy(logits, row[1:])))
    return found


@torch.inference_mode()
def _metric(model: Any, readers: Readers, shape: Shape, rows: torch.Tensor, on_step: OnStep) -> dict[str, torch.Tensor]:
    """Return the Wanda-sp metric of every unit by kind, (blocks, units) float64: see the module's docstring."""
    norms = {kind: [SquaredNorm(module.in_features) for module in modules] for kind, modules in readers.items()}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, norm=norm: norm.update(inputs[0][0]))
        for kind, modules in readers.items()
        for module, norm in zip(modules, norms[kind], strict=True)
    ]
    try:
        for done, row in enumerate(rows, 1):
            model(row[None], use_cache=False)
            on_step(Step("scoring heads and channels", done, len(rows)))
    finally:
        for handle in handles:
            handle.remove()
    n_units = {"heads": shape.n_groups, "channels": shape.n_channels}
    metric: dict[str, torch.Tensor] = {}
    for kind, modules in readers.items():
        energies = [
            module.weight.double().square().sum(dim=0) * norm.mean.double()
            for module, norm in zip(modules, norms[kind], strict=True)
        ]
        metric[kind] = torch.stack([energy.reshape(n_units[kind], -1).sum(dim=1).sqrt() for energy in energies])
        if not metric[kind].isfinite().all():
            raise OwlDeployError("activations of the calibration text are NaN or Inf: the model is damaged")
    return metric


def _write(
    checkpoint: Checkpoint,
    shape: Shape,
    masks: Masks,
    out: Path,
    facts: dict[str, Any],
    started: float,
    *,
    force: bool,
) -> None:
    """Write the cut tensors, file by file as they came, with configuration, tokenizer and owl.json."""
    files = sorted({entry.file for entry in checkpoint.tensors.values()})
    skeleton = open_skeleton(checkpoint)
    parameters = {
        tensor: parameter.removeprefix(f"{shape.prefix}.")
        for index in range(shape.n_blocks)
        for parameter, tensor in skeleton.block_tensors(index).items()
    }
    with new_folder(out, replace=force) as folder:
        weight_map: dict[str, str] = {}
        for number, file in enumerate(files, 1):
            tensors = {
                name: _cut(checkpoint.read(name), parameters.get(name, ""), masks)
                for name, entry in checkpoint.tensors.items()
                if entry.file == file
            }
            part = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            write_tensors(folder / part, tensors)
            weight_map |= dict.fromkeys(tensors, part)
        size = sum(file.stat().st_size for file in folder.iterdir())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
        for file in sorted(checkpoint.path.iterdir()):
            if (
                file.is_file()
                and file.suffix in (".json", ".jinja", ".txt", ".model")
                and not file.name.endswith(".index.json")
                and file.name not in _OF_THE_SOURCE
            ):
                shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", {**checkpoint.config, **shape.config()})
        write_json(folder / "owl.json", facts)
        totals = {"seconds": round(time.perf_counter() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
        write_json(folder / "measured.json", totals)


def _cut(tensor: torch.Tensor, name: str, masks: Masks) -> torch.Tensor:
    """Return what stays of a tensor, in its own type.

    Args:
        name: without the prefix of the blocks; empty for a tensor outside of them.
    """
    cut = _cut_of(name, tensor)
    if cut is None:
        return tensor.contiguous()
    kind, dimension = cut
    kept = masks[kind][int(name.partition(".")[0])]
    positions = kept.repeat_interleave(tensor.shape[dimension] // len(kept)).nonzero().flatten()
    return tensor.index_select(dimension, positions).contiguous()
