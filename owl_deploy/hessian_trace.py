"""How sharply the loss of the whole dense model bends along the weights of each linear (arXiv 2310.09499).

In: a checkpoint, its linears, tokens, a number of probes. Out: per linear an estimate of the mean diagonal entry of the
loss Hessian, with its standard error, kept in the cache. What an allocation makes of them is not known here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from owl_deploy.cache import owl_deploy_cache
from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import OwlDeployError, UnsupportedModelError
from owl_deploy.files import write_json
from owl_deploy.generation import load_torch_model
from owl_deploy.memory import peak_rss_bytes, release_free_memory, rss_bytes
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.skeleton import Prunable, Skeleton
from owl_deploy.text import tokens_sha256
from owl_deploy.versions import versions

__all__ = ["TRACED_SEQUENCES", "TRACED_TOKENS", "Trace", "hessian_traces"]

log = logging.getLogger(__name__)

TRACED_SEQUENCES, TRACED_TOKENS = 16, 256
"""What an allocation takes of its calibration text: each sequence costs a double backward pass per probe, and memory
grows with the square of its length."""


@dataclass(frozen=True)
class Trace:
    """An estimate of tr(H) / n for a linear of n weights, H the Hessian of the loss with respect to them."""

    mean: float
    """Over probes and sequences, in nats per squared unit of weight. Negative where the loss bends down."""
    standard_error: float | None
    """Of the mean, from the spread of the probes for the same sequence; None for a single probe, which has none."""


def hessian_traces(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    tokens: torch.Tensor,
    *,
    n_probes: int,
    seed: int,
    threads: int,
    on_step: OnStep = silent,
) -> dict[str, Trace]:
    """Estimate, for every linear, the trace of the Hessian of the loss divided by its number of weights.

    The loss is the mean cross-entropy, in nats, of every token after the first of each sequence. Hutchinson's
    estimator: the mean of z^T H z over random signs z. One vector of signs z spans all linears, and z_i^T (H z)_i
    is an unbiased estimate for linear i, since the expectation of every product of two different signs is zero. Signs
    are drawn anew for each sequence, which is as unbiased as the same ones for all, and as cheap. It is noisy: in
    SmolLM2-135M, 5 probes for each of 4 sequences of 64 tokens left a median standard error of 81 % of a trace. Most of
    that comes from the other blocks: signs for one block at a time, tried on three of them, had about an eighth of the
    variance for about five times the work.

    The official code takes one probe of one sequence, and its absolute value, which is biased where the trace is small
    or negative; here it keeps its sign, and norms, which are not pruned, have no trace.

    The whole model is in memory: its weights, then for every prunable weight a gradient, a sign and a product, 4 bytes
    each, and the graph of one sequence's gradient, which grows with the square of its length (SmolLM2-135M: peak
    2.8 GiB for 64 tokens, 4.9 GiB for 256).

    The results are in the cache under a hash of the model's files, the tokens, n_probes, the seed, the versions, the
    device and the threads (by which sums may round differently); a damaged file is made anew.

    Args:
        checkpoint: of the dense model.
        skeleton: of the same; says which linears there are, and the device to run on.
        tokens: (n, seq_len) int64.
        n_probes: vectors of signs per sequence.
        seed: of the signs.
        threads: of torch; set here.
        on_step: told of every probe.

    Returns:
        Linear name -> trace, in the order of the blocks and, inside, of `Skeleton.linears`.

    Raises:
        ValueError: there are no probes, or no sequence has a token to predict.
        UnsupportedModelError: an operation of the model has no second derivative.
        OwlDeployError: a result is NaN or Inf.
    """
    if n_probes < 1 or tokens.dim() != 2 or len(tokens) < 1 or tokens.shape[1] < 2:
        raise ValueError(f"need probes and (n, seq_len >= 2) tokens, got {n_probes} and {tuple(tokens.shape)}")
    linears = {name: linear for i in range(len(skeleton.blocks)) for name, linear in skeleton.linears(i).items()}
    facts = {
        "model": checkpoint.fingerprint,
        "tokens_sha256": tokens_sha256(tokens.numpy()),
        "shape": list(tokens.shape),  # the hash knows nothing of rows
        "n_probes": n_probes,
        "seed": seed,
        "threads": threads,
        "device": skeleton.device.type,
        "versions": versions("torch", "transformers"),
        "format_version": 1,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = owl_deploy_cache() / "hessian-traces" / f"{digest[:32]}.json"
    known = _read(path, list(linears), n_probes)
    if known is not None:
        return known
    torch.set_num_threads(threads)
    model = load_torch_model(checkpoint).requires_grad_(False).to(skeleton.device)
    log.info("the model and what was there before take %.2f GiB", rss_bytes() / 2**30)
    forms = _forms(model, linears, tokens.to(skeleton.device), n_probes, seed, on_step)
    del model
    release_free_memory()
    traces = _traces(forms, linears)
    log.info("peak memory of the Hessian traces: %.2f GiB; %s", peak_rss_bytes() / 2**30, _spread(traces))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"traces": {name: astuple(trace) for name, trace in traces.items()}, "of": facts})
    return traces


def _forms(
    model: Any, linears: Mapping[str, Prunable], tokens: torch.Tensor, n_probes: int, seed: int, on_step: OnStep
) -> NDArray[np.float64]:
    """Return z^T H z of the loss of every sequence, for random signs: (n, n_probes, number of linears)."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        linear.parameter: model.get_parameter(linear.parameter).requires_grad_() for linear in linears.values()
    }
    forms = np.empty((len(tokens), n_probes, len(linears)))
    for i, row in enumerate(tokens):
        gradients = _gradients(model, parameters, row)  # one graph for all probes
        for k in range(n_probes):
            found = _quadratic_forms(
                linears, parameters, gradients, {name: _signs(value, generator) for name, value in parameters.items()}
            )
            forms[i, k] = list(found.values())
            on_step(Step("traces of the loss Hessian", i * n_probes + k + 1, len(tokens) * n_probes))
        del gradients  # or two graphs would be there while the next is made
    return forms


