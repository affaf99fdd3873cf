"""Reference attention of a source layer and of a latent layer, in plain einsum.

This is the documentation of both forms and the oracle of the tests: no cache, no fused kernel, one sequence,
causal. Everything runs in the dtype of its input.
"""

import torch
from torch import Tensor

from .rope import rotate_half_split, rotate_interleaved, rotation
from .types import AttentionWeights, LatentAttention


def _causal_softmax(scores_HTU: Tensor) -> Tensor:
    T = scores_HTU.shape[-1]
    hidden = torch.ones(T, T, dtype=torch.bool, device=scores_HTU.device).triu(1)
    return scores_HTU.masked_fill(hidden, float("-inf")).softmax(-1)


def _angles(frequencies: tuple[float, ...], x_TD: Tensor) -> tuple[Tensor, Tensor]:
    positions_T = torch.arange(x_TD.shape[0], device=x_TD.device)
    return rotation(positions_T, torch.tensor(frequencies, dtype=x_TD.dtype, device=x_TD.device))


def attention_probabilities(weights: AttentionWeights, x_TD: Tensor) -> Tensor:
    """What each query head attends to: (T, D) in, probabilities (H, T, T) out."""
    group = weights.q_HKD.shape[0] // weights.k_GKD.shape[0]
    cos, sin = _angles(weights.rope_frequencies, x_TD)
    q_HTK = rotate_half_split(torch.einsum("hkd,td->htk", weights.q_HKD, x_TD), cos, sin)
    k_GTK = rotate_half_split(torch.einsum("gkd,td->gtk", weights.k_GKD, x_TD), cos, sin)
    scores_HTU = torch.einsum("htk,huk->htu", q_HTK, k_GTK.repeat_interleave(group, 0)) * weights.scale
    return _causal_softmax(scores_HTU)


def source_attention(weights: AttentionWeights, x_TD: Tensor) -> Tensor:
    """Grouped-query attention with rotary positions: (T, D) in, (T, D) out."""
    group = weights.q_HKD.shape[0] // weights.k_GKD.shape[0]
    v_GTK = torch.einsum("gkd,td->gtk", weights.v_GKD, x_TD)
    attention_HTU = attention_probabilities(weights, x_TD)
    mixed_HTK = torch.einsum("htu,huk->htk", attention_HTU, v_GTK.repeat_interleave(group, 0))
    return torch.einsum("dhk,htk->td", weights.out_DHK, mixed_HTK)


def _rebuilt_scores(latent: LatentAttention, q_HTK: Tensor, k_HTK: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    return torch.einsum("htk,huk->htu", rotate_half_split(q_HTK, *angles), rotate_half_split(k_HTK, *angles))


def latent_attention(latent: LatentAttention, x_TD: Tensor, source_frequencies: tuple[float, ...]) -> Tensor:
    """Multi-head latent attention in either mode: (T, D) in, (T, D) out.

    `source_frequencies` rotate the rebuilt keys; an absorbed layer carries its own.
    """
    group = latent.q_HKD.shape[0] // latent.v_up_GVR.shape[0]
    c_TR = x_TD @ latent.kv_down_RD.T
    q_HTK = torch.einsum("hkd,td->htk", latent.q_HKD, x_TD)
    k_GTN = torch.einsum("gnr,tr->gtn", latent.k_up_GNR, c_TR[:, : latent.k_rank])
    k_HTN = k_GTN.repeat_interleave(group, 0)
    if latent.rope is None:
        scores = _rebuilt_scores(latent, q_HTK, k_HTN, _angles(source_frequencies, x_TD))
    else:
        cos, sin = _angles(latent.rope.frequencies, x_TD)
        q_rope_HTP = rotate_interleaved(torch.einsum("hpk,htk->htp", latent.rope.q_rope_HPK, q_HTK), cos, sin)
        k_rope_TP = rotate_interleaved(x_TD @ latent.rope.k_rope_PD.T, cos, sin)
        q_nope_HTN = torch.einsum("hnk,htk->htn", latent.rope.q_nope_HNK, q_HTK)
        scores = torch.einsum("htp,up->htu", q_rope_HTP, k_rope_TP)
        scores = scores + torch.einsum("htn,hun->htu", q_nope_HTN, k_HTN)
    v_GTV = torch.einsum("gvr,tr->gtv", latent.v_up_GVR, c_TR[:, c_TR.shape[1] - latent.v_rank :])
    attention_HTU = _causal_softmax(scores * latent.scale)
    mixed_HTV = torch.einsum("htu,huv->htv", attention_HTU, v_GTV.repeat_interleave(group, 0))
    return torch.einsum("dhv,htv->td", latent.out_DHV, mixed_HTV)
