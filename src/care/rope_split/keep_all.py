"""Every rotary pair of every key head as a slot: KV parity without loss.

The slots cost G * K values and the full value latent G * K more: exactly the source's cache width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..rope import pair_dims
from ..types import AttentionSpec, AttentionWeights, KeySplit, LayerStats
from .base import split_by_basis


@dataclass(frozen=True)
class KeepAll:
    """Keeps all rotations, so that the converted scores equal the source's."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def frequencies(self, spec: AttentionSpec) -> tuple[float, ...]:
        """The source's table, once per key head."""
        return spec.rope_frequencies * spec.num_kv_heads

    def __call__(self, weights: AttentionWeights, stats: LayerStats | None) -> KeySplit:
        """Reorder half-split heads into interleaved slots; nothing is left for the latent."""
        G, K, _ = weights.k_GKD.shape
        order_K = pair_dims(torch.arange(K // 2), K)
        order_E = (torch.arange(G)[:, None] * K + order_K).flatten()
        slots_EP = torch.eye(G * K, dtype=torch.float64)[:, order_E]
        rest_EM = torch.zeros(G * K, 0, dtype=torch.float64)
        return split_by_basis(weights, slots_EP, rest_EM, weights.rope_frequencies * G)
