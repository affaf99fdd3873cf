"""What every allocator must do: spend the budget exactly, within the caps, whatever the order of layers."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from care.allocation import ALLOCATORS, Allocator, Greedy, Uniform
from care.errors import InvalidRecipe

EVERY = pytest.mark.parametrize("allocator", [pytest.param(kind(), id=name) for name, kind in ALLOCATORS.items()])
SLACK = 1e9


def unbounded(allocator: Allocator) -> Allocator:
    """Without a floor and a ceiling that move with the budget, where an allocator has them."""
    bounds = {"floor": 0.0, "ceiling": SLACK}
    options: Any = {k: v for k, v in bounds.items() if hasattr(allocator, k)}
    return replace(allocator, **options) if options else allocator  # pyright: ignore[reportArgumentType]


@st.composite
def problems(draw: st.DrawFn, beyond: int = 0) -> tuple[list[Tensor], list[int], int]:
    """Generic spectra, longer than the caps by at least `beyond`, and a budget that the contract allows."""
    size = draw(st.integers(1, 8))
    caps = draw(st.lists(st.integers(1, size), min_size=1, max_size=6))
    budget = draw(st.integers(len(caps), sum(caps)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    length = size + beyond
    spectra = [torch.rand(length, generator=generator, dtype=torch.float64).sort(descending=True).values for _ in caps]
    return spectra, caps, budget


@EVERY
@given(problem=problems())
def test_the_budget_is_spent_exactly_within_the_caps(allocator: Allocator, problem: Any) -> None:
    spectra, caps, budget = problem
    ranks = allocator(spectra, caps, budget)
    assert len(ranks) == len(caps)
    assert sum(ranks) == budget
    assert all(1 <= rank <= cap for rank, cap in zip(ranks, caps, strict=True))


@EVERY
def test_nothing_is_spread_where_there_is_nothing(allocator: Allocator) -> None:
    empty = [torch.zeros(0, dtype=torch.float64)] * 3
    assert allocator(empty, [0, 0, 0], 0) == (0, 0, 0)


@EVERY
def test_layers_without_energy_still_share_the_budget(allocator: Allocator) -> None:
    zeros = [torch.zeros(6, dtype=torch.float64)] * 3
    ranks = allocator(zeros, [6, 6, 6], 11)
    assert sum(ranks) == 11
    assert max(ranks) <= 6


@EVERY
@given(problem=problems(beyond=1), data=st.data())
def test_permuting_layers_permutes_ranks(allocator: Allocator, problem: Any, data: st.DataObject) -> None:
    """One by one for those that look at spectra; the others may favor the first layers with what is left over.

    No cap reaches the end of a spectrum: the last direction is always all that is left, a tie under CARE's Eq. 1.
    """
    spectra, caps, budget = problem
    order = data.draw(st.permutations(range(len(caps))))
    ranks = allocator(spectra, caps, budget)
    moved = allocator([spectra[i] for i in order], [caps[i] for i in order], budget)
    expected = [ranks[i] for i in order]
    if allocator.uses_spectra:
        assert list(moved) == expected
    else:
        assert sorted(moved) == sorted(expected)


@EVERY
@given(problem=problems())
def test_more_budget_takes_nothing_away(allocator: Allocator, problem: Any) -> None:
    """So the kept energy never falls; bounds that follow the mean rank are taken off first."""
    spectra, caps, _ = problem
    free = unbounded(allocator)
    kept = []
    for budget in range(len(caps), sum(caps) + 1):
        ranks = free(spectra, caps, budget)
        kept.append((ranks, sum(float(s[:r].sum()) for s, r in zip(spectra, ranks, strict=True))))
    for (before, less), (after, more) in pairwise(kept):
        assert all(b <= a for b, a in zip(before, after, strict=True))
        assert less <= more


def test_uniform_is_uniform() -> None:
    assert Uniform()([], [4] * 5, 10) == (2,) * 5
    assert Uniform()([], [4] * 5, 12) == (3, 3, 2, 2, 2)


def test_uniform_passes_on_what_a_capped_layer_cannot_use() -> None:
    assert Uniform()([], [2, 9, 9], 14) == (2, 6, 6)
    assert Uniform()([], [2, 9, 9], 15) == (2, 7, 6)


def test_impossible_greedy_bounds_are_refused() -> None:
    for options in ({"floor": 1.5}, {"ceiling": 0.5}, {"floor": -0.1}):
        with pytest.raises(InvalidRecipe, match="must enclose 1"):
            Greedy(**options)
