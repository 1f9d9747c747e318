"""The damped inverse of a Hessian: worked values, a float64 inverse, dead inputs, and damping that had to be raised."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from pruning_problems import SEQUENCES, Problem, given_hessian, hessian_of, problems
from slow_sweep import slow_damped

from owl_deploy.errors import OwlDeployError
from owl_deploy.methods.inverse_hessian import invert
from owl_deploy.statistics import Hessian

QUICK = settings(derandomize=True, deadline=None, max_examples=60)


def test_hessian_of_the_worked_example() -> None:
    matrix = hessian_of(SEQUENCES).matrix
    assert matrix.diagonal().tolist() == [6, 2, 9, 6, 1.75, 10]
    assert matrix[0].tolist() == [6, -2, 3, 1, 2, 5]


def test_inverse_of_the_worked_example_of_rank_four() -> None:
    found = invert(hessian_of(SEQUENCES), 0.01)
    diagonal_of_u = [2.469017, 1.706637, 0.697239, 0.442435, 0.918044, 0.315316]
    diagonal_of_inverse = [6.096043, 7.745619, 2.587554, 2.673109, 12.50462, 3.660354]
    np.testing.assert_allclose(found.upper.diagonal(), diagonal_of_u, rtol=2e-5)
    np.testing.assert_allclose(found.inverse.diagonal(), diagonal_of_inverse, rtol=2e-5)
    np.testing.assert_allclose(found.damped.diagonal()[:2], [6.0579167, 2.0579167], rtol=1e-6)


def test_factor_of_the_worked_two_by_four() -> None:
    found = invert(given_hessian([[4.0, 1, 0, 0], [1, 3, 1, 0], [0, 1, 2, 0.5], [0, 0, 0.5, 1]]), 0.01)
    expected = [
        [0.525655, -0.213373, 0.119799, -0.058438],
        [0, 0.637117, -0.357711, 0.174493],
        [0, 0, 0.749301, -0.365513],
        [0, 0, 0, 0.987730],
    ]
    np.testing.assert_allclose(found.upper, expected, atol=1e-6)


@QUICK
@given(problem=problems())
def test_factor_squared_is_the_inverse_computed_in_float64(problem: Problem) -> None:
    found = invert(hessian_of(problem.sequences), 0.01)
    damped, dead = slow_damped(problem.sequences, 0.01)
    inverse = np.linalg.inv(damped)
    upper = found.upper.double().numpy()
    tolerance = 1e-4 * np.abs(inverse).max()
    np.testing.assert_allclose(found.damped, damped, rtol=1e-4, atol=1e-5 * np.abs(damped).max())
    np.testing.assert_allclose(upper.T @ upper, inverse, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.inverse, inverse, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(found.dead, dead)
    assert not np.tril(upper, -1).any()
    assert (np.diag(upper) > 0).all()


@QUICK
@given(problem=problems())
def test_row_of_the_factor_is_the_first_row_of_the_inverse_without_the_columns_before(problem: Problem) -> None:
    upper = invert(hessian_of(problem.sequences), 0.01).upper.double().numpy()
    damped, _ = slow_damped(problem.sequences, 0.01)
    for column in range(len(damped)):
        trailing = np.linalg.inv(damped[column:, column:])
        tolerance = 1e-4 * np.abs(trailing).max()
        np.testing.assert_allclose(upper[column, column] * upper[column, column:], trailing[0], rtol=0, atol=tolerance)


def test_dead_inputs_count_as_one_in_the_mean_that_damping_is_a_share_of() -> None:
    found = invert(given_hessian([[4.0, 0, 2], [0, 0, 0], [2, 0, 7]]), 0.1)
    torch.testing.assert_close(found.damped, torch.tensor([[4.4, 0, 2], [0, 1.4, 0], [2, 0, 7.4]]))
    assert found.dead.tolist() == [False, True, False]
    assert found.notes(0.1) == {"n_dead_inputs": 1}


def test_dead_inputs_have_no_part_in_the_updates_of_others() -> None:
    upper = invert(given_hessian([[4.0, 0, 2], [0, 0, 0], [2, 0, 7]]), 0.1).upper
    assert upper[0, 1] == upper[1, 2] == 0


def test_hessian_of_inputs_that_are_all_dead_is_the_identity() -> None:
    found = invert(Hessian(3), 0.01)
    torch.testing.assert_close(found.damped, 1.01 * torch.eye(3))
    assert found.notes(0.01) == {"n_dead_inputs": 3}


def test_nothing_is_noted_where_all_went_as_asked() -> None:
    assert invert(hessian_of(SEQUENCES), 0.01).notes(0.01) == {}


@pytest.mark.parametrize(
    ("off_diagonal", "asked", "used"),
    # The lowest eigenvalue is 1 - off_diagonal, and the damping is added to it.
    [(1.05, 0.01, 0.1), (1.5, 0.01, 1.0), (1.05, 0.3, 0.3), (1.5, 0.3, 1.0)],
)
def test_damping_is_raised_tenfold_up_to_one_and_the_raise_is_noted(
    off_diagonal: float, asked: float, used: float
) -> None:
    found = invert(given_hessian([[1.0, off_diagonal], [off_diagonal, 1]]), asked)
    assert found.dampening == pytest.approx(used)
    assert found.notes(asked) == ({"dampening": found.dampening} if used != asked else {})
    torch.testing.assert_close(
        found.damped, torch.tensor([[1 + used, off_diagonal], [off_diagonal, 1 + used]]), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(found.inverse @ found.damped, torch.eye(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "matrix",
    [
        pytest.param([[1.0, 3], [3, 1]], id="indefinite"),
        pytest.param([[float("nan"), 0], [0, 1]], id="nan"),
        pytest.param([[float("inf"), 0], [0, 1]], id="infinite"),
    ],
)
def test_what_cannot_be_inverted_is_one_error_that_says_what_to_do(matrix: list[list[float]]) -> None:
    expected = r"^a Hessian of 2 inputs cannot be inverted even with dampening 1\.0: use more calibration tokens"
    with pytest.raises(OwlDeployError, match=expected):
        invert(given_hessian(matrix), 0.01)


@pytest.mark.parametrize("dampening", [0.0, -0.01, float("nan")])
def test_damping_must_be_above_zero(dampening: float) -> None:
    with pytest.raises(ValueError, match="dampening must be above 0"):
        invert(hessian_of(SEQUENCES), dampening)


def test_linears_that_share_inputs_share_the_inverse_of_one_damping() -> None:
    hessian = hessian_of(SEQUENCES)
    found = invert(hessian, 0.01)
    assert invert(hessian, 0.01) is found
    assert invert(hessian, 0.1).dampening == 0.1
    assert invert(hessian, 0.01) is found


def test_hessian_is_left_as_it_is() -> None:
    hessian = given_hessian([[4.0, 0, 2], [0, 0, 0], [2, 0, 7]])
    invert(hessian, 0.1)
    assert hessian.matrix.tolist() == [[4, 0, 2], [0, 0, 0], [2, 0, 7]]
