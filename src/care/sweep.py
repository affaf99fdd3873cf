"""Finished rows of a comparison, and the statistics behind them, in a directory.

A file is named by a hash of everything that decides about what is in it, so a row is found again by the same question
and by no other, whatever else the directory holds. A row holds its question too, for a person.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from .calibration import Calibration, CalibrationInfo, is_calibration, load_calibration, parse_info
from .checkpoint import read_json
from .errors import BadInput
from .estimate import calibration_bytes
from .evaluation import Bucket, CacheUse, Quality
from .output import DirectoryWriter, Say, check_space, save_json, unsaid, writing
from .progress import Track, silent
from .source import Source
from .statistics import STATISTICS, CalibrationRequest, calibrate, describe_run


@dataclass(frozen=True)
class Made:
    """How a variant was made: values cached per token and layer, folding where one was searched, seconds."""

    mean_width: float
    folding: int | None
    seconds: float
    calibration: CalibrationInfo | None


@dataclass(frozen=True)
class Row:
    """What was measured of one model on one text; `made` is None for the source."""

    quality: Quality
    cache: CacheUse
    made: Made | None = None


class SweepDirectory:
    """Rows in `rows/`, statistics in `statistics-HASH/`.

    With `lasting`, statistics that are not complete are left for the next run too.
    """

    def __init__(self, directory: Path, *, lasting: bool, say: Say = unsaid) -> None:
        self._directory, self._lasting, self._say = directory, lasting, say
        with writing(directory):
            (directory / "rows").mkdir(parents=True, exist_ok=True)

    def _row_file(self, name: str, question: Mapping[str, Any]) -> Path:
        return self._directory / "rows" / f"{name}-{digest(question)}.json"

    def row(self, name: str, question: Mapping[str, Any]) -> Row | None:
        """The answer, if it is there; BadInput if its file is damaged."""
        file = self._row_file(name, question)
        if not file.is_file():
            return None
        try:
            return _parsed(read_json(file)["row"])
        except (BadInput, KeyError, TypeError) as error:
            raise BadInput(f"{file} is damaged; remove it and run this again") from error

    def save_row(self, name: str, question: Mapping[str, Any], row: Row) -> None:
        """One row; its file is complete or not there."""
        save_json(self._row_file(name, question), {"question": question, "row": asdict(row)})

    def statistics(
        self, source: Source, request: CalibrationRequest, needs: frozenset[str], track: Track = silent
    ) -> Calibration:
        """Statistics as asked for, collected here unless they, or ones with more in them, are there."""
        if is_calibration(Path(request.text)):
            return calibrate(source, request)
        run = describe_run(source, request)
        for more in _with_more(needs):
            if is_calibration(self._statistics(run, more)):
                return load_calibration(self._statistics(run, more))
        place, asked = self._statistics(run, needs), {**run, "statistics": sorted(needs)}
        check_space(place, calibration_bytes(source, needs, request))
        with DirectoryWriter(place, asked if self._lasting else None, self._say) as writer:
            calibrate(source, request, needs, directory=writer.result, track=track)
        return load_calibration(place)

    def _statistics(self, run: Mapping[str, Any], needs: frozenset[str]) -> Path:
        return self._directory / f"statistics-{digest({**run, 'statistics': sorted(needs)})}"


def digest(question: Mapping[str, Any]) -> str:
    """A short hash of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]


def _with_more(needs: frozenset[str]) -> list[frozenset[str]]:
    """All sets of statistics that hold these, the smallest first."""
    others = sorted(STATISTICS - needs)
    return [needs.union(more) for count in range(len(others) + 1) for more in combinations(others, count)]


def _parsed(row: Mapping[str, Any]) -> Row:
    return Row(_quality(**row["quality"]), CacheUse(**row["cache"]), row["made"] and _made(**row["made"]))


def _quality(buckets: list[dict[str, Any]], **means: Any) -> Quality:  # noqa: ANN401 - from JSON
    return Quality(**means, buckets=tuple(Bucket(**bucket) for bucket in buckets))


def _made(calibration: dict[str, Any] | None, **facts: Any) -> Made:  # noqa: ANN401 - from JSON
    return Made(**facts, calibration=None if calibration is None else parse_info(calibration))
