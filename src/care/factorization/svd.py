"""Plain truncated SVD of the weights: Palu's decomposition (arXiv 2407.21118) and, jointly over K and V,
that of MHA2MLA (arXiv 2502.14837).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..types import LayerStats
from .base import Targets


@dataclass(frozen=True)
class Svd:
    """Approximates the weights as they are, whatever the activations."""

    joint: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def metric(self, stats: LayerStats | None) -> Tensor | None:
        """The identity."""
        return None

    def output_metric(self, targets: Targets, stats: LayerStats | None) -> Tensor | None:
        """The identity."""
        return None
