"""CARE's Eq. 1 against a slow loop that is the paper's sentence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from care.allocation import Greedy


def by_the_paper(
    spectra: list[list[float]], caps: list[int], budget: int, floor: float, ceiling: float
) -> tuple[int, ...]:
    """Start all at the floor; give one rank at a time to the layer with the largest s_{r+1} / sum_{m>r} s_m."""
    mean = budget / len(caps)
    ranks = [min(max(int(floor * mean), 1), cap) for cap in caps]
    limits = [min(max(int(ceiling * mean), 1), cap) for cap in caps]
    while sum(ranks) < budget:
        open_layers = [i for i in range(len(caps)) if ranks[i] < limits[i]]
        if not open_layers:
            limits = caps
            continue
        shares = {i: spectra[i][ranks[i]] / sum(spectra[i][ranks[i] :]) for i in open_layers}
        ranks[max(shares, key=lambda i: (shares[i], -i))] += 1
    return tuple(ranks)


@given(
    num_layers=st.integers(1, 5), size=st.integers(2, 12), seed=st.integers(0, 999), share=st.floats(0.05, 1),
    floor=st.sampled_from([0.0, 0.5, 1.0]), ceiling=st.sampled_from([1.0, 1.3, 2.0]),
)  # fmt: skip
def test_greedy_is_the_papers_loop(
    num_layers: int, size: int, seed: int, share: float, floor: float, ceiling: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = [
        torch.rand(size + 1, generator=generator).double().sort(descending=True).values for _ in range(num_layers)
    ]
    caps = torch.randint(1, size + 1, (num_layers,), generator=generator).tolist()
    budget = max(int(share * sum(caps)), num_layers)
    expected = by_the_paper([s.tolist() for s in spectra], caps, budget, floor, ceiling)
    assert Greedy(floor, ceiling)(spectra, caps, budget) == expected


def test_the_share_decides_not_the_size() -> None:
    """A layer with large but flat energies waits; one with little but concentrated energy goes first."""
    flat, steep = torch.full((8,), 100.0), torch.tensor([1.0, 0.5, 0.25, 0.1, 0.05, 0.01, 0.01, 0.01])
    assert Greedy(floor=0.0, ceiling=2.0)([flat, steep], [8, 8], 8) == (1, 7)


@pytest.mark.parametrize(("floor", "ceiling", "ranks"), [(1.0, 1.0, (4, 4)), (0.5, 2.0, (2, 6)), (0.0, 1.5, (2, 6))])
def test_bounds_follow_the_mean(floor: float, ceiling: float, ranks: tuple[int, int]) -> None:
    flat, steep = torch.full((8,), 100.0), torch.tensor([1.0, 0.5, 0.25, 0.1, 0.05, 0.01, 0.01, 0.01])
    assert Greedy(floor, ceiling)([flat, steep], [8, 8], 8) == ranks
