"""CARE's adjusted-rank allocation (arXiv 2603.17946, Eq. 1), as the paper states it."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import InvalidRecipe


@dataclass(frozen=True)
class Greedy:
    """One rank at a time to the layer with the largest sigma_{r+1}^2 / sum_{m>r} sigma_m^2.

    Every layer starts at `floor` times the mean rank and stops at `ceiling` times it; 0.5 and 2 are
    the defaults of the authors' code. (That code also multiplies in depth and rank terms that the paper
    does not state; they are left out.)
    """

    floor: float = 0.5
    ceiling: float = 2.0
    uses_spectra: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1 <= self.ceiling:
            raise InvalidRecipe(f"allocation floor {self.floor} and ceiling {self.ceiling} must enclose 1")

    def __call__(self, spectra: Sequence[Tensor], caps: Sequence[int], budget: int) -> tuple[int, ...]:
        """Ranks of at least 1 that spend the budget exactly; the ceiling yields when all layers have reached it."""
        mean = budget / len(caps)
        ranks = [min(max(int(self.floor * mean), 1), cap) for cap in caps]
        soft_caps = [min(max(int(self.ceiling * mean), 1), cap) for cap in caps]
        budget -= sum(ranks)
        for limits in (soft_caps, list(caps)):
            budget = _spend(spectra, ranks, limits, budget)
        return tuple(ranks)


def _residual_share(energy: list[float], tail: list[float], rank: int) -> float:
    return energy[rank] / tail[rank] if tail[rank] > 0 else 0.0


def _spend(spectra: Sequence[Tensor], ranks: list[int], limits: list[int], budget: int) -> int:
    """Raise `ranks` in place up to the limits; returns what is left of the budget."""
    energies = [s.tolist() for s in spectra]
    tails = [s.flip(0).cumsum(0).flip(0).tolist() for s in spectra]

    def entry(layer: int) -> tuple[float, int]:
        return -_residual_share(energies[layer], tails[layer], ranks[layer]), layer

    queue = [entry(i) for i, limit in enumerate(limits) if ranks[i] < limit]
    heapq.heapify(queue)
    while budget and queue:
        _, layer = heapq.heappop(queue)
        ranks[layer] += 1
        budget -= 1
        if ranks[layer] < limits[layer]:
            heapq.heappush(queue, entry(layer))
    return budget
