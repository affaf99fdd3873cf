"""One threshold for everything: rope slots and latent ranks of all layers compete for the same budget.

Losses are in units of the model's loss, so that a value cached anywhere is worth what it saves. Per layer and number
of slots n the loss is what the dropped rotations cost plus the tail of the latent's spectrum; the total plus
lambda times the width is minimized layer by layer, and lambda is bisected until the budget is met.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

BISECTIONS = 60
FIRST_STEPS = 4096
"""How fast the price falls until it is too low for the first time."""

TINY = 1e-30
"""Keeps the price above zero where no layer has energy."""


@dataclass(frozen=True)
class Threshold:
    """Global allocation; `slot_step` is how finely numbers of rope slots are tried."""

    slot_step: int = 4
    uses_spectra: ClassVar[bool] = True

    def __call__(self, spectra: Sequence[Tensor], caps: Sequence[int], budget: int) -> tuple[int, ...]:
        """Ranks alone: the largest squared singular values of all layers together."""
        choices = [{0: (0.0, s[:cap])} for s, cap in zip(spectra, caps, strict=True)]
        return tuple(rank for _, rank in self.choose(choices, budget))

    def choose(self, layers: Sequence[Mapping[int, tuple[float, Tensor]]], budget: int) -> list[tuple[int, int]]:
        """(slots, rank) per layer, with widths 2 * slots + rank that add up to the budget exactly.

        Each layer maps a number of slots to the loss of the dropped rotations and the latent's squared
        singular values, descending. The caller ensures that the budget can be met.
        """
        largest = max((float(e[0]) for layer in layers for _, e in layer.values() if len(e)), default=0.0)
        low, high = 0.0, 2 * largest + TINY
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5 if low else high / FIRST_STEPS
            chosen = [_cheapest(layer, middle) for layer in layers]
            if sum(2 * n + r for n, r in chosen) > budget:
                low = middle
            else:
                high = middle
        chosen = [_cheapest(layer, high) for layer in layers]
        return _spend_rest(layers, chosen, budget)


def _cheapest(layer: Mapping[int, tuple[float, Tensor]], price: float) -> tuple[int, int]:
    """The (slots, rank) of a layer with the least loss plus price times width."""
    best: tuple[float, int, int] | None = None
    for slots, (dropped, energy_S) in layer.items():
        rank = max(int((energy_S > price).sum()), min(1, len(energy_S)))
        cost = dropped + float(energy_S[rank:].sum()) + price * (2 * slots + rank)
        if best is None or cost < best[0]:
            best = (cost, slots, rank)
    assert best is not None
    return best[1], best[2]


def _spend_rest(
    layers: Sequence[Mapping[int, tuple[float, Tensor]]], chosen: list[tuple[int, int]], budget: int
) -> list[tuple[int, int]]:
    """Give what the bisection left over, rank by rank, to the largest next energies."""
    rest = budget - sum(2 * n + r for n, r in chosen)
    while rest > 0:
        gains = [
            float(e[r]) if len(e := layer[n][1]) > r else -1.0 for layer, (n, r) in zip(layers, chosen, strict=True)
        ]
        best = int(torch.tensor(gains).argmax())
        if gains[best] < 0:
            break
        chosen[best] = (chosen[best][0], chosen[best][1] + 1)
        rest -= 1
    return chosen
