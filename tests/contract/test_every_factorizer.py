"""What every factorization method must do: exact at full rank, optimal in its own metric below it."""

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from care.attention import latent_attention, source_attention
from care.factorization import FACTORIZERS, Factorizer, Svd, Whitened, factorize, layer_energies
from care.factorization.base import Targets
from care.recipe import load_recipe, recipe_names
from care.rope_split import KeepAll, RoRope, whole_keys
from care.types import AttentionWeights, KeySplit, LatentAttention, LayerRanks, LayerStats
from tiny import LayerSize, random_inputs, random_layer, stats_of
from tolerances import TOLERANCES, VISIBLE, assert_close, assert_numbers

NUM_INPUTS = 60
LATENTS = {"separate": {"joint": False}, "joint": {"joint": True}, "balanced": {"joint": True, "balanced": True}}
METHODS = [
    *(
        pytest.param(kind(**options), id=f"{name}-{latent}")
        for name, kind in FACTORIZERS.items()
        for latent, options in LATENTS.items()
        if options.keys() <= {f.name for f in fields(cast("Any", kind))}
    ),
    *(pytest.param(load_recipe(name).factorization, id=name) for name in recipe_names()),
]
SIZES = st.builds(
    lambda G, group, pairs, D: LayerSize(G * group, G, 2 * pairs, D),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(2, 8),
)  # fmt: skip


def ranks_of(method: Factorizer, split: KeySplit, key_rank: int, value_rank: int) -> LayerRanks:
    """Ranks as the conversion would give them; a joint latent has `value_rank`."""
    rope_dim = 2 * len(split.rope.frequencies) if split.rope else 0
    key_rank = (value_rank if len(split.rest_MX) else 0) if method.joint else key_rank
    return LayerRanks(rope_dim, key_rank, value_rank, method.joint)


def full_ranks(method: Factorizer, split: KeySplit, weights: AttentionWeights) -> LayerRanks:
    """Every direction that keys and values can have."""
    D = weights.q_HKD.shape[2]
    keys, values = len(split.rest_MX), weights.v_GKX.shape[0] * weights.v_GKX.shape[1]
    return ranks_of(method, split, min(keys, D), min(keys + values if method.joint else values, D))


def approximations(latent: LatentAttention) -> tuple[Tensor, Tensor]:
    """The maps from input to no-rope keys and to values that a latent layer carries out."""
    keys = latent.k_up_GNR.flatten(0, 1) @ latent.kv_down_RX[: latent.k_rank]
    values = latent.v_up_GVR.flatten(0, 1) @ latent.kv_down_RX[len(latent.kv_down_RX) - latent.v_rank :]
    return keys, values


def energy(error_MD: Tensor, metric_DD: Tensor | None, output_MM: Tensor | None = None) -> float:
    """Mean square of a map's outputs, weighted: tr(T E C E^T)."""
    metric_DD = torch.eye(error_MD.shape[1], dtype=torch.float64) if metric_DD is None else metric_DD
    output_MM = torch.eye(error_MD.shape[0], dtype=torch.float64) if output_MM is None else output_MM
    return float(torch.einsum("mn,nd,de,me->", output_MM, error_MD, metric_DD, error_MD))


@dataclass(frozen=True)
class Block:
    """One map that a method approximates in one latent, with its metrics."""

    whole_MD: Tensor
    kept_MD: Tensor
    metric_DD: Tensor | None
    output_MM: Tensor | None

    def error(self) -> float:
        """What is lost, measured."""
        return energy(self.whole_MD - self.kept_MD, self.metric_DD, self.output_MM)

    def singular_values(self) -> Tensor:
        """By an SVD of the map, whitened on both sides."""
        roots = [
            torch.eye(size, dtype=torch.float64) if metric is None else whitening(metric)
            for size, metric in zip(self.whole_MD.shape, (self.output_MM, self.metric_DD), strict=True)
        ]
        return torch.linalg.svdvals(roots[0] @ self.whole_MD @ roots[1])


def blocks_of(
    method: Factorizer, weights: AttentionWeights, split: KeySplit, stats: LayerStats, latent: LatentAttention
) -> list[Block]:
    """The maps of a layer and their approximations: one stacked map if the latent is joint, else two."""
    keys, values = split.rest_MX, weights.v_GKX.flatten(0, 1)
    metric_DD = method.metric(stats)
    output_MM = method.output_metric(Targets(keys, values, split.error_EM, metric_DD), stats)
    kept_keys, kept_values = approximations(latent)
    if method.joint:
        return [Block(torch.cat((keys, values)), torch.cat((kept_keys, kept_values)), metric_DD, output_MM)]
    M = len(keys)
    parts = (None, None) if output_MM is None else (output_MM[:M, :M], output_MM[M:, M:])
    return [Block(keys, kept_keys, metric_DD, parts[0]), Block(values, kept_values, metric_DD, parts[1])]


