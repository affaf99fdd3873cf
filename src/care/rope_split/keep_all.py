"""Every rotary pair of every key head as a slot: KV parity without loss.

The slots cost G * K values and the full value latent G * K more: exactly the source's cache width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..rope import pair_dims
from ..types import AttentionSpec, AttentionWeights, LayerStats
from .base import Slots


@dataclass(frozen=True)
class KeepAll:
    """Keeps all rotations, so that the converted scores equal the source's."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def num_slots(self, spec: AttentionSpec) -> int | None:
        """All pairs of all key heads."""
        return spec.kv_width // 2

    def frequencies(self, spec: AttentionSpec) -> tuple[float, ...] | None:
        """The source's table, if all layers have one, each frequency once per key head."""
        table = spec.shared_frequencies
        return None if table is None else tuple(f for f in table for _ in range(spec.num_kv_heads))

    def __call__(self, weights: AttentionWeights, stats: LayerStats | None) -> Slots:
        """Reorder half-split heads into interleaved slots; nothing is left for the latent."""
        G, K, _ = weights.k_GKX.shape
        order_K = pair_dims(torch.arange(K // 2), K)
        order_E = (torch.arange(G)[:, None] * K + order_K).flatten()
        slots_ES = torch.eye(G * K, dtype=torch.float64)[:, order_E]
        return Slots(weights, slots_ES, slots_ES, weights.rope_frequencies * G)
