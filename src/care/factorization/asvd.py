"""Activation-aware SVD (ASVD, arXiv 2312.05821): inputs scaled by the size of their channel."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..types import LayerStats
from .base import Targets


@dataclass(frozen=True)
class Asvd:
    """Factors W S with the diagonal S = E[|x|]^exponent and undoes S: the metric is S^2."""

    exponent: float = 0.5
    joint: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def metric(self, stats: LayerStats | None) -> Tensor | None:
        """The squared channel scales on the diagonal."""
        if stats is None:
            raise ValueError("asvd needs input moments")
        return stats.input_magnitude_X.pow(2 * self.exponent).diag()

    def output_metric(self, targets: Targets, stats: LayerStats | None) -> Tensor | None:
        """The identity."""
        return None
