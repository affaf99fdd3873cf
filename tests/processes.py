"""`care` in processes of its own, one or several that share the work, and ways to end them early."""

import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple

import care.cli

DEADLINE = 120.0
"""Seconds after which processes that wait for one another would have hung."""


class Ended(NamedTuple):
    """How a process ended: its exit code, or minus the signal that it died of, and what it said on stderr."""

    code: int
    said: str


def die_before_file(number: int) -> None:
    """Kill this process when its file `number` is complete and about to be named."""
    real, named = Path.replace, [0]

    def replace(self: Path, target: Any) -> Path:
        named[0] += 1
        if named[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, target)

    Path.replace = replace  # type: ignore[method-assign]


def start_care(
    arguments: tuple[object, ...], said: Path, environment: dict[str, str], prepare: Callable[[], None]
) -> ForkProcess:
    """Start `care ARGUMENTS`, with something done before in its process."""

    def run() -> None:
        os.environ.update(environment)
        prepare()
        sys.argv = ["care", *map(str, arguments)]
        with said.open("w", encoding="utf-8", buffering=1) as sys.stderr, open(os.devnull, "w") as sys.stdout:
            care.cli.main()

    process = multiprocessing.get_context("fork").Process(target=run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which are all idle
        process.start()
    return process


def run_care(tmp_path: Path, *arguments: object, prepare: Callable[[], None] = lambda: None) -> Ended:
    """Run `care ARGUMENTS` in one process."""
    process = start_care(arguments, tmp_path / "said", {}, prepare)
    process.join()
    return ended(process, tmp_path / "said")


def run_ranks(
    tmp_path: Path, count: int, *arguments: object, prepare: Callable[[int], None] = lambda _rank: None
) -> list[Ended]:
    """Run `care ARGUMENTS` in several processes with what torchrun tells them; none may outlive DEADLINE."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1]), "WORLD_SIZE": str(count)}
    processes = [
        start_care(
            arguments, tmp_path / f"said-{rank}", {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            lambda rank=rank: prepare(rank),
        )
        for rank in range(count)
    ]  # fmt: skip
    for process in processes:
        process.join(DEADLINE)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [ended(process, tmp_path / f"said-{rank}") for rank, process in enumerate(processes)]


def ended(process: ForkProcess, said: Path) -> Ended:
    """What became of a process that has ended."""
    assert process.exitcode is not None
    return Ended(process.exitcode, said.read_text(encoding="utf-8"))
