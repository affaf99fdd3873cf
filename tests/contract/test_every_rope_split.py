"""What every rope split must do: promise its slots in advance, lose nothing of the keys but rotations."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from care.attention import latent_attention, source_attention
from care.errors import InvalidRecipe
from care.factorization import Svd, factorize
from care.recipe import load_recipe
from care.rope_split import ROPE_SPLITS, KeepAll, MeanPhase, RopeSplit, RoRope, Slots
from care.types import AttentionSpec, KeySplit, LayerRanks
from tiny import LayerSize, random_inputs, random_layer, stats_of
from tolerances import VISIBLE, assert_close

SIZE = LayerSize(H=4, G=2, K=8, D=40)
EVERY = pytest.mark.parametrize(
    "split",
    [
        *(pytest.param(kind(), id=name) for name, kind in ROPE_SPLITS.items()),
        pytest.param(MeanPhase(dims=4, one_per_frequency=True), id="mean-phase-one-per-frequency"),
        pytest.param(RoRope(dims=8, folding=4), id="rorope-folded"),
        pytest.param(RoRope(dims=4, folding=2), id="rorope-collapsed"),
        pytest.param(RoRope(dims=2, folding=4), id="rorope-one-slot"),
    ],
)


def spec_of(size: LayerSize, frequencies: tuple[float, ...]) -> AttentionSpec:
    """The facts that a split is asked about before weights are read."""
    return AttentionSpec(1, size.D, size.H, size.G, size.K, (frequencies,), size.K**-0.5)


def split_keys(split: RopeSplit, size: LayerSize) -> tuple[KeySplit, Slots]:
    """A random layer whose heads look at their own token only, split; three slots where none are promised."""
    weights = random_layer(size)
    stats = stats_of(random_inputs(300, size.D), size)
    attention_HT = torch.eye(1, 40, dtype=torch.float64).expand(size.H, -1)
    slots = split(weights, replace(stats, attention_HT=attention_HT))
    return slots.split(split.num_slots(spec_of(size, weights.rope_frequencies)) or 3), slots


@EVERY
def test_slots_are_those_promised(split: RopeSplit) -> None:
    weights = random_layer(SIZE)
    keys, _ = split_keys(split, SIZE)
    assert keys.rope is not None
    promised = split.frequencies(spec_of(SIZE, weights.rope_frequencies))
    assert promised is None or keys.rope.frequencies == promised
    assert list(keys.rope.frequencies) == sorted(keys.rope.frequencies, reverse=True) or isinstance(split, KeepAll)
    assert len(keys.rope.k_rope_PX) == 2 * len(keys.rope.frequencies)
    assert len(keys.rope.k_rope_PX) + len(keys.rest_MX) == SIZE.G * SIZE.K


@EVERY
def test_slots_and_rest_are_a_basis_of_the_keys_and_its_dual(split: RopeSplit) -> None:
    """Then every key is found again in slots and rest."""
    _, slots = split_keys(split, SIZE)
    assert_close(slots.up_ES @ slots.down_ES.T, torch.eye(SIZE.G * SIZE.K, dtype=torch.float64), "fp64")


@EVERY
def test_scores_at_one_position_are_the_sources(split: RopeSplit) -> None:
    """Where query and key stand together, no rotation can be missed."""
    weights, x_TD = random_layer(SIZE), random_inputs(5, SIZE.D)
    keys, _ = split_keys(split, SIZE)
    assert keys.rope is not None
    q_HTK = torch.einsum("hkd,td->htk", weights.q_HKD, x_TD)
    k_HTK = torch.einsum("gkd,td->gtk", weights.k_GKX, x_TD).repeat_interleave(SIZE.H // SIZE.G, 0)
    scores_HTU = torch.einsum("htk,huk->htu", q_HTK, k_HTK)
    rope_HTU = torch.einsum("hpk,htk,pd,ud->htu", keys.rope.q_rope_HPK, q_HTK, keys.rope.k_rope_PX, x_TD)
    expand_HNM = keys.expand_GNM.repeat_interleave(SIZE.H // SIZE.G, 0)
    q_nope_HTN = torch.einsum("hnk,htk->htn", keys.rope.q_nope_HNK, q_HTK)
    nope_HTU = torch.einsum("htn,hnm,md,ud->htu", q_nope_HTN, expand_HNM, keys.rest_MX, x_TD)
    assert_close(rope_HTU + nope_HTU, scores_HTU, "fp64")


def full_rank(split: RopeSplit, size: LayerSize, x_TD: Tensor) -> Tensor:
    """Attention after the split, with the latent at full rank."""
    weights, stats = random_layer(size), stats_of(x_TD)
    keys = split(weights, stats).split(split.num_slots(spec_of(size, weights.rope_frequencies)) or 0)
    rope_dim = 2 * len(keys.rope.frequencies) if keys.rope else 0
    ranks = LayerRanks(rope_dim, len(keys.rest_MX), size.G * size.K, joint=False)
    return latent_attention(factorize(Svd(), weights, keys, stats, ranks).latent, x_TD[:12], ())


def test_keep_all_is_exact() -> None:
    x_TD = random_inputs(60, SIZE.D)
    assert_close(full_rank(KeepAll(), SIZE, x_TD), source_attention(random_layer(SIZE), x_TD[:12]), "fp64")


def test_rorope_is_exact_for_one_key_head() -> None:
    size = LayerSize(H=4, G=1, K=8, D=20)
    x_TD = random_inputs(60, size.D)
    assert_close(full_rank(RoRope(dims=8), size, x_TD), source_attention(random_layer(size), x_TD[:12]), "fp64")


def test_rorope_loses_something_with_two_key_heads() -> None:
    """The test above has nothing to lose."""
    x_TD = random_inputs(60, SIZE.D)
    difference = full_rank(RoRope(dims=8), SIZE, x_TD) - source_attention(random_layer(SIZE), x_TD[:12])
    assert difference.abs().max() > VISIBLE


@pytest.mark.parametrize(
    ("pairs", "dims", "slots"), [(32, 64, 32), (32, 63, 16), (32, 32, 16), (4, 64, 4), (4, 8, 4), (4, 2, 1), (6, 8, 3)]
)
def test_rorope_takes_every_collapseth_frequency(pairs: int, dims: int, slots: int) -> None:
    """As many slots as divide the pairs and fit the dims, from the fastest on."""
    table = tuple(100.0 ** (-m / pairs) for m in range(pairs))
    frequencies = RoRope(dims=dims, folding="auto").frequencies(spec_of(LayerSize(K=2 * pairs), table))
    assert frequencies == tuple(table[m * pairs // slots] for m in range(slots))


@pytest.mark.parametrize("folding", [1, 2, 4])
def test_folding_changes_the_mixture_but_not_the_number_of_slots(folding: int) -> None:
    keys, _ = split_keys(RoRope(dims=8, folding=folding), SIZE)
    assert keys.rope is not None
    assert keys.rope.frequencies == random_layer(SIZE).rope_frequencies


def test_foldings_that_cannot_be_are_refused() -> None:
    spec = spec_of(SIZE, random_layer(SIZE).rope_frequencies)
    with pytest.raises(InvalidRecipe, match=r"folding is 3.*one of 1, 2, 4"):
        RoRope(dims=8, folding=3).frequencies(spec)
    with pytest.raises(InvalidRecipe, match=r"folding is 1.*one of 2, 4"):
        RoRope(dims=4, folding=1).frequencies(spec)
    with pytest.raises(InvalidRecipe, match="at least 2"):
        RoRope(dims=1).frequencies(spec)


@pytest.mark.parametrize("pairs", [4, 6, 16, 32, 48, 64, 128])
def test_the_default_split_fits_every_head(pairs: int) -> None:
    """What a recipe without a rope section gets in absorbed mode."""
    size = LayerSize(K=2 * pairs)
    table = tuple(100.0 ** (-m / pairs) for m in range(pairs))
    frequencies = load_recipe("palu", mode="absorbed").rope.frequencies(spec_of(size, table))
    assert frequencies is not None
    assert 2 * len(frequencies) <= 64
    assert pairs % len(frequencies) == 0
