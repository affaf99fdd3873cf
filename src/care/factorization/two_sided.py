"""Two-sided weighting: low rank in the metric of the activations and of the loss.

With C the input moment and F = E[g g^T], g the gradient of the log-likelihood with respect to the outputs, an error
W - W' costs tr(F (W - W') C (W - W')^T) / 2 nats to second order when inputs and gradients are independent (the
Kronecker-factored Fisher of K-FAC, arXiv 1503.05671). Squared singular values of F^(1/2) W C^(1/2) are then in units of
loss, comparable across layers and between keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidRecipe
from ..linalg import shrink
from ..types import LayerStats
from .base import Targets


@dataclass(frozen=True)
class TwoSided:
    """Input moment on one side, gradient moment on the other, each shrunk.

    Keys and values are shrunk apart, since their gradients differ in size; what no-rope scores do not feel
    of the keys is not weighed.
    """

    shrinkage: float = 0.01
    gradient_shrinkage: float = 0.1
    joint: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "gradients"})

    def __post_init__(self) -> None:
        for name in ("shrinkage", "gradient_shrinkage"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidRecipe(f"factorization.{name} is {getattr(self, name)}; it must lie in [0, 1]")

    def metric(self, stats: LayerStats | None) -> Tensor | None:
        """The shrunk input moment."""
        if stats is None:
            raise ValueError("two-sided needs input moments")
        return shrink(stats.input_moment_XX, self.shrinkage)

    def output_metric(self, targets: Targets, stats: LayerStats | None) -> Tensor | None:
        """The gradient moment, carried from concatenated keys to what is left of them."""
        if stats is None or stats.gradient_moment_EE is None:
            raise ValueError("two-sided needs gradient moments")
        E = len(targets.values_EX)
        moment = self.shrunk_gradients(stats.gradient_moment_EE, [E, E])
        carry = torch.block_diag(targets.error_EM, torch.eye(E, dtype=torch.float64))
        return carry.T @ moment @ carry

    def shrunk_gradients(self, moment_EE: Tensor, parts: Sequence[int]) -> Tensor:
        """A moment of several parts' gradients, each pulled towards its own mean square."""
        a, diagonal_E = self.gradient_shrinkage, moment_EE.diagonal()
        sizes_E = torch.cat([part.mean().expand(len(part)) for part in diagonal_E.split(list(parts))])
        return (1 - a) * moment_EE + a * sizes_E.diag()