def whitening(metric_DD: Tensor) -> Tensor:
    """A square root of the metric."""
    energies, directions = torch.linalg.eigh(metric_DD)
    return directions * energies.clamp(min=0).sqrt() @ directions.T


@pytest.mark.parametrize("method", METHODS)
@given(size=SIZES, seed=st.integers(0, 99))
def test_rebuilt_keys_are_exact_at_full_rank(method: Factorizer, size: LayerSize, seed: int) -> None:
    weights, x_TD = random_layer(size, seed), random_inputs(NUM_INPUTS, size.D, seed)
    split = whole_keys(weights)
    latent = factorize(method, weights, split, stats_of(x_TD, size), full_ranks(method, split, weights)).latent
    result = latent_attention(latent, x_TD[:7], weights.rope_frequencies)
    assert_close(result, source_attention(weights, x_TD[:7]), "fp64")


@pytest.mark.parametrize("method", METHODS)
@given(size=SIZES, seed=st.integers(0, 99))
def test_absorbed_is_exact_at_full_rank_with_every_pair_kept(method: Factorizer, size: LayerSize, seed: int) -> None:
    weights, x_TD = random_layer(size, seed), random_inputs(NUM_INPUTS, size.D, seed)
    split = KeepAll()(weights, None).split(size.G * size.K // 2)
    factors = factorize(method, weights, split, stats_of(x_TD, size), full_ranks(method, split, weights))
    assert factors.latent.mode == "absorbed"
    result = latent_attention(factors.latent, x_TD[:7], ())
    assert_close(result, source_attention(weights, x_TD[:7]), "fp64")


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_exact_beyond_what_calibration_saw(method: Factorizer) -> None:
    """Five inputs leave most of C singular; other inputs must not notice at full rank."""
    size = LayerSize(H=4, G=4, K=6, D=20)
    weights, x_TD = random_layer(size), random_inputs(NUM_INPUTS, size.D)
    split = whole_keys(weights)
    latent = factorize(method, weights, split, stats_of(x_TD[:5], size), full_ranks(method, split, weights)).latent
    result = latent_attention(latent, x_TD[5:], weights.rope_frequencies)
    assert_close(result, source_attention(weights, x_TD[5:]), "fp64")


@pytest.mark.parametrize("method", METHODS)
def test_below_full_rank_is_not_exact(method: Factorizer) -> None:
    """The two tests above would pass for a method that ignores its ranks."""
    size = LayerSize()
    weights, x_TD = random_layer(size), random_inputs(NUM_INPUTS, size.D)
    split = whole_keys(weights)
    factors = factorize(method, weights, split, stats_of(x_TD, size), ranks_of(method, split, 2, 2))
    difference = latent_attention(factors.latent, x_TD, weights.rope_frequencies) - source_attention(weights, x_TD)
    assert difference.abs().max() > VISIBLE
    assert factors.latent.width == (2 if method.joint else 4)


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_does_not_depend_on_the_method(method: Factorizer) -> None:
    """With some rotations lost, what remains is the same for all methods."""
    size = LayerSize(H=4, G=2, K=8, D=40)
    weights, x_TD = random_layer(size), random_inputs(400, size.D)
    stats = stats_of(x_TD, size)
    split = RoRope(dims=8)(weights, stats).split(4)
    plain, other = (
        factorize(m, weights, split, stats, full_ranks(m, split, weights)).latent for m in (Svd(), method)
    )  # fmt: skip
    assert_close(latent_attention(other, x_TD[:9], ()), latent_attention(plain, x_TD[:9], ()), "fp64")


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_error_is_the_discarded_spectrum(method: Factorizer, data: st.DataObject) -> None:
    """Eckart-Young, with the spectrum from an SVD of the whitened maps."""
    size = LayerSize(H=4, G=2, K=4, D=10)
    weights = random_layer(size, data.draw(st.integers(0, 99)))
    stats = stats_of(random_inputs(NUM_INPUTS, size.D), size)
    split = whole_keys(weights)
    ranks = ranks_of(method, split, data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8)))
    latent = factorize(method, weights, split, stats, ranks).latent
    wanted = [ranks.value_rank] if method.joint else [ranks.key_rank, ranks.value_rank]
    for block, rank in zip(blocks_of(method, weights, split, stats, latent), wanted, strict=True):
        energy_S = block.singular_values().square()
        total = float(energy_S.sum())
        assert_numbers(block.error() / total, float(energy_S[rank:].sum()) / total, "fp64")


