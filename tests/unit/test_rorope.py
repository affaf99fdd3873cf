"""RoRoPE: an orthonormal change of basis per band that keeps the strongest component's rotation."""

import pytest
import torch
from torch import Tensor

from care.attention import latent_attention, source_attention
from care.factorization import Svd, factorize
from care.rope_split import RoRope, Slots
from care.rope_split.rorope import band_components
from care.types import AttentionWeights, LayerRanks
from tiny import LayerSize, random_inputs, random_layer, stats_of
from tolerances import assert_close, assert_numbers

SIZE = LayerSize(H=6, G=3, K=8, D=30)
E = SIZE.G * SIZE.K
OPTIONS = [RoRope(8, 1), RoRope(8, 2), RoRope(8, 4), RoRope(4, 2), RoRope(4, 4), RoRope(2, 4)]


def key_moment(weights: AttentionWeights, x_TD: Tensor) -> Tensor:
    """E[k k^T] over all heads' key dims, from the keys themselves."""
    keys_TE = x_TD @ weights.k_GKX.flatten(0, 1).T
    return keys_TE.T @ keys_TE / len(x_TD)


@pytest.mark.parametrize("split", OPTIONS, ids=str)
def test_slots_and_rest_are_an_orthonormal_basis(split: RoRope) -> None:
    """Read off keys that are the identity: then the maps are the bases themselves."""
    x_TE = random_inputs(90, E)
    weights = AttentionWeights(
        q_HKD=torch.randn(SIZE.H, SIZE.K, E, dtype=torch.float64),
        k_GKX=torch.eye(E, dtype=torch.float64).view(SIZE.G, SIZE.K, E),
        v_GKX=torch.zeros(SIZE.G, SIZE.K, E, dtype=torch.float64),
        out_DHK=torch.zeros(E, SIZE.H, SIZE.K, dtype=torch.float64),
        rope_frequencies=random_layer(SIZE).rope_frequencies, scale=1.0,
    )  # fmt: skip
    keys = split(weights, stats_of(x_TE)).split(4 // split.collapse(SIZE.K // 2))
    assert keys.rope is not None
    basis_EE = torch.cat((keys.rope.k_rope_PX, keys.rest_MX))
    assert_close(basis_EE @ basis_EE.T, torch.eye(E, dtype=torch.float64), "fp64")
    assert keys.rope.k_rope_PX.shape[0] == 8 // split.collapse(SIZE.K // 2)


def test_rotating_every_component_is_the_source() -> None:
    """With folding 1 the mixture of heads changes no score at any distance."""
    weights, x_TD = random_layer(SIZE), random_inputs(90, SIZE.D)
    moment_EE = key_moment(weights, x_TD)
    bands = [band_components(moment_EE, SIZE.G, SIZE.K, torch.tensor([m])) for m in range(SIZE.K // 2)]
    frequencies = tuple(f for f in weights.rope_frequencies for _ in range(SIZE.G))
    basis_ES = torch.cat(bands, 1)
    split = Slots(weights, basis_ES, basis_ES, frequencies).split(E // 2)
    ranks = LayerRanks(E, 0, E, joint=False)
    latent = factorize(Svd(), weights, split, None, ranks).latent
    assert_close(latent_attention(latent, x_TD[:15], ()), source_attention(weights, x_TD[:15]), "fp64")


@pytest.mark.parametrize("m", range(4))
def test_the_kept_component_has_the_most_energy(m: int) -> None:
    """The top singular value of the stacked real and imaginary parts of one frequency, from an SVD of keys."""
    weights, x_TD = random_layer(SIZE), random_inputs(90, SIZE.D)
    k_TGK = torch.einsum("gkd,td->tgk", weights.k_GKX, x_TD)
    stacked = torch.cat((k_TGK[:, :, m], k_TGK[:, :, m + SIZE.K // 2]))
    expected = torch.linalg.svdvals(stacked)[0].square() / len(x_TD)
    keys = RoRope(8, 1)(weights, stats_of(x_TD)).split(4)
    assert keys.rope is not None
    slot_T2 = x_TD @ keys.rope.k_rope_PX[2 * m : 2 * m + 2].T
    assert_numbers(float(slot_T2.square().sum() / len(x_TD)), float(expected), "fp64")


@pytest.mark.parametrize("folding", [2, 4])
def test_folding_keeps_the_strongest_of_its_band(folding: int) -> None:
    """As many as there are frequencies, strongest first, whatever head and frequency they come from."""
    weights, x_TD = random_layer(SIZE), random_inputs(90, SIZE.D)
    k_TGK = torch.einsum("gkd,td->tgk", weights.k_GKX, x_TD)
    keys = RoRope(8, folding)(weights, stats_of(x_TD)).split(4)
    assert keys.rope is not None
    slots = (x_TD @ keys.rope.k_rope_PX.T).square().sum(0).view(-1, 2).sum(1) / len(x_TD)
    half = SIZE.K // 2
    for first in range(0, half, folding):
        real, imag = (k_TGK[:, :, d + first : d + first + folding].flatten(1) for d in (0, half))
        expected = torch.linalg.svdvals(torch.cat((real, imag))).square() / len(x_TD)
        assert_close(slots[first : first + folding], expected[:folding], "fp64")


def test_no_choice_of_heads_keeps_more() -> None:
    """Better than keeping any one head's rotary pairs."""
    weights, x_TD = random_layer(SIZE), random_inputs(90, SIZE.D)
    keys = RoRope(8, 1)(weights, stats_of(x_TD)).split(4)
    assert keys.rope is not None
    kept = float((x_TD @ keys.rope.k_rope_PX.T).square().sum())
    alone = (x_TD @ weights.k_GKX[g].T for g in range(SIZE.G))
    assert all(kept > float(head.square().sum()) for head in alone)


def test_collapse_is_the_smallest_divisor_that_fits() -> None:
    assert [RoRope(dims).collapse(32) for dims in (64, 63, 32, 31, 2)] == [1, 2, 2, 4, 32]
    assert [RoRope(dims).collapse(6) for dims in (12, 8, 5, 3)] == [1, 2, 3, 6]


def test_candidates_are_the_collapse_and_its_doublings() -> None:
    assert RoRope(64).candidates(32) == (1, 2, 4, 8, 16, 32)
    assert RoRope(32).candidates(32) == (2, 4, 8, 16, 32)
    assert RoRope(12).candidates(6) == (1, 2)


def test_an_undecided_folding_does_not_split() -> None:
    weights = random_layer(SIZE)
    with pytest.raises(ValueError, match="folding must be chosen"):
        RoRope(8, "auto")(weights, stats_of(random_inputs(9, SIZE.D)))
    with pytest.raises(ValueError, match="input moments given"):
        RoRope(8, 1)(weights, None)
