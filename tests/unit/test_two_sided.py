"""Two-sided weighting, against the quadratic form that it minimizes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from care.errors import InvalidRecipe
from care.factorization import TwoSided, Whitened, factorize
from care.rope_split import whole_keys
from care.types import LatentAttention, LayerRanks, LayerStats
from tiny import LayerSize, random_inputs, random_layer, stats_of
from tolerances import assert_close, assert_numbers

SIZE = LayerSize(H=4, G=2, K=4, D=18)
RANKS = (1, 4, 9, 15)


def quadratic_loss(latent: LatentAttention, stats: LayerStats) -> float:
    """E[(g . (W - W') x)^2] over independent x and g with the moments in `stats`, from the matrices themselves."""
    weights = random_layer(SIZE)
    whole = torch.cat((weights.k_GKX.flatten(0, 1), weights.v_GKX.flatten(0, 1)))
    kept = torch.cat((latent.k_up_GNR.flatten(0, 1), latent.v_up_GVR.flatten(0, 1))) @ latent.kv_down_RX
    assert stats.gradient_moment_EE is not None
    lost = whole - kept
    return float((lost @ stats.input_moment_XX @ lost.T * stats.gradient_moment_EE).sum())


def converted(method: TwoSided | Whitened, stats: LayerStats, rank: int) -> LatentAttention:
    """The layer with one joint latent."""
    weights = random_layer(SIZE)
    return factorize(method, weights, whole_keys(weights), stats, LayerRanks(0, rank, rank, joint=True)).latent


@pytest.mark.parametrize("rank", RANKS)
def test_no_other_method_has_less_loss(rank: int) -> None:
    """Not the one-sided optimum, and not the optimum moved a little in any of 20 random directions."""
    stats = stats_of(random_inputs(90, SIZE.D), SIZE)
    best = converted(TwoSided(0.0, 0.0), stats, rank)
    least = quadratic_loss(best, stats)
    assert least < quadratic_loss(converted(Whitened(0.0, joint=True), stats, rank), stats)
    for _ in range(20):
        moved = replace(best, kv_down_RX=best.kv_down_RX + 1e-3 * torch.randn_like(best.kv_down_RX))
        assert quadratic_loss(moved, stats) > least


def test_gradients_of_one_size_in_all_directions_are_no_second_side() -> None:
    stats = stats_of(random_inputs(90, SIZE.D), SIZE)
    same = replace(stats, gradient_moment_EE=3.0 * torch.eye(2 * SIZE.G * SIZE.K, dtype=torch.float64))
    two, one = (converted(m, same, 5) for m in (TwoSided(0.01, 0.01), Whitened(0.01, joint=True)))
    assert_close(two.k_up_GNR @ two.kv_down_RX, one.k_up_GNR @ one.kv_down_RX, "fp64")
    assert_close(two.v_up_GVR @ two.kv_down_RX, one.v_up_GVR @ one.kv_down_RX, "fp64")


def test_keys_and_values_are_shrunk_apart() -> None:
    weights, stats = random_layer(SIZE), stats_of(random_inputs(90, SIZE.D), SIZE)
    E = SIZE.G * SIZE.K
    assert stats.gradient_moment_EE is not None
    scale = torch.ones(2 * E, dtype=torch.float64)
    scale[:E] = 1e-4
    lopsided = replace(stats, gradient_moment_EE=scale[:, None] * stats.gradient_moment_EE * scale)
    split = whole_keys(weights)
    found = _output_metric(TwoSided(0.0, 0.5), lopsided, split.error_EM)
    keys = lopsided.gradient_moment_EE[:E, :E] if lopsided.gradient_moment_EE is not None else found
    expected = 0.5 * keys + 0.5 * keys.diagonal().mean() * torch.eye(E, dtype=torch.float64)
    assert_numbers(float((found[:E, :E] - expected).abs().max() / expected.abs().max()), 0.0, "fp64")


def _output_metric(method: TwoSided, stats: LayerStats, error_EM: Tensor) -> Tensor:
    from care.factorization.base import Targets

    weights = random_layer(SIZE)
    keys, values = weights.k_GKX.flatten(0, 1), weights.v_GKX.flatten(0, 1)
    metric = method.output_metric(Targets(keys, values, error_EM, None), stats)
    assert metric is not None
    return metric


def test_missing_statistics_and_impossible_shrinkage_are_refused() -> None:
    stats = stats_of(random_inputs(90, SIZE.D))
    with pytest.raises(ValueError, match="gradient moments"):
        converted(TwoSided(), stats, 3)
    bad: tuple[dict[str, Any], ...] = ({"shrinkage": 1.5}, {"gradient_shrinkage": -0.1})
    for options in bad:
        with pytest.raises(InvalidRecipe, match="must lie in"):
            TwoSided(**options)
