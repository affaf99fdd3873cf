"""Writing directories that can never look finished when they are not, and that a killed run can be continued from.

While work goes on there is only `OUT.partial`. In it, `result` becomes OUT when everything is there; `work` holds what
a rerun continues from, and `run.json` says what run that was. Files appear under their names when they are complete.
Several processes can write into it; rank 0 prepares and finishes it.
"""

import errno
import json
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import CONVERSION_NAME, INDEX_NAME, read_header, read_json
from .errors import BadInput, CareError, DiskFull, Diverged, Interrupted, OtherFailed
from .ranks import first_to_fail, is_main, on_main

RUN_NAME = "run.json"

Say = Callable[[str], None]


def unsaid(message: str) -> None:
    """Say nothing: the default of every library function."""
    del message


def check_output_free(out_dir: Path) -> None:
    """Refuse an output directory that already holds something."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise BadInput(f"output {out_dir} is not empty; name a new directory or remove it")


def partial_of(out_dir: Path) -> Path:
    """Where an output is while it is not complete."""
    return out_dir.absolute().with_name(out_dir.absolute().name + ".partial")


def check_space(out_dir: Path, num_bytes: int) -> None:
    """Refuse to start when the disk cannot hold the output, beside what is there of it; rank 0 looks for all."""
    if not is_main():
        return
    parent = next(p for p in out_dir.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    free += sum(file.stat().st_size for file in partial_of(out_dir).rglob("*") if file.is_file())
    if free < num_bytes:
        raise BadInput(f"{parent} has {free / 1e9:.1f} GB free, the output needs {num_bytes / 1e9:.1f} GB")


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn what the disk refuses into BadInput that names the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if "No space" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            raise DiskFull(f"cannot write {path}: the disk is full; free some space and run this again") from error
        raise BadInput(f"cannot write {path}: {error}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file, complete or not there."""
    part = path.with_suffix(".part")
    with writing(path):
        save_file({key: t.contiguous() for key, t in tensors.items()}, part, dict(metadata))
        part.replace(path)


def save_text(path: Path, content: str) -> None:
    """One UTF-8 file, complete or not there."""
    part = path.with_suffix(".part")
    with writing(path):
        part.write_text(content, encoding="utf-8")
        part.replace(path)


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """One indented JSON file, complete or not there."""
    save_text(path, json.dumps(content, indent=2) + "\n")


class DirectoryWriter:
    """Writes into `OUT.partial` and renames it when complete.

    `run` describes the run, as JSON, as far as it decides about the bytes of the output. What a run of the same
    description left unfinished is continued; anything else is started afresh. What is left behind: nothing after an
    error that the user must mend, everything after a full disk, a loss that is no number, an interrupt, a kill or the
    failure of another process. Without `run` nothing is kept.
    """

    def __init__(self, out_dir: Path, run: Mapping[str, Any] | None = None, say: Say = unsaid) -> None:
        self.out_dir = out_dir.absolute()
        self.partial = partial_of(out_dir)
        self.result, self.work = self.partial / "result", self.partial / "work"
        self._run = None if run is None else json.loads(json.dumps(run))
        self._say = say

    def __enter__(self) -> Self:
        check_output_free(self.out_dir)
        on_main(self._prepare)
        return self

    def _prepare(self) -> None:
        if not self._continues():
            with writing(self.out_dir):
                shutil.rmtree(self.partial, ignore_errors=True)
                self.result.mkdir(parents=True)
                self.work.mkdir()
            if self._run is not None:
                save_json(self.partial / RUN_NAME, self._run)

    def _continues(self) -> bool:
        """Whether the partial output is that of the same run."""
        if self._run is None or not self.partial.exists():
            return False
        try:
            found = read_json(self.partial / RUN_NAME)
        except BadInput:
            found = dict[str, Any]()
        if found == self._run:
            self._say(f"continuing from {self.partial}")
            return True
        other = [key for key in self._run if found.get(key) != self._run[key]] or ["run"]
        self._say(f"{self.partial} is of another {other[0].replace('_', ' ')}; starting afresh")
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            on_main(self._finish)
        elif self._run is None or (
            issubclass(kind, CareError) and not issubclass(kind, DiskFull | Diverged | OtherFailed)
        ):
            # Said before: others may fail at files that are gone, which is not what a person must mend.
            if first_to_fail():
                self._remove()
        elif issubclass(kind, KeyboardInterrupt):
            raise Interrupted(f"interrupted; the same command continues from {self.partial}") from error

    def _remove(self) -> None:
        """In one step for other processes, which may be about to write another file into it."""
        gone = self.partial.with_suffix(".removed")
        with suppress(OSError):
            self.partial.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _finish(self) -> None:
        if self.out_dir.exists():
            self.out_dir.rmdir()
        self.result.rename(self.out_dir)
        shutil.rmtree(self.partial)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """One safetensors file of the result; BadInput when the disk is full."""
        save_tensors(self.result / name, tensors, metadata)

    def write_text(self, name: str, content: str) -> None:
        """One text file of the result."""
        save_text(self.result / name, content)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """One indented JSON file of the result."""
        save_json(self.result / name, content)


class CheckpointWriter(DirectoryWriter):
    """Writes a model as one shard per part, each with a note for the report, and the index last."""

    def __init__(self, out_dir: Path, num_shards: int, run: Mapping[str, Any] | None = None, say: Say = unsaid) -> None:
        super().__init__(out_dir, run, say)
        self._num_shards = num_shards

    def write_shard(self, number: int, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
        """Shard `number` (from 1) of a count that is known in advance; its note is written after it."""
        self.write_tensors(self._shard_name(number), tensors, {"format": "pt"})
        save_json(self._note(number), note or {})

    def has_shard(self, number: int) -> bool:
        """Whether a shard is finished."""
        return self._note(number).is_file()

    def _note(self, number: int) -> Path:
        return self.work / f"shard-{number:05d}.json"

    def _shard_name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self._num_shards:05d}.safetensors"

    def notes(self) -> list[dict[str, Any]]:
        """The notes of all finished shards, in order."""
        numbers = range(1, self._num_shards + 1)
        return [read_json(self._note(number)) for number in numbers if self.has_shard(number)]

    def finish(self, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Index, config and provenance: what makes the directory a checkpoint."""
        self.index()
        self.write_json("config.json", config)
        self.write_json(CONVERSION_NAME, provenance)

    def index(self) -> None:
        """Which tensor is in which shard, once all of them are there."""
        weight_map: dict[str, str] = {}
        num_bytes = 0
        for number in range(1, self._num_shards + 1):
            header = read_header(self.result / self._shard_name(number))
            weight_map |= dict.fromkeys(header, self._shard_name(number))
            num_bytes += sum(last - first for first, last in header.values())
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_json(INDEX_NAME, index)
