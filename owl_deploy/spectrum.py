"""How heavy the tail of a weight matrix's spectrum is (AlphaPruning, arXiv 2410.10912; FARMS, arXiv 2506.06280).

In: a weight matrix; no data. Out: a tail exponent alpha, small where training left its mark. What is made of
the exponents of a block is not known here.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from owl_deploy.cache import owl_deploy_cache
from owl_deploy.errors import OwlDeployError
from owl_deploy.files import write_json
from owl_deploy.versions import versions

__all__ = ["Estimator", "Tail", "eigenvalues", "fit_tail", "hill_alpha", "hill_alpha_of"]

Estimator = Literal["peak", "mid"]

MAX_ZEROS = 0.05
"""Share of zeros above which a matrix counts as pruned already; dense checkpoints have next to none."""

_N_BINS = 100
_ROUNDING = 1e-6  # eigenvalues this near are equal: a float32 weight knows no more of them
_N_COLUMNS = 1024  # a float64 copy of all of a 4096x11008 matrix would take 360 MB


@dataclass(frozen=True)
class Tail:
    """A power law p(x) ~ x^-alpha fitted to the largest eigenvalues."""

    alpha: float
    """The exponent, above 1."""
    start: int
    """Index of the first eigenvalue of the tail, in ascending order."""
    distance: float
    """Kolmogorov-Smirnov distance between the tail and the law."""
    n_candidates: int
    """How many starts were tried."""


@torch.no_grad()
def eigenvalues(weight: torch.Tensor, *, aspect_ratio: float | None = None) -> NDArray[np.float64]:
    """Return the squared singular values of a matrix, or those of its windows of one shape together.

    They are the eigenvalues of the smaller Gram matrix, summed and solved in float64, which is much cheaper than
    the full decomposition of the official code. Not divided by the size of the matrix. Those within rounding of zero,
    at most eps * largest * max(out, in), are left out (the official code takes logarithms of them).

    Exponents of matrices of different shape cannot be compared, since even random ones have spectra whose width
    depends on the shape; windows of one aspect ratio remove that (FARMS). The paper's own windows are not public
    in detail, so these are our choice: the largest windows of that ratio that fit, side by side along the longer side,
    as few as cover all of it, at even distances and overlapping where they must.

    Args:
        weight: (out, in), any floating type; not changed.
        aspect_ratio: columns over rows of the windows; 1 is a good choice. None: one window, the matrix itself.

    Returns:
        (n,) ascending, all positive: at most min(out, in) per window.

    Raises:
        ValueError: it is no matrix, or the ratio is not positive and finite.
        OwlDeployError: a weight is NaN or Inf.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"need a matrix, got shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise OwlDeployError("the weight holds NaN or Inf, which have no spectrum: check the checkpoint")
    if aspect_ratio is None:
        return _squared_singular_values(weight)
    if not 0 < aspect_ratio < math.inf:
        raise ValueError(f"the aspect ratio must be positive and finite, got {aspect_ratio}")
    return np.sort(np.concatenate([_squared_singular_values(window) for window in _windows(weight, aspect_ratio)]))


def _squared_singular_values(weight: torch.Tensor) -> NDArray[np.float64]:
    """Return the positive ones, (n,) float64 ascending."""
    flat = weight if weight.shape[0] <= weight.shape[1] else weight.T
    gram = torch.zeros(flat.shape[0], flat.shape[0], dtype=torch.float64)
    for start in range(0, flat.shape[1], _N_COLUMNS):
        columns = flat[:, start : start + _N_COLUMNS].double()
        gram.addmm_(columns, columns.T)
    values: NDArray[np.float64] = torch.linalg.eigvalsh(gram).numpy()
    positive: NDArray[np.float64] = values[values > np.finfo(np.float64).eps * values[-1] * flat.shape[1]]
    return positive


def _windows(weight: torch.Tensor, aspect_ratio: float) -> list[torch.Tensor]:
    """Return views of one shape that cover the matrix."""
    rows, columns = weight.shape
    dim = int(columns >= rows * aspect_ratio)  # along which they lie side by side
    side = max(1, round(rows * aspect_ratio if dim == 1 else columns / aspect_ratio))
    length = weight.shape[dim]
    starts = np.linspace(0, length - side, math.ceil(length / side)).round().astype(int)
    return [weight.narrow(dim, int(start), side) for start in starts]


def hill_alpha(eigenvalues: NDArray[np.float64], *, estimator: Estimator = "peak") -> float:
    """Return the tail exponent of a spectrum; see `fit_tail`."""
    return fit_tail(eigenvalues, estimator=estimator).alpha


