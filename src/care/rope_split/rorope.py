"""RoRoPE and frequency folding of TransMLA (arXiv 2502.07864, sections 4.2 and appendix C).

Pairs of one frequency across the key heads can be mixed by any rotation of their real and imaginary parts
alike without changing a score. A PCA of the keys picks the mixture that gathers the most energy in the first
component; only that one keeps its rotation. Folding treats a band of neighboring frequencies as if they were
one, so that a band of `folding` frequencies keeps its `folding` strongest components.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InvalidRecipe
from ..linalg import output_moment
from ..types import AttentionSpec, AttentionWeights, LayerStats
from .base import Slots


@dataclass(frozen=True)
class RoRope:
    """At most `dims` rotary values, one slot per `collapse` source frequencies.

    `folding` is the number of frequencies that one PCA treats alike: the collapse or a doubling of it, 0 for the
    collapse; "auto" is replaced by the best one on the calibration text before conversion starts (care.folding).
    """

    dims: int = 64
    folding: int | Literal["auto"] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def collapse(self, num_pairs: int) -> int:
        """Source frequencies per slot: the smallest divisor of the pairs that respects `dims`."""
        if self.dims < 2:
            raise InvalidRecipe(f"rope.dims is {self.dims}; it must be at least 2")
        return next(c for c in range(1, num_pairs + 1) if num_pairs % c == 0 and 2 * num_pairs // c <= self.dims)

    def candidates(self, num_pairs: int) -> tuple[int, ...]:
        """Foldings that the search tries, in order: the collapse and its doublings."""
        collapse = self.collapse(num_pairs)
        doublings = (collapse * 2**n for n in range(num_pairs.bit_length()))
        return tuple(f for f in doublings if num_pairs % f == 0)

    def num_slots(self, spec: AttentionSpec) -> int | None:
        """One per `collapse` frequencies."""
        return spec.num_pairs // self.collapse(spec.num_pairs)

    def frequencies(self, spec: AttentionSpec) -> tuple[float, ...] | None:
        """Every collapse-th frequency of the source, if all layers have one table; folding does not change it."""
        collapse = self.collapse(spec.num_pairs)
        if self.folding not in ("auto", 0, *self.candidates(spec.num_pairs)):
            raise InvalidRecipe(
                f"rope.folding is {self.folding}; with {spec.num_pairs} rotary pairs and {self.dims} dims "
                f"it can be one of {', '.join(map(str, self.candidates(spec.num_pairs)))}"
            )
        table = spec.shared_frequencies
        return None if table is None else table[::collapse]

    def __call__(self, weights: AttentionWeights, stats: LayerStats | None) -> Slots:
        """Rotate each band to its principal components and keep the strongest as slots."""
        if self.folding == "auto" or stats is None:
            raise ValueError("folding must be chosen, and input moments given, before a layer is split")
        G, K, _ = weights.k_GKX.shape
        collapse = self.collapse(K // 2)
        folding = self.folding or collapse
        moment_EE = output_moment(weights.k_GKX.flatten(0, 1), stats.input_moment_XX)
        slots: list[Tensor] = []
        rest: list[Tensor] = []
        for first in range(0, K // 2, folding):
            basis_EC = band_components(moment_EE, G, K, torch.arange(first, first + folding))
            kept = 2 * (folding // collapse)
            slots.append(basis_EC[:, :kept])
            rest.append(basis_EC[:, kept:])
        frequencies = weights.rope_frequencies[::collapse]
        basis_ES = torch.cat((*slots, *rest), 1)
        return Slots(weights, basis_ES, basis_ES, frequencies)


def band_components(moment_EE: Tensor, num_kv_heads: int, head_dim: int, pairs: Tensor) -> Tensor:
    """Principal components of the rotary pairs of one band, strongest first, real and imaginary
    directions interleaved: an orthonormal (E, 2 * G * len(pairs)).
    """
    heads_G1 = torch.arange(num_kv_heads)[:, None] * head_dim
    real = (heads_G1 + pairs).flatten()
    imag = real + head_dim // 2
    energy_CC = moment_EE[real][:, real] + moment_EE[imag][:, imag]
    mixture_CC = torch.linalg.eigh(energy_CC).eigenvectors.flip(1)
    basis_EC = moment_EE.new_zeros(num_kv_heads * head_dim, 2 * len(real))
    basis_EC[real, 0::2] = mixture_CC
    basis_EC[imag, 1::2] = mixture_CC
    return basis_EC
