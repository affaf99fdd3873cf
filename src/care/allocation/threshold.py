"""One threshold for everything: rope slots and latent ranks of all layers compete for the same budget.

Losses are in units of the model's loss, so that a value cached anywhere is worth what it saves. Per layer and number
of slots n the loss is what the dropped rotations cost plus the tail of the latent's spectrum; the total plus
lambda times the width is minimized layer by layer, and lambda is bisected until the budget is met.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidRecipe

BISECTIONS = 60
FIRST_STEPS = 4096
"""How fast the price falls until it is too low for the first time."""

TINY = 1e-30
"""Keeps the price above zero where no layer has energy."""


Layers = Sequence[Mapping[int, tuple[float, Tensor]]]
"""Per layer: number of slots to the loss of the dropped rotations and the latent's energies, descending."""


@dataclass(frozen=True)
class Threshold:
    """Global allocation; `slot_step` is how finely numbers of rope slots are tried.

    Ranks and rotary dims are multiples of `multiple`, as kernels like them; a rank may also be all that there is.
    """

    slot_step: int = 4
    multiple: int = 1
    uses_spectra: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("slot_step", "multiple"):
            if getattr(self, name) < 1:
                raise InvalidRecipe(f"allocation.{name} is {getattr(self, name)}; it must be at least 1")

    def slot_counts(self, most: int) -> range:
        """Numbers of rope slots to try, from none to `most`."""
        return range(0, most + 1, math.lcm(self.slot_step, self.multiple // math.gcd(2, self.multiple)))

    def __call__(self, spectra: Sequence[Tensor], caps: Sequence[int], budget: int) -> tuple[int, ...]:
        """Ranks alone: the largest squared singular values of all layers together."""
        choices = [{0: (0.0, s[:cap])} for s, cap in zip(spectra, caps, strict=True)]
        return tuple(rank for _, rank in self.choose(choices, budget))

    def choose(self, layers: Layers, budget: int, least: int = 1) -> list[tuple[int, int]]:
        """(slots, rank) per layer; widths 2 * slots + rank add up to the budget, or as near as multiples come.

        Each layer maps a number of slots to the loss of the dropped rotations and the latent's squared
        singular values, descending. No layer gets less than `least` of them. The caller ensures that the budget
        can be met.
        """
        largest = max((float(e[0]) for layer in layers for _, e in layer.values() if len(e)), default=0.0)
        low, high = 0.0, 2 * largest + TINY
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5 if low else high / FIRST_STEPS
            chosen = [_cheapest(layer, middle, self.multiple, least) for layer in layers]
            if sum(2 * n + r for n, r in chosen) > budget:
                low = middle
            else:
                high = middle
        chosen = [_cheapest(layer, high, self.multiple, least) for layer in layers]
        return _spend_rest(layers, chosen, budget, self.multiple)


def predicted_loss(layers: Layers, chosen: Sequence[tuple[int, int]]) -> float:
    """What the dropped rotations and latent directions of all layers cost together."""
    return sum(dropped_loss(layer, *choice) for layer, choice in zip(layers, chosen, strict=True))


def dropped_loss(layer: Mapping[int, tuple[float, Tensor]], slots: int, rank: int) -> float:
    """The same for one layer."""
    rotations, energy_S = layer[slots]
    return rotations + float(energy_S[rank:].sum())


def _cheapest(layer: Mapping[int, tuple[float, Tensor]], price: float, multiple: int, least: int) -> tuple[int, int]:
    """The (slots, rank) of a layer with the least loss plus price times width."""
    best: tuple[float, int, int] | None = None
    for slots, (_, energy_S) in layer.items():
        below = int((energy_S > price).sum()) // multiple * multiple
        floor = min(max(multiple, least), len(energy_S))
        for rank in {max(below, floor), max(min(below + multiple, len(energy_S)), floor)}:
            cost = dropped_loss(layer, slots, rank) + price * (2 * slots + rank)
            if best is None or (cost, slots, rank) < best:
                best = (cost, slots, rank)
    assert best is not None
    return best[1], best[2]


def _spend_rest(layers: Layers, chosen: list[tuple[int, int]], budget: int, multiple: int) -> list[tuple[int, int]]:
    """Give what the bisection left over, step by step, to the largest next energies."""
    rest = budget - sum(2 * n + r for n, r in chosen)
    while rest > 0:
        nexts = [layer[n][1][r : r + multiple] for layer, (n, r) in zip(layers, chosen, strict=True)]
        gains = [float(e.sum()) if 0 < len(e) <= rest else -1.0 for e in nexts]
        best = int(torch.tensor(gains).argmax())
        if gains[best] < 0:
            break
        chosen[best] = (chosen[best][0], chosen[best][1] + len(nexts[best]))
        rest -= len(nexts[best])
    return chosen
