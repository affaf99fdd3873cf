"""Reference attention of a source layer and of a latent layer, in plain einsum.

This is the documentation of both forms and the oracle of the tests: no cache, no fused kernel, one sequence,
causal. Everything runs in the dtype of its input.
"""

import torch
from torch import Tensor

from .carried import Carried, Norm
from .rope import rotate_half_split, rotate_interleaved, rotation
from .types import AttentionWeights, LatentAttention


def rms_norm(norm: Norm, x: Tensor) -> Tensor:
    """RMSNorm of every block of W values in the last dim."""
    blocks = x.unflatten(-1, (-1, len(norm.weight_W)))
    blocks = blocks * torch.rsqrt(blocks.square().mean(-1, keepdim=True) + norm.eps)
    return (blocks * (norm.weight_W + norm.offset)).flatten(-2)


def features(carried: Carried, x: Tensor) -> Tensor:
    """phi(x), in which keys and values are linear: (..., D) in, (..., X) out."""
    parts = [x]
    if carried.keys is not None:
        keys = torch.nn.functional.linear(x, carried.keys.proj_ED, carried.keys.bias_E)
        parts.insert(0, rms_norm(carried.keys.norm, keys))
    if carried.constant:
        parts.append(x.new_ones(1).expand(*x.shape[:-1], 1))
    return torch.cat(parts, -1) if len(parts) > 1 else x


def _queries(q_HKD: Tensor, carried: Carried, x_TD: Tensor) -> Tensor:
    """Query heads before RoPE: (H, T, K)."""
    q_HTK = torch.einsum("hkd,td->htk", q_HKD, x_TD)
    if carried.q_bias_HK is not None:
        q_HTK = q_HTK + carried.q_bias_HK[:, None]
    if carried.q_norm is None:
        return q_HTK
    H, T, K = q_HTK.shape
    return rms_norm(carried.q_norm, q_HTK.transpose(0, 1).reshape(T, H * K)).view(T, H, K).transpose(0, 1)


def _probabilities(scores_HTU: Tensor, carried: Carried) -> Tensor:
    """Causal softmax of scaled scores, capped and within the window where the source says so."""
    if carried.softcap is not None:
        scores_HTU = carried.softcap * (scores_HTU / carried.softcap).tanh()
    position = torch.arange(scores_HTU.shape[-1], device=scores_HTU.device)
    distance_TU = position[:, None] - position
    hidden_TU = distance_TU < 0
    if carried.window is not None:
        hidden_TU = hidden_TU | (distance_TU >= carried.window)
    return scores_HTU.masked_fill(hidden_TU, float("-inf")).softmax(-1)


def _output(out_DHV: Tensor, carried: Carried, mixed_HTV: Tensor) -> Tensor:
    y_TD = torch.einsum("dhv,htv->td", out_DHV, mixed_HTV)
    return y_TD if carried.out_bias_D is None else y_TD + carried.out_bias_D


def _angles(frequencies: tuple[float, ...], x_TD: Tensor) -> tuple[Tensor, Tensor]:
    positions_T = torch.arange(x_TD.shape[0], device=x_TD.device)
    return rotation(positions_T, torch.tensor(frequencies, dtype=x_TD.dtype, device=x_TD.device))


def attention_probabilities(weights: AttentionWeights, x_TD: Tensor) -> Tensor:
    """What each query head attends to: (T, D) in, probabilities (H, T, T) out."""
    group = weights.q_HKD.shape[0] // weights.k_GKX.shape[0]
    cos, sin = _angles(weights.rope_frequencies, x_TD)
    q_HTK = rotate_half_split(_queries(weights.q_HKD, weights.carried, x_TD), cos, sin)
    keys_GTK = torch.einsum("gkx,tx->gtk", weights.k_GKX, features(weights.carried, x_TD))
    k_GTK = rotate_half_split(keys_GTK, cos, sin)
    scores_HTU = torch.einsum("htk,huk->htu", q_HTK, k_GTK.repeat_interleave(group, 0)) * weights.scale
    return _probabilities(scores_HTU, weights.carried)


def source_attention(weights: AttentionWeights, x_TD: Tensor) -> Tensor:
    """Grouped-query attention with rotary positions: (T, D) in, (T, D) out."""
    group = weights.q_HKD.shape[0] // weights.k_GKX.shape[0]
    v_GTK = torch.einsum("gkx,tx->gtk", weights.v_GKX, features(weights.carried, x_TD))
    attention_HTU = attention_probabilities(weights, x_TD)
    mixed_HTK = torch.einsum("htu,huk->htk", attention_HTU, v_GTK.repeat_interleave(group, 0))
    return _output(weights.out_DHK, weights.carried, mixed_HTK)


def _rebuilt_scores(latent: LatentAttention, q_HTK: Tensor, k_HTK: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    return torch.einsum("htk,huk->htu", rotate_half_split(q_HTK, *angles), rotate_half_split(k_HTK, *angles))


def latent_attention(latent: LatentAttention, x_TD: Tensor, source_frequencies: tuple[float, ...]) -> Tensor:
    """Multi-head latent attention in either mode: (T, D) in, (T, D) out.

    `source_frequencies` rotate the rebuilt keys; an absorbed layer carries its own.
    """
    group = latent.q_HKD.shape[0] // latent.v_up_GVR.shape[0]
    phi_TX = features(latent.carried, x_TD)
    c_TR = phi_TX @ latent.kv_down_RX.T
    q_HTK = _queries(latent.q_HKD, latent.carried, x_TD)
    k_GTN = torch.einsum("gnr,tr->gtn", latent.k_up_GNR, c_TR[:, : latent.k_rank])
    k_HTN = k_GTN.repeat_interleave(group, 0)
    if latent.rope is None:
        scores = _rebuilt_scores(latent, q_HTK, k_HTN, _angles(source_frequencies, x_TD))
    else:
        cos, sin = _angles(latent.rope.frequencies, x_TD)
        q_rope_HTP = rotate_interleaved(torch.einsum("hpk,htk->htp", latent.rope.q_rope_HPK, q_HTK), cos, sin)
        k_rope_TP = rotate_interleaved(phi_TX @ latent.rope.k_rope_PX.T, cos, sin)
        q_nope_HTN = torch.einsum("hnk,htk->htn", latent.rope.q_nope_HNK, q_HTK)
        scores = torch.einsum("htp,up->htu", q_rope_HTP, k_rope_TP)
        scores = scores + torch.einsum("htn,hun->htu", q_nope_HTN, k_HTN)
    v_GTV = torch.einsum("gvr,tr->gtv", latent.v_up_GVR, c_TR[:, c_TR.shape[1] - latent.v_rank :])
    attention_HTU = _probabilities(scores * latent.scale, latent.carried)
    mixed_HTV = torch.einsum("htu,huv->htv", attention_HTU, v_GTV.repeat_interleave(group, 0))
    return _output(latent.out_DHV, latent.carried, mixed_HTV)