def _gradients(model: Any, parameters: Mapping[str, torch.Tensor], row: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of a sequence's mean loss, with the graph that leads to it.

    Args:
        row: (seq_len,) int64.
    """
    # The fused kernels of attention have no second derivative; the plain products and softmax do.
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(input_ids=row[None], use_cache=False).logits[0]
    loss = cross_entropy(logits[:-1], row[1:])
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def _quadratic_forms(
    linears: Mapping[str, Prunable],
    parameters: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    probe: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    """Return z_i^T (H z)_i of every linear i.

    Args:
        linears: by name; those that share a fused parameter get a slice of it each.
        parameters: by name.
        gradients: of `_gradients`; their graph is kept.
        probe: z, by parameter and in its shape.
    """
    # Experts that no token was routed to have a gradient of zeros, which no graph leads to.
    reached = [name for name, gradient in gradients.items() if gradient.requires_grad]
    try:
        found = torch.autograd.grad(
            [gradients[name] for name in reached],
            list(parameters.values()),
            [probe[name] for name in reached],
            retain_graph=True,
            materialize_grads=True,
        )
    except RuntimeError as error:
        if "derivative" not in str(error):
            raise
        raise UnsupportedModelError(
            f"the model has an operation without second derivative ({str(error).splitlines()[0]}), which traces of "
            "its Hessian need: use isc_sensitivity layerwise"
        ) from error
    products = dict(zip(parameters, found, strict=True))
    forms: dict[str, float] = {}
    for name, linear in linears.items():
        part = slice(None) if linear.expert is None else linear.expert
        z, product = probe[linear.parameter][part], products[linear.parameter][part]
        forms[name] = float((z * product).sum(dtype=torch.float64))
    return forms


def _signs(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw +1 and -1, on the CPU so that every device gets the same."""
    signs = torch.empty(parameter.shape, dtype=parameter.dtype).bernoulli_(0.5, generator=generator)
    return signs.mul_(2).sub_(1).to(parameter.device)


def _traces(forms: NDArray[np.float64], linears: Mapping[str, Prunable]) -> dict[str, Trace]:
    """Reduce the forms, (n, n_probes, linears): all sequences are of one length and count the same.

    Raises:
        OwlDeployError: one is NaN or Inf.
    """
    for name, values in zip(linears, np.moveaxis(forms, 2, 0), strict=True):
        if not np.isfinite(values).all():
            raise OwlDeployError(
                f"the loss Hessian of {name} holds NaN or Inf: check the checkpoint, or use isc_sensitivity layerwise"
            )
    n, n_probes, _ = forms.shape
    means = forms.mean(axis=(0, 1))
    # Sequences differ, and that is no error of the probes: only the spread within each counts.
    errors = np.sqrt(forms.var(axis=1, ddof=1).mean(axis=0) / (n * n_probes)) if n_probes > 1 else None
    traces: dict[str, Trace] = {}
    for i, (name, linear) in enumerate(linears.items()):
        n_weights = linear.weight.numel()
        error = None if errors is None else float(errors[i]) / n_weights
        traces[name] = Trace(float(means[i]) / n_weights, error)
    return traces


def _spread(traces: Mapping[str, Trace]) -> str:
    """Say how sure the traces are, for the log."""
    shares = [abs(t.standard_error / t.mean) for t in traces.values() if t.standard_error is not None and t.mean]
    return f"median standard error {np.median(shares):.0%} of a trace" if shares else "no standard error"


def _read(path: Path, names: list[str], n_probes: int) -> dict[str, Trace] | None:
    """Return the traces in a file; None where there is none that could be one."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["traces"]
        if list(stored) != names:
            return None
        traces = {name: Trace(*values) for name, values in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return traces if all(_is_sound(trace, n_probes) for trace in traces.values()) else None


def _is_sound(trace: Trace, n_probes: int) -> bool:
    """Say whether what was read is what could have been written."""
    mean, error = trace.mean, trace.standard_error
    if not isinstance(mean, float) or not math.isfinite(mean):
        return False
    if n_probes == 1:
        return error is None
    return isinstance(error, float) and 0 <= error < math.inf
