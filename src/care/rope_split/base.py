"""Which key directions keep their rotation, and what is left for the latent."""

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..types import AttentionSpec, AttentionWeights, DecoupledRope, KeySplit, LayerStats, block_identity


class RopeSplit(Protocol):
    """Chooses the rope slots of an absorbed layer."""

    needs: ClassVar[frozenset[str]]

    def frequencies(self, spec: AttentionSpec) -> tuple[float, ...]:
        """Frequencies of the slots, known before any weight is read; InvalidRecipe if impossible."""
        ...

    def __call__(self, weights: AttentionWeights, stats: LayerStats | None) -> KeySplit:
        """Split one layer's keys."""
        ...


def whole_keys(weights: AttentionWeights) -> KeySplit:
    """Rebuild mode: the latent holds every key as it is before RoPE."""
    G, K, _ = weights.k_GKD.shape
    return KeySplit(rope=None, rest_MD=weights.k_GKD.flatten(0, 1).double(), expand_GNM=block_identity(G, K))


def split_by_basis(
    weights: AttentionWeights, slots_EP: Tensor, rest_EM: Tensor, frequencies: tuple[float, ...]
) -> KeySplit:
    """Split along an orthonormal basis of the E = G * K concatenated key dims.

    slots_EP are the interleaved slot directions, rest_EM all others. Every query head of group g reads
    a shared direction through its own group's rows, so scores are unchanged but for the rotations lost.
    """
    H, K, _ = weights.q_HKD.shape
    G = weights.k_GKD.shape[0]
    keys_ED = weights.k_GKD.flatten(0, 1).double()
    q_rope_GPK = slots_EP.view(G, K, -1).transpose(1, 2)
    num_nope = K if rest_EM.shape[1] else 0
    rope = DecoupledRope(
        q_rope_HPK=q_rope_GPK.repeat_interleave(H // G, 0),
        q_nope_HNK=torch.eye(K, dtype=torch.float64)[:num_nope].expand(H, -1, -1),
        k_rope_PD=slots_EP.T @ keys_ED,
        frequencies=frequencies,
    )
    return KeySplit(rope=rope, rest_MD=rest_EM.T @ keys_ED, expand_GNM=rest_EM.view(G, K, -1)[:, :num_nope])
