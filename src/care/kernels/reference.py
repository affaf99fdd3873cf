"""Decode attention over latents, written out: what the kernel must give."""

import torch
from torch import Tensor

from .cached import Cached


def reference_decode(query_BHC: Tensor, cached: Cached, scale: float) -> Tensor:
    """One query token of each sequence attends to its cache: (B, H, R) in fp32.

    Queries are absorbed, in the column order of the entries; values are the entries' latents.
    """
    mixed_BHR = torch.zeros(*query_BHC.shape[:2], cached.rank, device=query_BHC.device)
    for b, query_HC in enumerate(query_BHC.float()):
        entries_TC = sequence_entries(cached, b)
        weights_HT = (query_HC @ entries_TC.T * scale).softmax(-1)
        mixed_BHR[b] = weights_HT @ entries_TC[:, cached.latent_start : cached.latent_start + cached.rank]
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
