"""Low rank in the metric of the activations: SVD-LLM (arXiv 2403.07378) and CARE (arXiv 2603.17946).

SVD-LLM whitens with a Cholesky factor of C and CARE with its symmetric square root; the minimizer of
tr((W - W') C (W - W')^T) is the same. They differ in the shrinkage of C.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidRecipe
from ..linalg import output_moment, shrink
from ..types import LayerStats
from .base import Targets


@dataclass(frozen=True)
class Whitened:
    """The metric is C^power, C shrunk by `shrinkage`.

    power 1 weighs errors as the activations do; power 2 is the variant of CARE's code that factors
    C W in place of C^(1/2) W. A `balanced` joint latent first brings keys to the size of the values.
    """

    shrinkage: float = 0.01
    power: int = 1
    joint: bool = False
    balanced: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def __post_init__(self) -> None:
        if not 0 <= self.shrinkage <= 1:
            raise InvalidRecipe(f"factorization.shrinkage is {self.shrinkage}; it must lie in [0, 1]")
        if self.power not in (1, 2):
            raise InvalidRecipe(f"factorization.power is {self.power}; it must be 1 or 2")

    def metric(self, stats: LayerStats | None) -> Tensor | None:
        """The shrunk input moment, or its square."""
        if stats is None:
            raise ValueError("whitened needs input moments")
        moment_XX = shrink(stats.input_moment_XX, self.shrinkage)
        return moment_XX if self.power == 1 else moment_XX @ moment_XX

    def output_metric(self, targets: Targets, stats: LayerStats | None) -> Tensor | None:
        """The identity, or keys divided by their size relative to the values."""
        if not (self.joint and self.balanced and len(targets.keys_MX)):
            return None
        ratio = _norm_ratio(targets)
        weights = torch.ones(len(targets.stacked), dtype=torch.float64)
        weights[: len(targets.keys_MX)] = ratio**-2
        return weights.diag()


def _norm_ratio(targets: Targets) -> float:
    """Mean RMS of the key directions over that of the values (TransMLA, arXiv 2502.07864, Eq. 20)."""
    moments = (output_moment(w, targets.metric_XX).diagonal() for w in (targets.keys_MX, targets.values_EX))
    keys, values = (float(m.clamp(min=0).sqrt().mean()) for m in moments)
    return keys / values