def fit_tail(eigenvalues: NDArray[np.float64], *, estimator: Estimator = "peak") -> Tail:
    """Fit a power law to the largest eigenvalues, with the Hill estimator of the official code.

    With x ascending and the t = n - i values from x_i on, alpha_i = 1 + t / sum_{j >= i} ln(x_j / x_i). The tail
    includes x_i, as in the code; the paper divides by one fewer.

    mid: i = floor(n / 2). peak: of all i (but the last) whose x_i is near the peak of the density, the one with the
    smallest Kolmogorov-Smirnov distance D_i = max_j |1 - (x_j / x_i)^(1 - alpha_i) - (j - i) / t|, the first
    of equal ones. The peak is the left edge of the fullest of 100 bins of log10 x, and near is 0.95 to 1.5 times that.
    The official code compares log10(0.95 peak) with the eigenvalues themselves, a mix of units that lets nearly
    everything below the peak in and the exponent depend on the unit of the weights. The bound that was meant is
    taken here, so exponents differ from those shipped with it.

    Args:
        eigenvalues: (n,) positive, in any order and unit.

    Raises:
        ValueError: one is not positive and finite.
        OwlDeployError: there is no tail: from every start on, all values are equal to within float32 rounding.
    """
    x = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    if not (np.isfinite(x) & (x > 0)).all():
        raise ValueError("eigenvalues must be positive and finite")
    starts = _starts(x, estimator) if len(x) else []
    tails = [_tail_from(x, start, len(starts)) for start in starts if x[-1] / x[start] > 1 + _ROUNDING]
    if not tails:
        raise OwlDeployError(
            f"a spectrum of {len(x)} values, {len(np.unique(x))} of them distinct, has no tail to fit (estimator "
            f"{estimator}): use another allocation, such as owl"
        )
    return min(tails, key=lambda tail: tail.distance)


def _starts(x: NDArray[np.float64], estimator: Estimator) -> list[int]:
    """Return where the tail may start in ascending values."""
    if estimator == "mid":
        return [len(x) // 2]
    # In units of the largest, so that rounding does not make bins depend on the scale.
    logarithm = np.log10(x / x[-1])
    counts, edges = np.histogram(logarithm, bins=_N_BINS)
    peak = x[-1] * 10 ** edges[counts.argmax()]
    return [int(start) for start in np.flatnonzero((0.95 * peak <= x[:-1]) & (x[:-1] <= 1.5 * peak))]


def _tail_from(x: NDArray[np.float64], start: int, n_candidates: int) -> Tail:
    """Fit the values from `start` on, of which not all are equal."""
    ratio = x[start:] / x[start]
    size = len(ratio)
    exponent = size / float(np.log(ratio).sum())
    law = 1 - ratio**-exponent
    distance = float(np.abs(law - np.arange(size) / size).max())
    return Tail(1 + exponent, start, distance, n_candidates)


def hill_alpha_of(
    weight: torch.Tensor,
    *,
    name: str,
    estimator: Estimator = "peak",
    aspect_ratio: float | None = None,
    folder: Path | None = None,
) -> float:
    """Return the tail exponent of a linear's spectrum, from a file where it is known already.

    There is one JSON file per SHA-256 of the weights and of all that the figure depends on. A damaged one is made
    anew.

    Args:
        weight: (out, in), any floating type, dense; not changed.
        name: of the linear, for messages.
        estimator: see `fit_tail`.
        aspect_ratio: see `eigenvalues`.
        folder: where the files are; made when missing. None: `spectra` in the cache.

    Raises:
        OwlDeployError: more than 5 % of the weights are zero, one is NaN or Inf, or there is no tail.
    """
    zeros = int((weight == 0).sum()) / max(1, weight.numel())
    if zeros > MAX_ZEROS:
        raise OwlDeployError(
            f"{name}: {zeros:.1%} of the weights are zero, so it was pruned already, and zeros distort the spectrum: "
            "start from the dense checkpoint, or use another allocation, such as owl"
        )
    facts = {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype),
        "weight_sha256": _sha256(weight),
        "estimator": estimator,
        "aspect_ratio": aspect_ratio,
        "threads": torch.get_num_threads(),  # by which sums may round differently
        "versions": versions("numpy", "torch"),
        "format_version": 1,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = (owl_deploy_cache() / "spectra" if folder is None else folder) / f"{digest[:32]}.json"
    known = _read(path)
    if known is not None:
        return known
    try:
        alpha = hill_alpha(eigenvalues(weight, aspect_ratio=aspect_ratio), estimator=estimator)
    except OwlDeployError as error:
        raise OwlDeployError(f"{name}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"alpha": alpha, "of": facts})
    return alpha


def _sha256(weight: torch.Tensor) -> str:
    """Hash the bytes of a matrix row by row, whatever its strides."""
    stored: NDArray[Any] = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(stored.data).hexdigest()


def _read(path: Path) -> float | None:
    """Return the exponent in a file; None where there is none that could be one."""
    try:
        alpha = json.loads(path.read_text(encoding="utf-8"))["alpha"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return alpha if isinstance(alpha, float) and 1 < alpha < math.inf else None
