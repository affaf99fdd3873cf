"""The same rank in every layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Uniform:
    """Equal ranks; what does not divide evenly goes one each to the first layers."""

    uses_spectra: ClassVar[bool] = False

    def __call__(self, spectra: Sequence[Tensor], caps: Sequence[int], budget: int) -> tuple[int, ...]:
        """Fill all layers level by level until the budget is spent; a capped layer passes its share on."""
        ranks = [0] * len(caps)
        while budget:
            open_layers = [i for i, cap in enumerate(caps) if ranks[i] < cap]
            share = max(budget // len(open_layers), 1)
            for i in open_layers[:budget]:
                step = min(share, caps[i] - ranks[i])
                ranks[i] += step
                budget -= step
        return tuple(ranks)
