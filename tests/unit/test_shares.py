"""How work is split: everything once, in order, with nothing for some where there is little."""

import pytest
import torch

from care import ranks
from care.calibration import own_windows
from care.calibration.streams import batches_of
from care.errors import BadInput

WORLDS = (1, 2, 3, 5)


def become(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, local: int = 0) -> None:
    """Have this process take itself for one of several."""
    monkeypatch.setattr(ranks, "_joined", ranks._Joined(rank, world, local, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", range(8))
def test_every_batch_and_item_has_one_process(monkeypatch: pytest.MonkeyPatch, count: int, world: int) -> None:
    batches: list[int] = []
    first: list[int] = []
    items: dict[int, str] = {}
    for rank in range(world):
        become(monkeypatch, rank, world)
        batches += ranks.own_batches(count)
        first += ranks.own_batches(count)[: len(ranks.own_batches(count // 2))]
        own = ranks.own_items("abcdefgh"[:count])
        items |= {rank + turn * world: item for turn, item in enumerate(own)}
    assert sorted(batches) == list(range(count))
    assert sorted(first) == list(range(count // 2))
    assert [items[i] for i in range(count)] == list("abcdefgh"[:count])


@pytest.mark.parametrize("world", WORLDS)
def test_windows_are_split_between_batches(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setattr("care.calibration.streams.BATCH_TOKENS", 10)
    windows_BT = torch.arange(35).view(7, 5)
    found: list[torch.Tensor] = []
    for rank in range(world):
        become(monkeypatch, rank, world)
        found += batches_of(own_windows(windows_BT))
    found.sort(key=lambda part_BT: int(part_BT[0, 0]))
    assert [part_BT.tolist() for part_BT in found] == [part_BT.tolist() for part_BT in windows_BT.split(2)]


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert ranks.own_device("cuda:1") == "cuda:1"
    become(monkeypatch, 1, 3, local=1)
    assert (ranks.own_device("cuda"), ranks.own_device("cpu"), chosen) == ("cuda:1", "cpu", [1])
    become(monkeypatch, 2, 3, local=2)
    with pytest.raises(BadInput, match=r"2 GPUs here for more processes; lower --nproc-per-node"):
        ranks.own_device("cuda")
