"""Several processes that share one job, as torchrun starts them; without torchrun there is one, which does all of it.

Every process runs the same program: windows and layers are split by the functions here, sums are over all of them,
and rank 0 alone writes what is shared. Processes meet in collective calls, so all must make the same ones in the same
order. A process that ends closes its connections; the others notice where they next meet and end too.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from .errors import BadInput, OtherFailed

Made = TypeVar("Made")

PATIENCE = timedelta(days=7)
"""How long a process waits for another that is still at work; one that has ended is noticed at once."""


@dataclass
class _Joined:
    """This process among `world` of them, `local` among those of its machine; sums are made on `device`."""

    rank: int
    world: int
    local: int
    store: Store
    device: str = "cpu"
    first_to_fail: bool | None = None


_joined: _Joined | None = None


@contextmanager
def joined(local_rank: int) -> Generator[None]:
    """Join the processes that torchrun started: gloo for what is on CPUs, NCCL for GPUs."""
    global _joined
    store, rank, world = next(iter(rendezvous("env://")))
    dist.init_process_group(store=store, rank=rank, world_size=world, timeout=PATIENCE)
    _joined = _Joined(rank, world, local_rank, store)
    try:
        yield
        # Not after an error: others may be in the middle of a call that this process will not make.
        dist.destroy_process_group()
    finally:
        _joined = None


def world() -> int:
    """How many processes there are."""
    return 1 if _joined is None else _joined.world


def rank() -> int:
    """Which of them this one is, from 0."""
    return 0 if _joined is None else _joined.rank


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def first_to_fail() -> bool:
    """Whether no other process has failed before this one: its message matters, and it cleans up. Asked on failing."""
    if _joined is None:
        return True
    if _joined.first_to_fail is None:
        try:
            _joined.first_to_fail = _joined.store.add("care/failed", 1) == 1
        except RuntimeError:
            _joined.first_to_fail = True  # the store went down with another process; two messages are better than none
    return _joined.first_to_fail


def own_device(device: str) -> str:
    """The device of this process: each has a GPU of its own. BadInput where that cannot be."""
    if _joined is None or device == "cpu":
        return device
    if device != "cuda":
        raise BadInput(f"{world()} processes cannot share device {device!r}; give --device cuda, a GPU to each, or cpu")
    if _joined.local >= torch.cuda.device_count():
        raise BadInput(f"{torch.cuda.device_count()} GPUs here for more processes; lower --nproc-per-node")
    torch.cuda.set_device(_joined.local)
    _joined.device = f"cuda:{_joined.local}"
    return _joined.device


def own_batches(count: int) -> range:
    """Which of `count` batches are this process's: in turns, so that the first of all are the first of each."""
    return range(rank(), count, world())


def own_items(items: Sequence[Made]) -> Sequence[Made]:
    """The items that this process works on: in turns."""
    return items[rank() :: world()]


def own_directory(directory: Path) -> Path:
    """Where this process keeps what only it reads, in a directory of all; a single process has that to itself."""
    own = directory if _joined is None else directory / f"rank-{rank():05d}"
    own.mkdir(parents=True, exist_ok=True)
    return own


@contextmanager
def _meeting() -> Generator[None]:
    """A collective call; RuntimeError is what torch raises when a process is not there anymore."""
    try:
        yield
    except RuntimeError as error:
        raise OtherFailed(
            "another of the processes ended, see its own message if it left one; "
            "the same command continues what was done"
        ) from error


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors of this shape, the same on all; the tensor itself in a single process."""
    if _joined is None:
        return tensor
    with _meeting():
        total = tensor.to(_joined.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)


def count_over_ranks(count: int) -> int:
    """The sum of all processes' counts."""
    return int(sum_over_ranks(torch.tensor(count)))


def all_items(own: Sequence[Made]) -> list[Made]:
    """What all processes made of their `own_items`, in the order of the items."""
    if _joined is None:
        return list(own)
    shares: list[Any] = [None] * world()
    with _meeting():
        dist.all_gather_object(shares, list(own))
    return [shares[i % world()][i // world()] for i in range(sum(map(len, shares)))]


def from_main(make: Callable[[], Made]) -> Made:
    """What rank 0 makes, on all processes."""
    if _joined is None:
        return make()
    made = [make() if is_main() else None]
    with _meeting():
        dist.broadcast_object_list(made, src=0)
    return cast("Made", made[0])


def wait_for_all() -> None:
    """Go on when all processes have come this far."""
    sum_over_ranks(torch.zeros(1))


def on_main(do: Callable[[], object]) -> None:
    """Have rank 0 do something, when all have come this far; all go on when it is done."""
    wait_for_all()
    if is_main():
        do()
    wait_for_all()


@contextmanager
def shared_directory() -> Generator[Path]:
    """A temporary directory, the same one on all processes."""
    with TemporaryDirectory(prefix="care-") as own:
        yield Path(from_main(lambda: own))
        wait_for_all()