@pytest.mark.parametrize("method", METHODS)
def test_reported_errors_are_measured_errors(method: Factorizer) -> None:
    size = LayerSize()
    weights, stats = random_layer(size), stats_of(random_inputs(NUM_INPUTS, size.D), size)
    split = whole_keys(weights)
    factors = factorize(method, weights, split, stats, ranks_of(method, split, 5, 5))
    metric_DD = method.metric(stats)
    exact = (split.rest_MX, weights.v_GKX.flatten(0, 1))
    for whole, kept, said in zip(
        exact, approximations(factors.latent), (factors.keys.error, factors.values.error), strict=True
    ):
        relative = (energy(whole - kept, metric_DD) / energy(whole, metric_DD)) ** 0.5
        assert_numbers(said, relative, "fp64")


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 99))
def test_error_never_grows_with_rank(method: Factorizer, seed: int) -> None:
    """Of the stacked map when the latent is joint: one side alone may lose to the other."""
    size = LayerSize(H=2, G=2, K=2, D=7)
    weights, stats = random_layer(size, seed), stats_of(random_inputs(NUM_INPUTS, size.D, seed), size, seed)
    split = whole_keys(weights)
    errors = []
    for rank in range(1, 5):
        latent = factorize(method, weights, split, stats, ranks_of(method, split, rank, rank)).latent
        errors.append([block.error() for block in blocks_of(method, weights, split, stats, latent)])
    for before, after in pairwise(errors):
        assert all(b >= a - TOLERANCES["fp64"].absolute for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_spectra_are_those_of_the_whitened_maps(method: Factorizer) -> None:
    size = LayerSize()
    weights, stats = random_layer(size), stats_of(random_inputs(NUM_INPUTS, size.D), size)
    split = whole_keys(weights)
    latent = factorize(method, weights, split, stats, ranks_of(method, split, 1, 1)).latent
    blocks = blocks_of(method, weights, split, stats, latent)
    for found_S, block in zip(layer_energies(method, weights, split, stats), blocks, strict=True):
        assert bool((found_S.diff() <= 0).all())
        energy_S = block.singular_values().square()
        assert_close(found_S / energy_S.sum(), energy_S / energy_S.sum(), "fp64")


@pytest.mark.parametrize("method", METHODS)
def test_order_of_heads_does_not_matter(method: Factorizer) -> None:
    """Permuting the key heads, each with its queries, permutes nothing that the layer computes."""
    size = LayerSize(H=6, G=3, K=4, D=16)
    weights, x_TD = random_layer(size), random_inputs(NUM_INPUTS, size.D)
    heads = torch.tensor([4, 5, 0, 1, 2, 3])
    moved = AttentionWeights(
        weights.q_HKD[heads], weights.k_GKX[[2, 0, 1]], weights.v_GKX[[2, 0, 1]], weights.out_DHK[:, heads],
        weights.rope_frequencies, weights.scale,
    )  # fmt: skip
    stats = stats_of(x_TD, size)
    assert stats.gradient_moment_EE is not None
    order = torch.arange(24).view(2, 3, 4)[:, [2, 0, 1]].flatten()
    moved_stats = replace(stats, gradient_moment_EE=stats.gradient_moment_EE[order][:, order])
    results = []
    for layer, layer_stats in ((weights, stats), (moved, moved_stats)):
        split = whole_keys(layer)
        latent = factorize(method, layer, split, layer_stats, ranks_of(method, split, 5, 7)).latent
        results.append(latent_attention(latent, x_TD[:9], layer.rope_frequencies))
    assert_close(results[1], results[0], "fp64")


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_beyond_the_map_is_refused(method: Factorizer) -> None:
    size = LayerSize(D=5)
    weights, stats = random_layer(size), stats_of(random_inputs(NUM_INPUTS, size.D), size)
    split = whole_keys(weights)
    factorize(method, weights, split, stats, ranks_of(method, split, 5, 5))
    with pytest.raises(ValueError, match="rank 6"):
        factorize(method, weights, split, stats, ranks_of(method, split, 6, 6))


@given(size=SIZES, seed=st.integers(0, 99), shrinkage=st.sampled_from([0.0, 0.01]))
def test_whitened_never_loses_to_plain_svd(size: LayerSize, seed: int, shrinkage: float) -> None:
    """care-u against palu at every rank, in the activations' metric with care-u's shrinkage."""
    weights, stats = random_layer(size, seed), stats_of(random_inputs(NUM_INPUTS, size.D, seed), size, seed)
    split, whitened = whole_keys(weights), Whitened(shrinkage=shrinkage)
    metric_DD = whitened.metric(stats)
    exact = (split.rest_MX, weights.v_GKX.flatten(0, 1))
    for rank in range(1, min(size.G * size.K, size.D) + 1):
        ranks = LayerRanks(0, rank, rank, joint=False)
        pairs = [approximations(factorize(m, weights, split, stats, ranks).latent) for m in (whitened, Svd())]
        for whole, ours, plain in zip(exact, *pairs, strict=True):
            slack = TOLERANCES["fp64"].absolute * energy(whole, metric_DD)
            assert energy(whole - ours, metric_DD) <= energy(whole - plain, metric_DD) + slack
