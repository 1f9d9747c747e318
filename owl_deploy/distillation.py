"""A whole sparse model, trained so that its next-token distribution is that of the dense one again.

In: both models in memory (or this process's share of them), tokens. Out: the sparse model with other values of its
surviving weights, and its held-out loss over time. Pruned weights are zero before, during and after; what lies outside
the decoder blocks stays as it is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn import functional

from owl_deploy.devices import resolve_products
from owl_deploy.errors import OwlDeployError
from owl_deploy.files import write_bytes
from owl_deploy.masked_training import MaskedAdamW, batches
from owl_deploy.process_group import ALONE, ProcessGroup, share_like, whole
from owl_deploy.progress import OnStep, Step
from owl_deploy.recipe import RecoverSettings

__all__ = ["Distillation", "distill_", "distillation_loss", "held_out_loss", "load_state_", "save_state"]

_DIVERGED = 1.5


@dataclass
class Distillation:
    """How far the training of a model is: with the model itself, all that a stopped run needs to go on."""

    step: int = 0
    """Steps that are done."""
    seconds: float = 0.0
    """Training time until then."""
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """(steps done, seconds, held-out loss in nats per token), the first one before any step."""
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    """Parameters with the lowest held-out loss."""
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    """State of the optimiser."""


def distillation_loss(
    logits: torch.Tensor, wanted: torch.Tensor, tokens: torch.Tensor, *, temperature: float, cross_entropy: float
) -> torch.Tensor:
    """Return the loss of one sequence in nats per token (Hinton et al., arXiv 1503.02531, section 2).

    KL(dense || sparse) of the distributions at a temperature t, times t^2, which keeps gradients of one size; mixed
    with the cross-entropy of the text itself.

    Args:
        logits: of the sparse model, (seq_len, vocab).
        wanted: of the dense one.
        tokens: (seq_len,), what the cross-entropy is of.
        temperature: above 0.
        cross_entropy: its share of the loss, 0 to 1.
    """
    found = functional.log_softmax(logits.float() / temperature, dim=-1)
    target = functional.log_softmax(wanted.float() / temperature, dim=-1)
    loss = functional.kl_div(found, target, log_target=True, reduction="sum") / len(tokens) * temperature**2
    if cross_entropy:
        text = functional.cross_entropy(logits[:-1].float(), tokens[1:])
        loss = (1 - cross_entropy) * loss + cross_entropy * text
    return loss


def distill_(
    sparse: Any,
    dense: Any,
    tokens: torch.Tensor,
    masks: Mapping[str, torch.Tensor],
    trained: list[str],
    settings: RecoverSettings,
    *,
    n_held_out: int,
    seed: int,
    state: Distillation,
    on_check: Callable[[Distillation], None],
    on_step: OnStep,
    group: ProcessGroup = ALONE,
) -> Distillation:
    """Train a model in place with AdamW and leave it with the best values that held-out sequences saw.

    Args:
        sparse: transformers model in float32, shared out among the processes of the group.
        dense: its reference, likewise, on the same device.
        tokens: (n, seq_len) int64; the last `n_held_out` sequences only judge.
        masks: parameter name -> where it is zero: those weights have no gradient, no state, and stay zero.
        trained: names of the parameters that are trained.
        settings: epochs, batch size, learning rate, temperature, cross-entropy, budget.
        n_held_out: sequences, at least one and fewer than there are.
        seed: of the order of the sequences.
        state: empty, or where a stopped run was; the model is then as it was there.
        on_check: told of the state after every check on the held-out sequences, the last one included.
        on_step: told of every step.
        group: processes that all call this, with the same arguments otherwise.

    Raises:
        OwlDeployError: the loss is NaN or Inf, or training went away from the dense model and stayed there.
    """
    parameters = {name: parameter for name, parameter in sparse.named_parameters() if name in set(trained)}
    for name, parameter in sparse.named_parameters():
        parameter.requires_grad_(name in parameters)
    optimizer = MaskedAdamW(parameters, masks, settings.rate, is_relative=settings.is_rate_relative)
    optimizer.load(state.moments)
    if settings.gradient_checkpointing:
        sparse.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sparse.train()  # it is skipped in evaluation mode; decoders of this kind have no other difference
    n_train = len(tokens) - n_held_out
    n_steps = settings.epochs * -(-n_train // settings.sequences_per_step)
    check_every = max(1, n_steps // settings.n_checks)

    def check() -> None:
        loss = held_out_loss(sparse, dense, tokens[n_train:], settings, group)
        if all(loss < before for _, _, before in state.curve):
            state.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        state.curve.append((state.step, round(state.seconds, 3), loss))
        state.moments = optimizer.state()
        on_check(state)

    if not state.curve:
        check()
    order = batches(n_train, batch_size=settings.sequences_per_step, epochs=settings.epochs, seed=seed)
    for step, (batch, _) in enumerate(order):
        if step < state.step:
            continue
        share = max(step / n_steps, 0.0 if settings.budget is None else state.seconds / settings.budget)
        if share >= 1:
            break
        started = time.monotonic()
        for i, weight in group.share(batch):
            loss = _loss(sparse, dense, tokens[i], settings)
            if not math.isfinite(group.total(float(loss.detach()))):
                raise OwlDeployError(f"the loss of step {step + 1} is NaN or Inf: use a lower learning_rate")
            # gradients become the mean over processes, where the sum is wanted
            (loss * (weight * group.size / len(batch))).backward()  # type: ignore[no-untyped-call]
        optimizer.step(share)
        state.step, state.seconds = step + 1, state.seconds + group.longest(time.monotonic() - started)
        on_step(Step("distilling", step + 1, n_steps, f"held-out loss {state.curve[-1][2]:.3g}"))
        if state.step % check_every == 0:
            check()
    if state.curve[-1][0] != state.step:
        check()
    before, *losses = (loss for _, _, loss in state.curve)
    if losses and min(losses) > _DIVERGED * before:
        raise OwlDeployError(
            f"distillation diverges: the held-out loss was {before:.3g} and is {min(losses):.3g} at best: use a "
            f"learning_rate below {settings.rate_words}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.best[name])
    return state


@torch.no_grad()
def held_out_loss(
    sparse: Any, dense: Any, tokens: torch.Tensor, settings: RecoverSettings, group: ProcessGroup = ALONE
) -> float:
    """Return the mean of `distillation_loss` over sequences (n, seq_len)."""
    mine = group.share(range(len(tokens)))
    return group.total(sum(weight * float(_loss(sparse, dense, tokens[i], settings)) for i, weight in mine)) / len(
        tokens
    )


def _loss(sparse: Any, dense: Any, tokens: torch.Tensor, settings: RecoverSettings) -> torch.Tensor:
    """Return the loss of one sequence (seq_len,)."""
    row, dtype = tokens[None].to(sparse.device), resolve_products(settings.forward_dtype, sparse.device)
    with torch.no_grad():
        wanted = dense(input_ids=row, use_cache=False).logits[0]
    with torch.autocast(sparse.device.type, dtype, enabled=dtype != torch.float32):
        found = sparse(input_ids=row, use_cache=False).logits[0]
    mix = {"temperature": settings.temperature, "cross_entropy": settings.cross_entropy}
    return distillation_loss(found, wanted, row[0], **mix)


def save_state(state: Distillation, sparse: Any, trained: list[str], file: Path, group: ProcessGroup = ALONE) -> None:
    """Write the state and the parameters that are trained, whole; the file appears whole or not at all.

    All processes of the group have to call this; the first one writes.
    """
    parameters = dict(sparse.named_parameters())
    shares = {f"parameter/{name}": parameters[name] for name in trained}
    shares |= {f"best/{name}": values for name, values in state.best.items()} | state.moments
    tensors = {}
    for name, values in shares.items():
        tensor = whole(values)
        if group.rank == 0:
            tensors[name] = tensor
    if group.rank == 0:
        facts = {"step": state.step, "seconds": state.seconds, "curve": state.curve}
        write_bytes(file, save(tensors, metadata={"state": json.dumps(facts)}))


@torch.no_grad()
def load_state_(sparse: Any, trained: list[str], file: Path) -> Distillation:
    """Put back what `save_state` wrote; where the file is not there, or damaged, training begins anew."""
    parameters = dict(sparse.named_parameters())
    try:
        with safe_open(file, framework="pt") as stored:
            facts = json.loads((stored.metadata() or {})["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (it is no dict)
        found = {name: tensors.pop(f"parameter/{name}") for name in trained}
        best = {name: share_like(tensors.pop(f"best/{name}"), parameters[name]) for name in trained}
        curve = [(int(step), float(seconds), float(loss)) for step, seconds, loss in facts["curve"]]
        state = Distillation(int(facts["step"]), float(facts["seconds"]), curve, best, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return Distillation()
    for name, values in found.items():
        parameters[name].copy_(share_like(values, parameters[name]))
    return state
