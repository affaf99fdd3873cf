"""Low rank in a metric, against SVDs."""

import pytest
import torch

from care.linalg import output_moment, principal_outputs, shrink
from tiny import random_inputs
from tolerances import assert_close, assert_numbers

M, D = 7, 12


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A map and inputs."""
    return torch.randn(M, D, dtype=torch.float64), random_inputs(200, D)


def test_output_moment_is_the_moment_of_outputs() -> None:
    weight_MD, x_TD = problem()
    outputs_TM = x_TD @ weight_MD.T
    moment_DD = x_TD.T @ x_TD / len(x_TD)
    assert_close(output_moment(weight_MD, moment_DD), outputs_TM.T @ outputs_TM / len(x_TD), "fp64")
    assert_close(output_moment(weight_MD, None), weight_MD @ weight_MD.T, "fp64")


def test_output_moment_is_fp64_and_symmetric() -> None:
    moment_MM = output_moment(torch.randn(M, D), None)
    assert moment_MM.dtype == torch.float64
    assert torch.equal(moment_MM, moment_MM.T)


@pytest.mark.parametrize("shape", [(7, 12), (12, 12), (19, 12)])
@pytest.mark.parametrize("weighted", [True, False])
def test_principal_outputs_are_the_svd(shape: tuple[int, int], weighted: bool) -> None:
    """Of W, or of W C^(1/2); never more directions than the map can have."""
    weight_MD, x_TD = torch.randn(*shape, dtype=torch.float64), random_inputs(200, shape[1])
    moment_DD = x_TD.T @ x_TD / len(x_TD)
    energies, directions = torch.linalg.eigh(moment_DD)
    root_DD = directions * energies.sqrt() @ directions.T
    left_MS, singular_S, _ = torch.linalg.svd(weight_MD @ root_DD if weighted else weight_MD, full_matrices=False)
    found = principal_outputs(weight_MD, moment_DD if weighted else None)
    assert_close(found.energy_S, singular_S**2, "fp64")
    overlap_SS = (found.basis_MS.T @ left_MS).abs()
    assert_close(overlap_SS, torch.eye(min(shape), dtype=torch.float64), "fp64 directions")


def test_principal_outputs_are_within_reach_where_the_metric_is_singular() -> None:
    """Directions of zero energy too: an orthonormal basis of the map's range."""
    weight_MD, x_TD = torch.randn(19, 12, dtype=torch.float64), random_inputs(3, 12)
    found = principal_outputs(weight_MD, x_TD.T @ x_TD)
    assert bool((found.energy_S >= 0).all())
    assert_close(found.basis_MS.T @ found.basis_MS, torch.eye(12, dtype=torch.float64), "fp64")
    assert_close(found.basis_MS @ found.basis_MS.T @ weight_MD, weight_MD, "fp64")


def test_tail_is_what_a_rank_leaves_out() -> None:
    weight_MD, _ = problem()
    found = principal_outputs(weight_MD, None)
    singular_M = torch.linalg.svdvals(weight_MD)
    for rank in range(M + 1):
        assert_numbers(found.tail(rank), float(singular_M[rank:].square().sum()), "fp64")


def test_shrink_is_the_documented_blend() -> None:
    _, x_TD = problem()
    moment_DD = x_TD.T @ x_TD
    mean = moment_DD.trace() / D
    assert torch.equal(shrink(moment_DD, 0.0), moment_DD)
    assert_close(shrink(moment_DD, 1.0), mean * torch.eye(D, dtype=torch.float64), "fp64")
    expected_DD = 0.99 * moment_DD + 0.01 * mean * torch.eye(D, dtype=torch.float64)
    assert_close(shrink(moment_DD, 0.01), expected_DD, "fp64")
