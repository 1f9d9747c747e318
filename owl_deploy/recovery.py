"""The recover stage: a sparse checkpoint goes in, one with the same zeros and better weights comes out.

In: a sparse checkpoint, the dense one it was pruned from, and `RecoverSettings`. Out: a Hugging Face folder whose
`owl.json` is that of the sparse checkpoint with what training did, and `measured.json`. The mask hash before and after
is equal, which is checked on the saved files. Blocks are streamed as in pruning: a few of them are in memory, and two
sets of hidden states. A finished block is a shard of the final checkpoint, so that a stopped run can go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from owl_deploy.bias_correction import correct_biases_, mean_outputs, with_biases
from owl_deploy.block_pruning import whole_mask_sha256, zero_facts
from owl_deploy.block_recovery import mean_output_error, pruned_positions, recover_block_
from owl_deploy.calibration import calibration_tokens
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.devices import resolve_devices, resolve_products
from owl_deploy.errors import OwlDeployError, UnsupportedModelError
from owl_deploy.files import new_folder, write_json
from owl_deploy.hidden_states import HiddenStates
from owl_deploy.lineage import check_zeros
from owl_deploy.memory import peak_rss_bytes, reset_peak_rss
from owl_deploy.model_recovery import recover_model
from owl_deploy.observation import run_block
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.recipe import RecoverSettings
from owl_deploy.sharded_checkpoint import block_dtypes, fill_from_shard_, write_shard, write_sharded_checkpoint
from owl_deploy.skeleton import BlockInputs, Skeleton, open_skeleton
from owl_deploy.threads import resolve_threads
from owl_deploy.versions import versions
from owl_deploy.work_folder import WorkFolder

__all__ = ["RecoveryReport", "recover", "recovery_identity"]


@dataclass(frozen=True)
class RecoveryReport:
    """What training did."""

    checkpoint: Path
    facts: dict[str, Any]
    """Content of owl.json."""
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the document that `owl-deploy recover --json` prints."""
        return {
            "checkpoint": str(self.checkpoint),
            "recovery": self.facts["recovery"],
            "mask_sha256": self.facts["mask_sha256"],
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def recover(
    model: str,
    reference: str | None = None,
    settings: RecoverSettings = RecoverSettings(),
    *,
    out: Path,
    seed: int = 0,
    threads: int | Literal["auto"] = "auto",
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    offline: bool = False,
    on_step: OnStep = silent,
) -> RecoveryReport:
    """Train the surviving weights of a sparse checkpoint and write the result.

    Args:
        model: the sparse checkpoint, any MODEL.
        reference: the dense one; None is the model that its owl.json names.
        settings: method, text, budget.
        out: folder of the result.
        seed: of text and order of training.
        threads: torch threads; a resumed run must use as many, or sums could round differently.
        device: where to train, see `devices.resolve_devices`. Several take distill, spp and lora together, a process
            each; blockwise and bias, which have one block at a time, are done on the first.
        resume: continue a stopped run of the same models, data and settings.
        force: replace `out` if it exists.
        offline: never ask a hub.
        on_step: told of every finished block.

    Raises:
        OwlDeployError: and its subclasses; nothing half-written is left under `out`.
    """
    started = time.perf_counter()
    if out.exists() and not force:
        raise OwlDeployError(f"{out} exists already: give another --out, or --force to replace it")
    n_threads = resolve_threads(threads).n
    torch.set_num_threads(n_threads)
    devices = resolve_devices(device)
    sparse = open_skeleton(open_checkpoint(model, offline=offline), devices[0])
    dense = open_skeleton(_reference(sparse.checkpoint, reference, offline=offline), devices[0])
    _refuse_other_architecture(sparse, dense)
    check_zeros(sparse, on_step)
    calibration = calibration_tokens(dense.checkpoint, settings, seed=seed, on_step=on_step)
    tokens = torch.from_numpy(calibration.tokens)
    n_held_out = max(1, round(settings.held_out * len(tokens)))
    if n_held_out >= len(tokens):
        raise OwlDeployError(f"held_out {settings.held_out:g} of {len(tokens)} sequences leaves none to train on")
    fingerprint = {
        **settings.model_dump(mode="json"),
        "seed": seed,
        "threads": n_threads,
        "device": ",".join(device.type for device in devices),
        "products": str(resolve_products(settings.forward_dtype, devices[0])),
        "tokens_sha256": calibration.sha256,
        **{f"model file {name}": digest for name, digest in sparse.checkpoint.fingerprint.items()},
        **{f"reference file {name}": digest for name, digest in dense.checkpoint.fingerprint.items()},
        **{f"{name} version": text for name, text in versions("torch", "transformers", "safetensors").items()},
    }
    work = WorkFolder.open(out, fingerprint, resume=resume)
    reset_peak_rss()
    written = sparse
    if settings.method == "bias":
        written = with_biases(sparse, work.folder / "with-biases")
        training, measured = _correct_blocks(written, dense, settings, tokens, n_held_out, work, on_step)
    elif settings.method == "blockwise":
        training, measured = _recover_blocks(sparse, dense, settings, tokens, n_held_out, seed, work, on_step)
    else:
        training, measured = _recover_model(sparse, dense, settings, tokens, n_held_out, seed, devices, work, on_step)
    recovery = {
        **recovery_identity(sparse.checkpoint, dense.checkpoint, settings, devices, seed=seed),
        "learning_rate": settings.rate,
        "is_rate_relative": settings.is_rate_relative,
        "batch_size": settings.sequences_per_step,
        "reference": dense.checkpoint.source,
        "calibration": calibration.facts(),
        "n_held_out": n_held_out,
        **training,
    }
    facts = {**_lineage(sparse, work), "recovery": recovery}
    seconds, peak = round(time.perf_counter() - started, 3), peak_rss_bytes()
    with new_folder(out, replace=True) as folder:
        write_sharded_checkpoint(written, work.shard, folder)
        write_json(folder / "owl.json", facts)
        write_json(folder / "measured.json", {"seconds": seconds, "peak_rss_bytes": peak, **measured})
        check_zeros(open_skeleton(open_checkpoint(str(folder))))  # of the very files
    work.remove()
    return RecoveryReport(out, facts, seconds, peak)


def recovery_identity(
    sparse: Checkpoint, dense: Checkpoint, settings: RecoverSettings, devices: Sequence[torch.device], *, seed: int
) -> dict[str, Any]:
    """Return the part of owl.json's `recovery` that two checkpoints share if one can stand for the other."""
    return {
        "method": settings.method,
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "versions": versions("torch", "transformers", "safetensors"),
        "device": ",".join(device.type for device in devices),
        "products": str(resolve_products(settings.forward_dtype, devices[0])).removeprefix("torch."),
        "checkpoint_sha256": sparse.fingerprint,
        "reference_sha256": dense.fingerprint,
    }


def _reference(sparse: Checkpoint, reference: str | None, *, offline: bool) -> Checkpoint:
    """Open the dense model, by default the one that pruning began with."""
    source = (sparse.manifest or {}).get("source", {})
    name = reference or source.get("model")
    if not isinstance(name, str):
        raise OwlDeployError(
            f"{sparse.path} does not say which dense model it was pruned from: name it with --reference"
        )
    return open_checkpoint(name, offline=offline)


def _refuse_other_architecture(sparse: Skeleton, dense: Skeleton) -> None:
    """Raise UnsupportedModelError unless every parameter of the blocks has its counterpart."""

    def shapes(skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
        named = skeleton.blocks.named_parameters()
        return {f"{skeleton.prefix}.{name}": tuple(parameter.shape) for name, parameter in named}

    mine, theirs = shapes(sparse), shapes(dense)
    for name in {**mine, **theirs}:
        if mine.get(name) != theirs.get(name):
            raise UnsupportedModelError(
                f"{dense.checkpoint.path} is no dense twin of {sparse.checkpoint.path}: {name} is "
                f"{theirs.get(name, 'missing')} there and {mine.get(name, 'missing')} here"
            )


# What a dense block's outputs tell beside its targets; and what makes a sparse block better, which returns its record.
_Look: TypeAlias = Callable[[nn.Module, BlockInputs, int], Any]
_Improve: TypeAlias = Callable[[nn.Module, BlockInputs, HiddenStates, int, Any, "float | None"], dict[str, Any]]


def _recover_blocks(
    sparse: Skeleton,
    dense: Skeleton,
    settings: RecoverSettings,
    tokens: torch.Tensor,
    n_held_out: int,
    seed: int,
    work: WorkFolder,
    on_step: OnStep,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train block after block; return how it went, and how long it took."""

    def train(
        block: nn.Module, inputs: BlockInputs, targets: HiddenStates, index: int, _: Any, deadline: float | None
    ) -> dict[str, Any]:
        prefix = f"{sparse.prefix}.{index}."
        names = {linear.parameter.removeprefix(prefix) for linear in sparse.linears(index).values()}
        masks = pruned_positions(block, sorted(names))
        trained = recover_block_(
            block, inputs, targets, index, masks, settings, n_held_out=n_held_out, seed=seed, deadline=deadline
        )
        _keep_from_underflow_(sparse, index, masks)
        return {"before": trained.before, "after": trained.after, "curve": trained.curve}

    return _stream_blocks(sparse, dense, settings, tokens, work, on_step, lambda *_: None, train)


def _correct_blocks(
    sparse: Skeleton,
    dense: Skeleton,
    settings: RecoverSettings,
    tokens: torch.Tensor,
    n_held_out: int,
    work: WorkFolder,
    on_step: OnStep,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Correct the biases of block after block; return what it did to the errors of held-out sequences, and the time."""
    n_train = len(tokens) - n_held_out

    def look(block: nn.Module, entering: BlockInputs, index: int) -> dict[str, torch.Tensor]:
        return mean_outputs(block, _first(entering, n_train), index, dense.linears(index))

    def correct(
        block: nn.Module, inputs: BlockInputs, targets: HiddenStates, index: int, means: Any, _: float | None
    ) -> dict[str, Any]:
        before = mean_output_error(block, inputs, targets, index, n_train)
        as_they_were = {name: value.clone() for name, value in block.named_parameters()}
        correct_biases_(block, _first(inputs, n_train), index, sparse.linears(index), means)
        after = mean_output_error(block, inputs, targets, index, n_train)
        is_better = after < before
        if not is_better:
            for name, value in as_they_were.items():
                sparse.fill_(block, name, value)
        return {"before": before, "after": min(before, after), "is_corrected": is_better}

    return _stream_blocks(sparse, dense, settings, tokens, work, on_step, look, correct)


def _stream_blocks(
    sparse: Skeleton,
    dense: Skeleton,
    settings: RecoverSettings,
    tokens: torch.Tensor,
    work: WorkFolder,
    on_step: OnStep,
    look: _Look,
    improve: _Improve,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Improve block after block, each on what the improved blocks before it leave.

    A time budget is shared among the blocks that are to be done; what one leaves over goes to those after it.
    """
    inputs = _for_training(sparse.capture(tokens, dtype=resolve_products(settings.forward_dtype, sparse.device)))
    wanted = dense.capture(tokens)
    n_blocks = len(sparse.blocks)
    is_finished = [work.is_finished(index) for index in range(n_blocks)]  # each reads its shard whole
    n_left = is_finished.count(False)
    end = None if settings.budget is None else time.monotonic() + settings.budget * n_left / n_blocks
    for index in range(n_blocks):
        started = time.monotonic()
        entering = wanted if settings.targets == "dense" else inputs
        with dense.filled(index) as block:
            seen = None if is_finished[index] else look(block, entering, index)
            targets = _outputs(block, BlockInputs(entering.hidden_states, wanted.arguments, wanted.dtype), index)
        with sparse.filled(index) as block:
            if not is_finished[index]:
                deadline = None if end is None else started + (end - started) / n_left
                record = {"index": index, **improve(block, inputs, targets, index, seen, deadline)}
                write_shard(sparse, index, work.shard(index))
                n_left -= 1
                measured = {"seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss_bytes()}
                work.finish(index, linears=_zeros(sparse, index), measured=measured, training=record)
            fill_from_shard_(sparse, index, work.shard(index))
            inputs = BlockInputs(_outputs(block, inputs, index), inputs.arguments, inputs.dtype)
        if settings.targets == "dense":
            wanted = BlockInputs(targets, wanted.arguments, wanted.dtype)
        before, after = (work.record(index)["training"][key] for key in ("before", "after"))
        on_step(Step("recovering blocks", index + 1, n_blocks, f"error {before:.3g} to {after:.3g}"))
    records = [work.record(index) for index in range(n_blocks)]
    return {"blocks": [record["training"] for record in records]}, {"blocks": [r["measured"] for r in records]}


def _first(inputs: BlockInputs, n: int) -> BlockInputs:
    """Return the first n sequences."""
    states = HiddenStates()
    for i in range(n):
        states.append(inputs.hidden_states[i])
    return BlockInputs(states, inputs.arguments, inputs.dtype)


def _recover_model(
    sparse: Skeleton,
    dense: Skeleton,
    settings: RecoverSettings,
    tokens: torch.Tensor,
    n_held_out: int,
    seed: int,
    devices: Sequence[torch.device],
    work: WorkFolder,
    on_step: OnStep,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train the whole model, or adapters; write its blocks as shards; return how it went, and how long it took."""
    found = recover_model(
        sparse,
        dense,
        settings,
        tokens,
        n_held_out=n_held_out,
        seed=seed,
        devices=devices,
        folder=work.folder,
        on_step=on_step,
    )
    for index in range(len(sparse.blocks)):
        prefix = f"{sparse.prefix}.{index}."
        with sparse.filled(index) as block:
            for name, _ in list(block.named_parameters()):
                sparse.fill_(block, name, found.parameters[prefix + name])
            names = [linear.parameter for linear in sparse.linears(index).values()]
            _keep_from_underflow_(sparse, index, {name.removeprefix(prefix): found.masks[name] for name in names})
            write_shard(sparse, index, work.shard(index))
            work.finish(index, linears=_zeros(sparse, index), measured={"peak_rss_bytes": peak_rss_bytes()})
    return found.training, found.measured


@torch.no_grad()
def _outputs(block: nn.Module, inputs: BlockInputs, index: int) -> HiddenStates:
    """Return what a filled block makes of its inputs."""
    states = HiddenStates()
    for i in range(len(inputs.hidden_states)):
        states.append(run_block(block, inputs, index, i))
    return states


def _for_training(inputs: BlockInputs) -> BlockInputs:
    """Return a copy that autograd takes, as it does not take what was made in inference mode."""
    states = HiddenStates()
    for values in inputs.hidden_states:
        states.append(values.clone())
    arguments = pytree.tree_map_only(torch.Tensor, torch.clone, inputs.arguments)
    return BlockInputs(states, arguments, inputs.dtype)


@torch.no_grad()
def _keep_from_underflow_(skeleton: Skeleton, index: int, masks: dict[str, torch.Tensor]) -> None:
    """Make sure that no surviving weight is zero in the type of the file: the mask would not be the same."""
    prefix = f"{skeleton.prefix}.{index}."
    dtypes = block_dtypes(skeleton, index)
    for name, pruned in masks.items():
        parameter, dtype = skeleton.blocks[index].get_parameter(name), dtypes[prefix + name]
        lost = (parameter.to(dtype) == 0) & ~pruned
        parameter.masked_fill_(lost, torch.finfo(dtype).tiny)


def _zeros(skeleton: Skeleton, index: int) -> list[dict[str, Any]]:
    """Return what owl.json says of the linears of a filled block where nothing is known of their pruning."""
    return [zero_facts(name, linear.weight) for name, linear in skeleton.linears(index).items()]


def _lineage(sparse: Skeleton, work: WorkFolder) -> dict[str, Any]:
    """Return owl.json of the sparse checkpoint, or what can be said of one without."""
    manifest = sparse.checkpoint.manifest
    if manifest is not None and "mask_sha256" in manifest:
        return manifest
    linears = [fact for index in range(len(sparse.blocks)) for fact in work.record(index)["linears"]]
    n_zeros = sum(fact["n_zeros"] for fact in linears)
    n_parameters = sum(parameter.numel() for parameter in sparse.model.parameters())
    source = {"model": sparse.checkpoint.source, "sha256": sparse.checkpoint.fingerprint}
    return {
        **(manifest or {"kind": "checkpoint", "format_version": 1, "source": source}),
        "sparsity": {"linears": n_zeros / sum(sparse.n_weights()), "model": n_zeros / n_parameters},
        "linears": linears,
        "mask_sha256": whole_mask_sha256(linears),
    }
