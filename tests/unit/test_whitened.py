"""Each method's product against its own paper's formula, written out here with SVDs."""

import pytest
import torch
from torch import Tensor

from care.errors import InvalidRecipe
from care.factorization import Asvd, Factorizer, Svd, Whitened, factorize
from care.rope_split import RoRope, whole_keys
from care.types import KeySplit, LatentAttention, LayerRanks
from tiny import LayerSize, random_inputs, random_layer, stats_of
from tolerances import assert_close

SIZE = LayerSize(H=4, G=2, K=6, D=20)
ALPHA = 0.01
RANKS = [1, 5, 11]


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r S_r and V_r^T of an SVD."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * singular[:rank], right[:rank]


def converted(method: Factorizer, rank: int, split: KeySplit | None = None) -> LatentAttention:
    """The layer of this file, factorized."""
    weights, stats = random_layer(SIZE), stats_of(random_inputs(90, SIZE.D))
    split = split or whole_keys(weights)
    rope_dim = 2 * len(split.rope.frequencies) if split.rope else 0
    return factorize(method, weights, split, stats, LayerRanks(rope_dim, rank, rank, method.joint)).latent


def maps(latent: LatentAttention) -> tuple[Tensor, Tensor]:
    """What the latent makes of keys and values, as D x (G * K), the papers' orientation."""
    keys = latent.k_up_GNR.flatten(0, 1) @ latent.kv_down_RX[: latent.k_rank]
    values = latent.v_up_GVR.flatten(0, 1) @ latent.kv_down_RX[len(latent.kv_down_RX) - latent.v_rank :]
    return keys.T, values.T


def exact() -> tuple[Tensor, Tensor]:
    """W_K and W_V as D x (G * K)."""
    weights = random_layer(SIZE)
    return weights.k_GKX.flatten(0, 1).T, weights.v_GKX.flatten(0, 1).T


def moment() -> Tensor:
    """E[x x^T] of the calibration inputs."""
    x_TD = random_inputs(90, SIZE.D)
    return x_TD.T @ x_TD / len(x_TD)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive matrix."""
    energies, directions = torch.linalg.eigh(matrix)
    return directions * energies**exponent @ directions.T


def shrunk() -> Tensor:
    """CARE's C: (1 - alpha) C + alpha * mean(diag C) * I."""
    C = moment()
    return (1 - ALPHA) * C + ALPHA * C.diagonal().mean() * torch.eye(SIZE.D, dtype=torch.float64)


@pytest.mark.parametrize("rank", RANKS)
def test_care_is_its_closed_form(rank: int) -> None:
    """sqrt(C) W = U S V^T, W^a = sqrt(C)^-1 U_r S_r, W^b = V_r^T."""
    for W, ours in zip(exact(), maps(converted(Whitened(shrinkage=ALPHA), rank)), strict=True):
        scaled, right = truncated(power(shrunk(), 0.5) @ W, rank)
        assert_close(ours, power(shrunk(), -0.5) @ scaled @ right, "fp64")


@pytest.mark.parametrize("rank", RANKS)
def test_cares_variant_uses_c_itself(rank: int) -> None:
    """C W = U S V^T, W^a = C^-1 U_r S_r."""
    for W, ours in zip(exact(), maps(converted(Whitened(shrinkage=ALPHA, power=2), rank)), strict=True):
        scaled, right = truncated(shrunk() @ W, rank)
        assert_close(ours, torch.linalg.solve(shrunk(), scaled @ right), "fp64")


@pytest.mark.parametrize("rank", RANKS)
def test_svd_llm_is_its_cholesky_form(rank: int) -> None:
    """With C = L L^T: L^T W = U S V^T, W' = L^-T U_r S_r V_r^T."""
    L = torch.linalg.cholesky(moment())
    for W, ours in zip(exact(), maps(converted(Whitened(shrinkage=0.0), rank)), strict=True):
        scaled, right = truncated(L.T @ W, rank)
        assert_close(ours, torch.linalg.solve_triangular(L.T, scaled @ right, upper=True), "fp64")


@pytest.mark.parametrize("rank", RANKS)
def test_palu_is_the_truncated_svd(rank: int) -> None:
    for W, ours in zip(exact(), maps(converted(Svd(), rank)), strict=True):
        scaled, right = truncated(W, rank)
        assert_close(ours, scaled @ right, "fp64")


@pytest.mark.parametrize("rank", RANKS)
def test_mha2mla_is_the_svd_of_both(rank: int) -> None:
    """One SVD of [W_K | W_V]."""
    scaled, right = truncated(torch.cat(exact(), 1), rank)
    ours = converted(Svd(joint=True), rank)
    assert_close(torch.cat(maps(ours), 1), scaled @ right, "fp64")
    assert ours.width == rank


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_asvd_scales_input_channels(rank: int, exponent: float) -> None:
    """S W = U S' V^T with S = diag(E|x|)^exponent, W' = S^-1 (S W)_r."""
    S = random_inputs(90, SIZE.D).abs().mean(0) ** exponent
    for W, ours in zip(exact(), maps(converted(Asvd(exponent=exponent), rank)), strict=True):
        scaled, right = truncated(S[:, None] * W, rank)
        assert_close(ours, (scaled @ right) / S[:, None], "fp64")


@pytest.mark.parametrize("rank", RANKS)
def test_transmla_is_a_balanced_pca_of_activations(rank: int) -> None:
    """Keys without rope are divided by the ratio of mean RMS, then one PCA of the outputs [K | V] of the text."""
    weights, x_TD = random_layer(SIZE), random_inputs(90, SIZE.D)
    split = RoRope(dims=6)(weights, stats_of(x_TD)).split(SIZE.K // 2)
    keys_TM, values_TE = x_TD @ split.rest_MX.T, x_TD @ exact()[1]
    ratio = keys_TM.square().mean(0).sqrt().mean() / values_TE.square().mean(0).sqrt().mean()
    both_TX = torch.cat((keys_TM / ratio, values_TE), 1)
    _, _, right_XX = torch.linalg.svd(both_TX)
    projected_TX = both_TX @ right_XX[:rank].T @ right_XX[:rank]
    latent = converted(Whitened(shrinkage=0.0, joint=True, balanced=True), rank, split)
    c_TR = x_TD @ latent.kv_down_RX.T
    keys_GTN = torch.einsum("gnr,tr->gtn", latent.k_up_GNR, c_TR)
    expected_GTN = torch.einsum("gnm,tm->gtn", split.expand_GNM, projected_TX[:, : len(split.rest_MX)] * ratio)
    assert_close(keys_GTN, expected_GTN, "fp64")
    values = torch.einsum("gvr,tr->tgv", latent.v_up_GVR, c_TR).flatten(1)
    assert_close(values, projected_TX[:, len(split.rest_MX) :], "fp64")


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidRecipe, match=r"in \[0, 1\]"):
        Whitened(shrinkage=-0.1)
    with pytest.raises(InvalidRecipe, match="1 or 2"):
        Whitened(power=0)


@pytest.mark.parametrize("method", [Asvd(), Whitened()])
def test_methods_that_need_moments_say_so(method: Factorizer) -> None:
    assert method.needs == {"inputs"}
    with pytest.raises(ValueError, match="needs input moments"):
        method.metric(None)
