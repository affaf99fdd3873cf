"""Decode attention over latents, written out: what the kernel must give."""

import torch
from torch import Tensor

from .cached import Cached


def reference_decode(q_latent_BHR: Tensor, q_rope_BHP: Tensor, cached: Cached, scale: float) -> Tensor:
    """One query token of each sequence attends to its cache: (B, H, R) in fp32.

    Queries are absorbed, one part for the latent and one for the rotary key; values are the entries' latents.
    """
    mixed_BHR = torch.zeros(q_latent_BHR.shape, device=q_latent_BHR.device)
    for b in range(len(mixed_BHR)):
        entries_TC = sequence_entries(cached, b)
        latents_TR = entries_TC[:, cached.latent_start : cached.latent_start + cached.rank]
        keys_TP = entries_TC[:, cached.rope_start : cached.rope_start + cached.rope_dim]
        scores_HT = q_latent_BHR[b].float() @ latents_TR.T + q_rope_BHP[b].float() @ keys_TP.T
        mixed_BHR[b] = (scores_HT * scale).softmax(-1) @ latents_TR
    return mixed_BHR


def sequence_entries(cached: Cached, b: int) -> Tensor:
    """The entries (T, C) of one sequence, out of its pages and de-quantized: fp32."""
    length = int(cached.lengths_B[b])
    entries_TC = _gathered(cached.entries, cached, b)[:length].float()
    if cached.scales is None:
        return entries_TC
    scales_TS = _gathered(cached.scales, cached, b)[:length].float()
    parts = entries_TC.split(cached.parts, dim=1)
    return torch.cat([part * scales_TS[:, i : i + 1] for i, part in enumerate(parts)], dim=1)


def _gathered(tensor: Tensor, cached: Cached, b: int) -> Tensor:
    return tensor[b] if cached.table_BN is None else tensor[cached.table_BN[b].long()].flatten(0, 1)
