"""Eigenvalues and tail exponents, checked against worked values, a full decomposition and a plain loop."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from owl_deploy import spectrum
from owl_deploy.cache import owl_deploy_cache
from owl_deploy.errors import OwlDeployError
from owl_deploy.spectrum import Estimator, eigenvalues, fit_tail, hill_alpha, hill_alpha_of

QUICK = settings(derandomize=True, deadline=None, max_examples=60)

POWERS = np.array([0.5, 1, 1, 2, 4, 8, 16, 32])
PARETO = (1 - (np.arange(64) + 0.5) / 64) ** (-1 / 1.5)
"""Quantiles of a power law with exponent 2.5."""
LUMP = np.concatenate([2 / (1 - (np.arange(50) + 0.5) / 50), np.full(8, 30.0)])
"""Quantiles of a power law and a peak far up in them."""


def random_weight(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def decomposed(weight: torch.Tensor) -> NDArray[np.float64]:
    """Squared singular values by a full decomposition, ascending."""
    return np.asarray(np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2))


def loop_tail(values: NDArray[np.float64], low: float, high: float) -> tuple[float, int, float, int]:
    """Exponent, start, distance and number of candidates among starts of a value in [low, high], one by one."""
    x = sorted(float(value) for value in values)
    found = []
    candidates = [i for i in range(len(x) - 1) if low <= x[i] <= high]
    for i in candidates:
        t = len(x) - i
        total = sum(math.log(x[j]) for j in range(i, len(x))) - t * math.log(x[i])
        if total <= 1e-12:
            continue
        alpha = 1 + t / total
        distance = max(abs(1 - (x[j] / x[i]) ** (1 - alpha) - (j - i) / t) for j in range(i, len(x)))
        found.append((distance, i, alpha))
    distance, start, alpha = min(found)
    return alpha, start, distance, len(candidates)


def peak_of(values: NDArray[np.float64]) -> float:
    """Left edge of the fullest of 100 bins of the logarithm, the first of equally full ones."""
    x = [math.log10(value) for value in values]
    width = (max(x) - min(x)) / 100
    counts = [0] * 100
    for value in x:
        counts[min(99, math.floor((value - min(x)) / width))] += 1
    return float(10 ** (min(x) + counts.index(max(counts)) * width))


def official_tail(values: NDArray[np.float64]) -> tuple[float, int, float, int]:
    """The published code, which compares a logarithm with the eigenvalues themselves."""
    peak = peak_of(values)
    return loop_tail(values, math.log10(0.95 * peak), 1.5 * peak)


def intended_tail(values: NDArray[np.float64]) -> tuple[float, int, float, int]:
    peak = peak_of(values)
    return loop_tail(values, 0.95 * peak, 1.5 * peak)


# Eigenvalues


def test_eigenvalues_of_the_worked_matrix() -> None:
    weight = torch.cat([torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(1, 3)])
    values = eigenvalues(weight)
    assert values.tolist() == pytest.approx([1, 4, 9], abs=1e-12)
    assert hill_alpha(values, estimator="mid") == pytest.approx(3.466303, abs=5e-7)


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (12, 5), (1, 9), (9, 1), (3, 2500)])
def test_eigenvalues_are_squared_singular_values(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    values = eigenvalues(weight)
    assert values.dtype == np.float64
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose(values, decomposed(weight), rtol=1e-9)


@pytest.mark.parametrize("rank", [1, 3])
def test_eigenvalues_within_rounding_of_zero_are_left_out(rank: int) -> None:
    weight = random_weight(12, rank).double() @ random_weight(rank, 20, seed=1).double()
    values = eigenvalues(weight)
    np.testing.assert_allclose(values, decomposed(weight)[-rank:], rtol=1e-9)


def test_zero_matrix_has_no_eigenvalues() -> None:
    assert eigenvalues(torch.zeros(3, 4)).tolist() == []


def test_eigenvalues_of_a_transposed_view_of_bfloat16_are_those_of_its_values() -> None:
    stored = random_weight(6, 10).bfloat16()
    np.testing.assert_allclose(eigenvalues(stored.T), decomposed(stored.float()), rtol=1e-9)


def test_weight_is_not_changed_and_may_need_a_gradient() -> None:
    weight = random_weight(6, 10).requires_grad_()
    before = weight.detach().clone()
    eigenvalues(weight, aspect_ratio=1.0)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_an_error(bad: float) -> None:
    weight = random_weight(4, 4)
    weight[1, 2] = bad
    with pytest.raises(OwlDeployError, match="holds NaN or Inf"):
        eigenvalues(weight)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2), (0, 4)])
def test_what_is_no_matrix_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="need a matrix"):
        eigenvalues(torch.ones(shape))


# Windows of one aspect ratio


@pytest.mark.parametrize(
    ("shape", "aspect_ratio", "windows"),
    [
        ((4, 12), 1.0, [(slice(None), slice(a, a + 4)) for a in (0, 4, 8)]),
        ((12, 4), 1.0, [(slice(a, a + 4), slice(None)) for a in (0, 4, 8)]),
        ((4, 10), 1.0, [(slice(None), slice(a, a + 4)) for a in (0, 3, 6)]),  # three that overlap cover ten columns
        ((4, 4), 2.0, [(slice(a, a + 2), slice(None)) for a in (0, 2)]),
        ((4, 4), 0.5, [(slice(None), slice(a, a + 2)) for a in (0, 2)]),
        ((4, 8), 2.0, [(slice(None), slice(None))]),
    ],
)
def test_windows_are_pooled(shape: tuple[int, int], aspect_ratio: float, windows: list[tuple[slice, slice]]) -> None:
    weight = random_weight(*shape)
    expected = np.sort(np.concatenate([decomposed(weight[rows, columns]) for rows, columns in windows]))
    np.testing.assert_allclose(eigenvalues(weight, aspect_ratio=aspect_ratio), expected, rtol=1e-8)


@QUICK
@given(rows=st.integers(1, 14), columns=st.integers(1, 14), aspect_ratio=st.floats(0.05, 20))
def test_windows_have_one_shape_and_cover_every_weight(rows: int, columns: int, aspect_ratio: float) -> None:
    weight = torch.zeros(rows, columns)
    windows = spectrum._windows(weight, aspect_ratio)
    assert len({window.shape for window in windows}) == 1
    for window in windows:
        window.add_(1)
    assert int(weight.min()) >= 1
    assert int(weight.max()) <= 2  # no more windows than needed
    height, width = windows[0].shape
    if min(height, width) > 1:  # the nearest whole number of rows or columns
        assert abs(width - height * aspect_ratio) <= 0.5 * max(1, aspect_ratio) + 1e-9


def test_windows_take_the_shape_of_random_matrices_out_of_their_exponents() -> None:
    def spread(aspect_ratio: float | None) -> float:
        shapes = [(64, 64), (64, 256), (512, 64)]
        alphas = [
            hill_alpha(eigenvalues(random_weight(*shape), aspect_ratio=aspect_ratio), estimator="mid")
            for shape in shapes
        ]
        return max(alphas) - min(alphas)

    assert spread(1.0) < spread(None) / 10


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_aspect_ratio_out_of_range_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="aspect ratio must be positive"):
        eigenvalues(random_weight(3, 3), aspect_ratio=bad)


# Tail exponents


@pytest.mark.parametrize(
    ("values", "expected"),
    [(POWERS, 1.961797), ([1, 2, 4, 8], 3.885390), (PARETO, 2.540892), (LUMP, 1.836193), ([1, 4, 9], 3.466303)],
)
def test_mid_worked_values(values: list[float], expected: float) -> None:
    assert hill_alpha(np.array(values), estimator="mid") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "alpha", "start", "distance"),
    [(POWERS, 1.673258, 1, 0.181974), (PARETO, 2.520139, 0, 0.010525), (LUMP, 2.340793, 54, 0.171421)],
)
def test_peak_worked_values(values: NDArray[np.float64], alpha: float, start: int, distance: float) -> None:
    tail = fit_tail(values)
    assert (tail.alpha, tail.distance) == pytest.approx((alpha, distance), abs=1e-6)
    assert tail.start == start


@pytest.mark.parametrize(
    ("values", "official", "n_official", "n_ours"),
    [(POWERS, 1.524616, 3, 2), (LUMP, 1.819953, 56, 10)],
)
def test_official_code_tries_starts_far_below_the_peak(
    values: NDArray[np.float64], official: float, n_official: int, n_ours: int
) -> None:
    alpha, start, _, n_candidates = official_tail(values)
    assert alpha == pytest.approx(official, abs=1e-6)
    assert (start, n_candidates) == (0, n_official)
    assert fit_tail(values).n_candidates == n_ours
    assert abs(fit_tail(values).alpha - alpha) > 0.1


def test_unit_of_the_weights_decides_in_the_official_code_and_not_here() -> None:
    assert official_tail(LUMP)[0] == pytest.approx(1.819953, abs=1e-6)
    assert official_tail(LUMP * 0.1)[0] == pytest.approx(2.340793, abs=1e-6)
    assert fit_tail(LUMP).alpha == pytest.approx(fit_tail(LUMP * 0.1).alpha, abs=1e-9)


@QUICK
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(8, 80), heavy=st.floats(0.3, 3), power=st.integers(-40, 40))
def test_peak_is_what_a_plain_loop_finds(seed: int, n: int, heavy: float, power: int) -> None:
    values = np.random.default_rng(seed).pareto(heavy, size=n) + 1
    tail, expected = fit_tail(values), intended_tail(values)
    assert (tail.alpha, tail.distance) == pytest.approx((expected[0], expected[2]), rel=1e-9)
    assert (tail.start, tail.n_candidates) == (expected[1], expected[3])
    assert fit_tail(values * 2.0**power) == tail  # powers of two scale without rounding


@pytest.mark.parametrize("factor", [10.0, 0.01])
@pytest.mark.parametrize("estimator", ["peak", "mid"])
def test_scale_of_the_weights_does_not_matter(factor: float, estimator: Estimator) -> None:
    assert hill_alpha(PARETO * factor, estimator=estimator) == pytest.approx(
        hill_alpha(PARETO, estimator=estimator), abs=1e-9
    )


def test_order_of_the_eigenvalues_does_not_matter() -> None:
    assert fit_tail(LUMP[::-1]) == fit_tail(LUMP)


@pytest.mark.parametrize("estimator", ["peak", "mid"])
def test_exponent_of_many_samples_of_a_power_law_is_found(estimator: Estimator) -> None:
    samples = np.random.default_rng(0).pareto(1.5, size=4000) + 1  # density of exponent 2.5
    assert hill_alpha(samples, estimator=estimator) == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize(
    "values", [[], [3.0], [2.0, 2.0, 2.0], [1.9999999999999996, 1.9999999999999998], [1.0, 1 + 1e-7]]
)
@pytest.mark.parametrize("estimator", ["peak", "mid"])
def test_spectrum_without_a_tail_is_one_sentence(values: list[float], estimator: Estimator) -> None:
    with pytest.raises(
        OwlDeployError, match=f"{len(values)} values, .* has no tail to fit .estimator {estimator}.: use"
    ):
        fit_tail(np.array(values), estimator=estimator)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_eigenvalue_that_is_not_positive_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        fit_tail(np.array([1.0, bad, 3.0]))


# Linears, and what is known of them


@pytest.fixture
def n_decompositions(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One element per spectrum that was computed."""
    calls: list[None] = []
    compute = spectrum._squared_singular_values

    def counted(weight: torch.Tensor) -> NDArray[np.float64]:
        calls.append(None)
        return compute(weight)

    monkeypatch.setattr(spectrum, "_squared_singular_values", counted)
    return calls


