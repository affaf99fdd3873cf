"""Rope slots by loss, and a mean rotation for everything that is not a slot.

A rotary pair is a complex number, and a score is Re(conj(q) e^{i theta (j - i)} k) summed over pairs. For each
frequency the G key heads make a complex vector k, and complex directions of it commute with the rotation: a slot is
one of them. Its worth is its two-sided energy sigma^2 (input moment on one side, gradient moment on the other) times
1 - |z|^2, the share of its rotation that a constant cannot replace. What is not a slot loses its rotation; the best
constant in its place is the attention-weighted mean z_h = E_a[e^{i theta (j - i)}] of each query head, folded into the
query. Fast frequencies, whose mean is near zero, fade out of the no-rope score by themselves.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidRecipe
from ..linalg import output_moment, shrink, symmetric_root, tails
from ..types import AttentionSpec, AttentionWeights, LayerStats
from .base import Slots


@dataclass(frozen=True)
class MeanPhase:
    """Slots ranked by what dropping their rotation would cost.

    `dims` fixes the rotary values of every layer; 0 leaves the number to the allocator. With
    `one_per_frequency` the slots are the strongest direction of each of the dims / 2 fastest frequencies, which
    DeepSeek's table can express: base' = base^(dims / head_dim); 0 is then replaced before conversion starts by the
    number that loses least over all layers (care.plan).
    """

    dims: int = 0
    one_per_frequency: bool = False
    shrinkage: float = 0.01
    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "gradients", "distances"})

    def __post_init__(self) -> None:
        if self.dims < 0 or self.dims % 2:
            raise InvalidRecipe(f"rope.dims is {self.dims}; it must be even, or 0 to let the allocator choose")

    def num_slots(self, spec: AttentionSpec) -> int | None:
        """Half of `dims`."""
        most = spec.num_pairs if self.one_per_frequency else spec.kv_width // 2
        if self.dims // 2 > most:
            raise InvalidRecipe(f"rope.dims is {self.dims}; this source has at most {2 * most}")
        return self.dims // 2 or None

    def frequencies(self, spec: AttentionSpec) -> tuple[float, ...] | None:
        """The fastest frequencies under the one-per-frequency rule, if all layers have one table; else unknown."""
        table = spec.shared_frequencies
        return table[: self.dims // 2 or None] if self.one_per_frequency and table else None

    def __call__(self, weights: AttentionWeights, stats: LayerStats | None) -> Slots:
        """Complex two-sided PCA per frequency, all directions sorted by the loss of their rotation."""
        if stats is None or stats.gradient_moment_EE is None or stats.attention_HT is None:
            raise ValueError("mean-phase needs input moments, gradient moments and attention distances")
        G, K, _ = weights.k_GKX.shape
        z_HF = mean_phases(stats.attention_HT, weights.rope_frequencies)
        felt_GF = z_HF.abs().square().view(G, -1, K // 2).mean(1)
        keys_EE = output_moment(weights.k_GKX.flatten(0, 1), shrink(stats.input_moment_XX, self.shrinkage))
        gradients_EE = shrink(stats.gradient_moment_EE[: G * K, : G * K], self.shrinkage)
        down_FGS, up_FGS, energy_FS, weight_FG = _complex_pca(keys_EE, gradients_EE, G, K)
        kept_F = (weight_FG * felt_GF.T).sum(1) / weight_FG.sum(1)
        gain_FS = energy_FS * (1 - kept_F)[:, None] / 2
        order = self._order(gain_FS)
        gains = gain_FS.flatten()[order]
        return Slots(
            weights=weights,
            down_ES=_real_columns(down_FGS)[:, order].flatten(1),
            up_ES=_real_columns(up_FGS)[:, order].flatten(1),
            frequencies=tuple(weights.rope_frequencies[i // G] for i in order.tolist()),
            q_nope_HNK=_phase_maps(z_HF),
            felt_E=felt_GF.sqrt().repeat(1, 2).flatten(),
            loss=tails(gains),
        )

    def _order(self, gain_FS: Tensor) -> Tensor:
        """Flat indices of all (frequency, direction) pairs, slots first."""
        if not self.one_per_frequency:
            return gain_FS.flatten().argsort(descending=True)
        G = gain_FS.shape[1]
        slots = torch.arange(self.dims // 2) * G + gain_FS[: self.dims // 2].argmax(1)
        others = [i for i in range(gain_FS.numel()) if i not in set(slots.tolist())]
        return torch.cat((slots, torch.tensor(others, dtype=torch.int64)))


def mean_phases(attention_HT: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    """E_a[e^{-i theta delta}] over the distances delta that a head attends to: (H, F), complex128."""
    share_HT = attention_HT.double() / attention_HT.double().sum(1, keepdim=True)
    distance_T = torch.arange(attention_HT.shape[1], dtype=torch.float64)
    angle_TF = distance_T[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return share_HT.to(torch.complex128) @ torch.polar(torch.ones_like(angle_TF), -angle_TF)


def _complex_pca(moment_EE: Tensor, gradients_EE: Tensor, G: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per frequency: dual directions (F, G, S), up directions, energies (F, S), gradient energy per head (F, G)."""
    root = symmetric_root(_complex_blocks(gradients_EE, G, K))
    keys_FGG = _complex_blocks(moment_EE, G, K)
    energy_FS, mixture_FGS = torch.linalg.eigh(root.root_MM @ keys_FGG @ root.root_MM)
    energy_FS, mixture_FGS = energy_FS.flip(1).clamp(min=0), mixture_FGS.flip(2)
    weight_FG = _complex_blocks(gradients_EE, G, K).diagonal(dim1=1, dim2=2).real
    return root.root_MM @ mixture_FGS, root.inverse_MM @ mixture_FGS, energy_FS, weight_FG


def _complex_blocks(moment_EE: Tensor, G: int, K: int) -> Tensor:
    """E[k k^H] of the pairs of each frequency across heads: (F, G, G), complex128."""
    parts = moment_EE.view(G, 2, K // 2, G, 2, K // 2).diagonal(dim1=2, dim2=5).permute(4, 0, 2, 1, 3)
    real_FGG = parts[..., 0, 0] + parts[..., 1, 1]
    imag_FGG = parts[..., 1, 0] - parts[..., 0, 1]
    return torch.complex(real_FGG.contiguous(), imag_FGG.contiguous())


def _real_columns(direction_FGS: Tensor) -> Tensor:
    """Complex directions as pairs of real columns over the half-split key dims: (E, F * S, 2)."""
    F, G, S = direction_FGS.shape
    # (G, S, F, F): each frequency touches its own pair of dims only.
    real, imag = (torch.diag_embed(part.permute(1, 2, 0)) for part in (direction_FGS.real, direction_FGS.imag))
    columns = torch.stack((torch.stack((real, imag), 1), torch.stack((-imag, real), 1)), -1)
    return columns.permute(0, 1, 3, 4, 2, 5).reshape(G * 2 * F, F * S, 2)


def _phase_maps(z_HF: Tensor) -> Tensor:
    """q -> conj(z) q on every rotary pair of every head: (H, K, K)."""
    real, imag = z_HF.real, z_HF.imag
    upper = torch.cat((torch.diag_embed(real), torch.diag_embed(imag)), dim=2)
    lower = torch.cat((torch.diag_embed(-imag), torch.diag_embed(real)), dim=2)
    return torch.cat((upper, lower), dim=1)
