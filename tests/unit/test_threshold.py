"""The global threshold, against all allocations that there are."""

from itertools import product

import pytest
import torch

from care.allocation import Threshold, predicted_loss
from care.errors import InvalidRecipe
from tolerances import TOLERANCES

Layers = list[dict[int, tuple[float, torch.Tensor]]]


def random_layers(seed: int, num_layers: int = 3) -> Layers:
    """Losses that fall with the number of slots, and falling spectra that get shorter by two values a slot."""
    generator = torch.Generator().manual_seed(seed)
    layers: Layers = []
    for _ in range(num_layers):
        gains = torch.rand(2, generator=generator, dtype=torch.float64).sort(descending=True).values
        layers.append({})
        for n in range(3):
            energy = torch.rand(6 - n, generator=generator, dtype=torch.float64).sort(descending=True).values
            layers[-1][n] = (float(gains[n:].sum()), energy)
    return layers


def loss(layers: Layers, chosen: list[tuple[int, int]]) -> float:
    """What a choice loses."""
    return sum(layer[n][0] + float(layer[n][1][r:].sum()) for layer, (n, r) in zip(layers, chosen, strict=True))


def exhaustive(layers: Layers, budget: int) -> float:
    """The least loss within the budget, over every choice of slots and of ranks from 1 on."""
    options = [[(n, r) for n, (_, e) in layer.items() for r in range(1, len(e) + 1)] for layer in layers]
    widths = (list(c) for c in product(*options))
    return min(loss(layers, c) for c in widths if sum(2 * n + r for n, r in c) <= budget)


@pytest.mark.parametrize("seed", range(6))
def test_at_its_own_prices_nothing_is_better(seed: int) -> None:
    """Between prices the leftover is spent greedily; where nothing is left over the choice is the optimum."""
    layers = random_layers(seed)
    optimal = 0
    for budget in range(6, 19):
        chosen = Threshold().choose(layers, budget)
        assert sum(2 * n + r for n, r in chosen) == budget
        least = exhaustive(layers, budget)
        assert loss(layers, chosen) >= least - TOLERANCES["fp64"].absolute
        optimal += loss(layers, chosen) <= least + TOLERANCES["fp64"].absolute
    assert optimal >= 4


@pytest.mark.parametrize("seed", range(6))
def test_ranks_alone_are_the_largest_energies(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = [torch.rand(9, generator=generator, dtype=torch.float64).sort(descending=True).values for _ in range(4)]
    ranks = Threshold()(spectra, [9] * 4, 17)
    kept = sum(float(s[:r].sum()) for s, r in zip(spectra, ranks, strict=True))
    certain = sum(float(s[0]) for s in spectra)
    others = torch.cat([s[1:] for s in spectra]).sort(descending=True).values[: 17 - 4]
    assert abs(kept - certain - float(others.sum())) <= TOLERANCES["fp64"].absolute


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("multiple", [2, 3])
def test_multiples_are_kept_and_nothing_in_multiples_is_better_at_their_prices(seed: int, multiple: int) -> None:
    layers = [{n: choice for n, choice in layer.items() if 2 * n % multiple == 0} for layer in random_layers(seed)]
    optimal = 0
    for budget in range(3 * multiple, 19):
        chosen = Threshold(multiple=multiple).choose(layers, budget)
        full = [len(layer[n][1]) for layer, (n, _) in zip(layers, chosen, strict=True)]
        assert all(r % multiple == 0 or r == most for (_, r), most in zip(chosen, full, strict=True))
        assert sum(2 * n + r for n, r in chosen) <= budget
        options = [
            [(n, r) for n, (_, e) in layer.items() for r in {*range(multiple, len(e), multiple), len(e)}]
            for layer in layers
        ]
        least = min(loss(layers, list(c)) for c in product(*options) if sum(2 * n + r for n, r in c) <= budget)
        optimal += predicted_loss(layers, chosen) <= least + TOLERANCES["fp64"].absolute
    assert optimal >= 3


def test_slot_counts_keep_rotary_dims_in_multiples() -> None:
    assert list(Threshold(slot_step=4).slot_counts(12)) == [0, 4, 8, 12]
    assert list(Threshold(slot_step=1, multiple=8).slot_counts(12)) == [0, 4, 8, 12]
    assert list(Threshold(slot_step=4, multiple=16).slot_counts(24)) == [0, 8, 16, 24]
    assert list(Threshold(slot_step=4, multiple=2).slot_counts(8)) == [0, 4, 8]


def test_impossible_steps_are_refused() -> None:
    for bad in ({"slot_step": 0}, {"multiple": 0}):
        with pytest.raises(InvalidRecipe, match=r"allocation\."):
            Threshold(**bad)
