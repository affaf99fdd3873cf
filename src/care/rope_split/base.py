"""Which key directions keep their rotation, and what is left for the latent."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..types import AttentionSpec, AttentionWeights, DecoupledRope, KeySplit, LayerStats, block_identity


@dataclass(frozen=True)
class Slots:
    """A layer's key directions as rope slots, best first: any number of them can be kept.

    The columns of down_ES and up_ES are a basis of the E = G * K concatenated key dims and its dual,
    keys = up @ (down^T @ keys), two interleaved columns per slot; `frequencies` has one entry per slot that may
    rotate. q_nope_HNK acts on the queries of what loses its rotation, felt_E is the share of an error in each
    key dim that no-rope scores feel. loss[n] is what is lost by keeping n slots, in the method's units; None
    where the number of slots is fixed.
    """

    weights: AttentionWeights
    down_ES: Tensor
    up_ES: Tensor
    frequencies: tuple[float, ...]
    q_nope_HNK: Tensor | None = None
    felt_E: Tensor | None = None
    loss: Tensor | None = None

    def split(self, num_slots: int) -> KeySplit:
        """Keep the first slots, fastest frequency first, and leave every other direction to the latent.

        Every query head of group g reads a shared direction through its own group's rows, so scores are
        unchanged but for the rotations lost.
        """
        H, K, _ = self.weights.q_HKD.shape
        G = self.weights.k_GKX.shape[0]
        order = sorted(range(num_slots), key=lambda slot: -self.frequencies[slot])
        kept = torch.tensor([2 * slot + part for slot in order for part in (0, 1)], dtype=torch.int64)
        keys_EX = self.weights.k_GKX.flatten(0, 1).double()
        rest_up_EM = self.up_ES[:, 2 * num_slots :]
        num_nope = K if rest_up_EM.shape[1] else 0
        q_nope_HNK = torch.eye(K, dtype=torch.float64).expand(H, -1, -1) if self.q_nope_HNK is None else self.q_nope_HNK
        rope = DecoupledRope(
            q_rope_HPK=self.up_ES[:, kept].view(G, K, -1).transpose(1, 2).repeat_interleave(H // G, 0),
            q_nope_HNK=q_nope_HNK[:, :num_nope],
            k_rope_PX=self.down_ES[:, kept].T @ keys_EX,
            frequencies=tuple(self.frequencies[slot] for slot in order),
        )
        return KeySplit(
            rope=rope,
            rest_MX=self.down_ES[:, 2 * num_slots :].T @ keys_EX,
            expand_GNM=rest_up_EM.view(G, K, -1)[:, :num_nope],
            error_EM=rest_up_EM if self.felt_E is None else self.felt_E[:, None] * rest_up_EM,
            rope_loss=None if self.loss is None else float(self.loss[num_slots]),
            rope_losses=self.loss,
        )


class RopeSplit(Protocol):
    """Ranks the key directions of an absorbed layer as rope slots."""

    needs: ClassVar[frozenset[str]]

    def num_slots(self, spec: AttentionSpec) -> int | None:
        """Slots of every layer; None when an allocator chooses them. InvalidRecipe if impossible."""
        ...

    def frequencies(self, spec: AttentionSpec) -> tuple[float, ...] | None:
        """Frequencies of the slots, where they are known before any weight is read and alike in all layers."""
        ...

    def __call__(self, weights: AttentionWeights, stats: LayerStats | None) -> Slots:
        """The slots of one layer."""
        ...


def whole_keys(weights: AttentionWeights) -> KeySplit:
    """Rebuild mode: the latent holds every key as it is before RoPE."""
    G, K, _ = weights.k_GKX.shape
    everything_EE = torch.eye(G * K, dtype=torch.float64)
    return KeySplit(None, weights.k_GKX.flatten(0, 1).double(), block_identity(G, K), everything_EE)
