"""Mean-phase slots: exact with all slots, and the best constant in place of a lost rotation."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from care.attention import latent_attention, source_attention
from care.errors import InvalidRecipe
from care.factorization import TwoSided, factorize
from care.rope_split import MeanPhase
from care.rope_split.mean_phase import mean_phases
from care.types import AttentionSpec, LayerRanks
from tiny import LayerSize, random_inputs, random_layer, stats_of
from tolerances import assert_close, assert_numbers

SIZE = LayerSize(H=6, G=3, K=8, D=40)
PAIRS = SIZE.G * SIZE.K // 2


def spec() -> AttentionSpec:
    """The facts of the layer."""
    return AttentionSpec(1, SIZE.D, SIZE.H, SIZE.G, SIZE.K, (random_layer(SIZE).rope_frequencies,), SIZE.K**-0.5)


def test_all_slots_are_the_source() -> None:
    weights, x_TD = random_layer(SIZE), random_inputs(90, SIZE.D)
    stats = stats_of(x_TD, SIZE)
    split = MeanPhase()(weights, stats).split(PAIRS)
    latent = factorize(TwoSided(), weights, split, stats, LayerRanks(2 * PAIRS, 0, 24, joint=True)).latent
    assert_close(latent_attention(latent, x_TD[:15], ()), source_attention(weights, x_TD[:15]), "fp64")


def test_heads_that_look_at_their_own_token_lose_no_rotation() -> None:
    """z = 1 everywhere: no slot is worth anything, and queries are left as they are."""
    stats = replace(stats_of(random_inputs(90, SIZE.D), SIZE), attention_HT=torch.eye(1, 9).double().expand(6, -1))
    slots = MeanPhase()(random_layer(SIZE), stats)
    assert slots.loss is not None
    assert slots.q_nope_HNK is not None
    assert_close(slots.loss, torch.zeros(PAIRS + 1, dtype=torch.float64), "fp64")
    assert_close(slots.q_nope_HNK, torch.eye(8, dtype=torch.float64).expand(6, -1, -1), "fp64")


def test_mean_phase_is_the_best_constant() -> None:
    """Of all complex constants it has the least attention-weighted square error to the rotation."""
    stats = stats_of(random_inputs(90, SIZE.D), SIZE)
    assert stats.attention_HT is not None
    frequencies = random_layer(SIZE).rope_frequencies
    z_HF = mean_phases(stats.attention_HT, frequencies)
    distance_T = torch.arange(40, dtype=torch.float64)
    turn_TF = torch.exp(-1j * distance_T[:, None] * torch.tensor(frequencies, dtype=torch.float64))
    weights_HT1 = stats.attention_HT[:, :, None]

    def error(constant_HF: torch.Tensor) -> torch.Tensor:
        return (weights_HT1 * (turn_TF - constant_HF[:, None]).abs().square()).sum(1)

    assert_close(error(z_HF), 1 - z_HF.abs().square(), "fp64")
    for step in (0.01, -0.01, 0.01j, -0.01j):
        assert bool((error(z_HF + step) > error(z_HF)).all())


def test_queries_turn_by_the_mean_phase() -> None:
    """One head, one pair: the no-rope score is Re(conj(q) z k)."""
    stats = stats_of(random_inputs(90, SIZE.D), SIZE)
    assert stats.attention_HT is not None
    slots = MeanPhase()(random_layer(SIZE), stats)
    assert slots.q_nope_HNK is not None
    z_HF = mean_phases(stats.attention_HT, random_layer(SIZE).rope_frequencies)
    q, k = (torch.randn(SIZE.K, dtype=torch.float64) for _ in range(2))
    half = SIZE.K // 2
    as_complex = [torch.complex(v[:half], v[half:]) for v in (q, k)]
    for head in range(SIZE.H):
        expected = float((as_complex[0].conj() * z_HF[head] * as_complex[1]).sum().real)
        assert_numbers(float(slots.q_nope_HNK[head] @ q @ k), expected, "fp64")


def test_slots_rotate_as_the_keys_do() -> None:
    """The dual basis commutes with the rotation of every pair, or slots would not be slots."""
    slots = MeanPhase()(random_layer(SIZE), stats_of(random_inputs(90, SIZE.D), SIZE))
    angles = 0.7 * torch.tensor(random_layer(SIZE).rope_frequencies, dtype=torch.float64)
    turn_KK = torch.cat(
        (
            torch.cat((angles.cos().diag(), -angles.sin().diag()), 1),
            torch.cat((angles.sin().diag(), angles.cos().diag()), 1),
        )
    )
    turned_keys = torch.block_diag(*[turn_KK] * SIZE.G) @ slots.up_ES
    slot_angles = 0.7 * torch.tensor(slots.frequencies, dtype=torch.float64)
    blocks = [torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]], dtype=torch.float64) for a in slot_angles]
    assert_close(turned_keys, slots.up_ES @ torch.block_diag(*blocks), "fp64")


def test_more_slots_lose_less_and_by_less_each_time() -> None:
    loss = MeanPhase()(random_layer(SIZE), stats_of(random_inputs(90, SIZE.D), SIZE)).loss
    assert loss is not None
    gains = [float(a - b) for a, b in pairwise(loss)]
    assert len(loss) == PAIRS + 1
    assert loss[-1] == 0
    assert min(gains) > 0
    assert all(a >= b for a, b in pairwise(gains))


@pytest.mark.parametrize("dims", [2, 6, 8])
def test_one_slot_per_frequency_is_a_table_of_the_fastest(dims: int) -> None:
    split = MeanPhase(dims=dims, one_per_frequency=True)
    keys = split(random_layer(SIZE), stats_of(random_inputs(90, SIZE.D), SIZE)).split(dims // 2)
    assert keys.rope is not None
    assert keys.rope.frequencies == split.frequencies(spec()) == random_layer(SIZE).rope_frequencies[: dims // 2]


def test_impossible_dims_are_refused() -> None:
    bad: tuple[dict[str, Any], ...] = ({"dims": 3}, {"dims": -2})
    for options in bad:
        with pytest.raises(InvalidRecipe, match=r"rope\."):
            MeanPhase(**options)
    with pytest.raises(InvalidRecipe, match="at most 24"):
        MeanPhase(dims=26).num_slots(spec())
    with pytest.raises(InvalidRecipe, match="at most 8"):
        MeanPhase(dims=10, one_per_frequency=True).num_slots(spec())
    with pytest.raises(ValueError, match="attention distances"):
        MeanPhase()(random_layer(SIZE), stats_of(random_inputs(9, SIZE.D)))
