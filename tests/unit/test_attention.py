"""The reference forward passes: the source's against transformers, the latent's against its definition."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from care.attention import latent_attention, source_attention
from care.rope import rotate_half_split, rotate_interleaved, rotation
from care.types import AttentionWeights, DecoupledRope, LatentAttention
from tiny import LayerSize, random_inputs, random_layer
from tolerances import assert_close

T = 11


@pytest.mark.parametrize(("H", "G", "K", "D"), [(4, 2, 8, 32), (4, 4, 8, 24), (6, 1, 10, 18), (1, 1, 2, 3)])
def test_source_attention_is_transformers_llama(H: int, G: int, K: int, D: int) -> None:
    config = transformers.LlamaConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=G, head_dim=K,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = LlamaAttention(config, 0)
    table = LlamaRotaryEmbedding(config)
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        torch.nn.init.normal_(projection.weight, std=1.5 * D**-0.5)
    weights = AttentionWeights(
        layer.q_proj.weight.view(H, K, D), layer.k_proj.weight.view(G, K, D), layer.v_proj.weight.view(G, K, D),
        layer.o_proj.weight.view(D, H, K), tuple(table.inv_freq.tolist()), K**-0.5,
    )  # fmt: skip
    x_TD = torch.randn(T, D)
    hidden = torch.full((T, T), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        theirs, _ = layer(x_TD[None], table(x_TD[None], torch.arange(T)[None]), hidden)
        assert_close(source_attention(weights, x_TD), theirs[0], "fp32 attention")


def test_source_attention_is_causal() -> None:
    weights, x_TD = random_layer(LayerSize()), random_inputs(T, LayerSize().D)
    changed_TD = x_TD.clone()
    changed_TD[6:] += 1
    before, after = source_attention(weights, x_TD), source_attention(weights, changed_TD)
    assert_close(after[:6], before[:6], "fp64")
    assert (after[6:] - before[6:]).abs().min() > 0


def random_latent(rope: bool) -> LatentAttention:
    """A latent layer with key rank 3 and value rank 4 in a latent of 5: they overlap by 2."""
    H, G, K, D, R, P, N, V = 4, 2, 6, 20, 5, 4, 3, 7

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64) * D**-0.5

    decoupled = DecoupledRope(draw(H, P, K), draw(H, N, K), draw(P, D), (1.0, 0.2)) if rope else None
    return LatentAttention(
        q_HKD=3 * draw(H, K, D), kv_down_RX=3 * draw(R, D), k_up_GNR=9 * draw(G, N if rope else K, 3),
        v_up_GVR=draw(G, V, 4), out_DHV=draw(D, H, V), scale=0.7, rope=decoupled,
    )  # fmt: skip


@pytest.mark.parametrize("rope", [True, False])
def test_latent_attention_is_its_definition(rope: bool) -> None:
    """Head by head and pair by pair, with loops."""
    latent, x_TD = random_latent(rope), random_inputs(T, 20)
    table = (1.0, 0.3, 0.1)
    c_TR = x_TD @ latent.kv_down_RX.T
    expected_TD = torch.zeros(T, 20, dtype=torch.float64)
    for h in range(4):
        keys = c_TR[:, :3] @ latent.k_up_GNR[h // 2].T
        values = c_TR[:, 1:] @ latent.v_up_GVR[h // 2].T
        for t in range(T):
            scores = torch.stack([score(latent, x_TD, keys, h, t, u, table) for u in range(t + 1)])
            mixed_V = (scores * latent.scale).softmax(0) @ values[: t + 1]
            expected_TD[t] += latent.out_DHV[:, h] @ mixed_V
    assert_close(latent_attention(latent, x_TD, table), expected_TD, "fp64")


def score(latent: LatentAttention, x_TD: Tensor, keys: Tensor, h: int, t: int, u: int, table: tuple) -> Tensor:
    """One query against one key; only the distance t - u counts."""
    query_K = latent.q_HKD[h] @ x_TD[t]
    if latent.rope is None:
        angles = rotation(torch.tensor(t - u), torch.tensor(table, dtype=torch.float64))
        return rotate_half_split(query_K, *angles) @ keys[u]
    angles = rotation(torch.tensor(t - u), torch.tensor(latent.rope.frequencies, dtype=torch.float64))
    turned_P = rotate_interleaved(latent.rope.q_rope_HPK[h] @ query_K, *angles)
    return turned_P @ (latent.rope.k_rope_PX @ x_TD[u]) + (latent.rope.q_nope_HNK[h] @ query_K) @ keys[u]


def test_latent_attention_counts_its_cache() -> None:
    absorbed, rebuilt = random_latent(rope=True), random_latent(rope=False)
    assert (absorbed.mode, absorbed.width, absorbed.rope_dim) == ("absorbed", 9, 4)
    assert (rebuilt.mode, rebuilt.width, rebuilt.rope_dim) == ("rebuild", 5, 0)
    assert (absorbed.k_rank, absorbed.v_rank) == (3, 4)


def test_scale_counts() -> None:
    latent, x_TD = random_latent(rope=True), random_inputs(T, 20)
    flat = latent_attention(replace(latent, scale=0.0), x_TD, ())
    values_TGV = torch.einsum("gvr,tr->tgv", latent.v_up_GVR, (x_TD @ latent.kv_down_RX.T)[:, 1:])
    means = values_TGV.cumsum(0) / torch.arange(1, T + 1)[:, None, None]
    expected = torch.einsum("dhv,thv->td", latent.out_DHV, means.repeat_interleave(2, 1))
    assert_close(flat, expected, "fp64")