def test_exponent_of_a_linear_is_that_of_its_spectrum(tmp_path: Path) -> None:
    weight = random_weight(20, 30)
    assert hill_alpha_of(weight, name="q_proj", folder=tmp_path) == hill_alpha(eigenvalues(weight))


def test_same_weights_are_decomposed_once(tmp_path: Path, n_decompositions: list[None]) -> None:
    weight = random_weight(20, 30)
    first = hill_alpha_of(weight, name="q_proj", folder=tmp_path / "deep" / "down")
    again = hill_alpha_of(weight.T.contiguous().T, name="other", folder=tmp_path / "deep" / "down")
    assert (first, len(n_decompositions), len(list((tmp_path / "deep" / "down").iterdir()))) == (again, 1, 1)


def test_other_weights_shapes_types_and_settings_have_files_of_their_own(
    tmp_path: Path, n_decompositions: list[None]
) -> None:
    weight = random_weight(20, 30)
    changed = weight.clone()
    changed[3, 4] += 1
    for other in (weight, changed, weight.view(30, 20), weight.double()):
        hill_alpha_of(other, name="q_proj", folder=tmp_path)
    mid = hill_alpha_of(weight, name="q_proj", estimator="mid", folder=tmp_path)
    windows = hill_alpha_of(weight, name="q_proj", estimator="mid", aspect_ratio=1.5, folder=tmp_path)
    assert mid == hill_alpha(eigenvalues(weight), estimator="mid")
    assert windows == mid  # the window is the matrix, which the settings do not say
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"alpha": "2"}', '{"alpha": NaN}', '{"alpha": 0.5}', "\udcff"]
)
def test_damaged_file_is_made_anew(tmp_path: Path, content: str) -> None:
    weight = random_weight(20, 30)
    alpha = hill_alpha_of(weight, name="q_proj", folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert hill_alpha_of(weight, name="q_proj", folder=tmp_path) == alpha
    assert json.loads(path.read_text())["alpha"] == alpha


def test_files_are_in_the_cache_when_no_folder_is_given() -> None:
    before = set((owl_deploy_cache() / "spectra").glob("*.json"))
    hill_alpha_of(random_weight(5, 6, seed=77), name="q_proj")
    assert len(set((owl_deploy_cache() / "spectra").glob("*.json")) - before) == 1


def with_zeros(n_zeros: int) -> torch.Tensor:
    """A 20x20 matrix with the first elements zeroed."""
    weight = random_weight(20, 20)
    weight.view(-1)[:n_zeros] = 0
    return weight


def test_pruned_linear_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        OwlDeployError, match=r"layers\.3\.q_proj: 5\.2% of the weights are zero, so it was pruned already"
    ):
        hill_alpha_of(with_zeros(21), name="layers.3.q_proj", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_few_zeros_are_no_reason_to_refuse(tmp_path: Path) -> None:
    weight = with_zeros(20)
    assert hill_alpha_of(weight, name="q_proj", folder=tmp_path) == hill_alpha(eigenvalues(weight))


@pytest.mark.parametrize(
    ("weight", "message"),
    [(torch.ones(4, 4), "has no tail to fit"), (torch.full((4, 4), float("nan")), "holds NaN or Inf")],
)
def test_linear_without_an_exponent_is_named(weight: torch.Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(OwlDeployError, match=rf"layers\.3\.q_proj: .*{message}"):
        hill_alpha_of(weight, name="layers.3.q_proj", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
