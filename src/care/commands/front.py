"""Cache kept against perplexity: which rows of a comparison are worth having, in its JSON and as text."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..pareto import on_front

BAR_WIDTH = 24
OF_ALL, OF_MODE = "*", "+"
"""Marks: no row has as little cache and a lower perplexity; none of the same mode has."""

Record = Mapping[str, Any]


def points(text: str, record: Record) -> list[dict[str, Any]]:
    """What is drawn of one text: the source and the rows that could be had."""
    made = [{**row, "name": row["recipe"]} for row in _measured(record)]
    return [
        {
            "text": Path(text).name, "name": row["name"], "mode": row["mode"], "perplexity": row["perplexity"],
            "bytes_per_token": row["cache_bytes_per_token"], "ours": False,
        }
        for row in ({**record["source"], "name": "source", "mode": ""}, *made)
    ]  # fmt: skip


def fronts(record: Record) -> dict[str, Any]:
    """The rows on the front of all, and of each mode apart, as rebuilding keys is paid for in every step."""
    rows = _measured(record)
    modes = sorted({row["mode"] for row in rows})
    by_mode = {mode: _front(record, [row for row in rows if row["mode"] == mode]) for mode in modes}
    return {"pareto": _front(record, rows), "pareto_by_mode": by_mode}


def _measured(record: Record) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if "refused" not in row]


def _kept(record: Record, row: Record) -> float:
    return row["cache_values_per_token"] / record["source"]["cache_values_per_token"]


def _front(record: Record, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    there = on_front([(_kept(record, row), row["perplexity"]) for row in rows])
    found = [
        {key: row[key] for key in ("recipe", "mode", "kv_budget", "perplexity")} | {"cache_kept": _kept(record, row)}
        for row, on in zip(rows, there, strict=True) if on
    ]  # fmt: skip
    return sorted(found, key=lambda row: -row["cache_kept"])


def marks(record: Record) -> list[str]:
    """Each row's mark; none for a row off the front or refused."""

    def among(front: list[dict[str, Any]], row: Record) -> bool:
        return any(all(row[key] == on[key] for key in ("recipe", "mode", "kv_budget")) for on in front)

    return [
        OF_ALL if among(record["pareto"], row) else
        OF_MODE if among(record["pareto_by_mode"].get(row["mode"], []), row) else ""
        for row in record["rows"]
    ]  # fmt: skip


def fronts_text(text: str, record: Record) -> str:
    """One line per row, cache from large to small: what is kept, the perplexity, and a bar as long as what is lost."""
    marked = [(row, mark) for row, mark in zip(record["rows"], marks(record), strict=True) if "refused" not in row]
    marked.sort(key=lambda pair: (-_kept(record, pair[0]), pair[0]["perplexity"]))
    most = round(max((row["excess"] for row, _ in marked), default=0.0), 3)
    names = [f"{row['recipe']} {row['kv_budget']:g} ({row['mode']})" for row, _ in marked]
    width = max(map(len, ("source", *names)))
    lines = [
        f"{text}: cache kept against perplexity; bars are ln(perplexity / that of the source), the longest {most:.3f}",
        f"  {'source':<{width}} {1:>7.1%} {record['source']['perplexity']:>12,.2f}",
    ]
    for name, (row, mark) in zip(names, marked, strict=True):
        bar = "\u2588" * math.ceil(BAR_WIDTH * max(round(row["excess"], 3), 0.0) / most) if most > 0 else ""
        lines.append(f"{mark:<1} {name:<{width}} {_kept(record, row):>7.1%} {row['perplexity']:>12,.2f} {bar}".rstrip())
    explained = f"{OF_ALL} on the front: no other row has as little cache and a lower perplexity"
    lines.append(explained + (f"; {OF_MODE} on that of its mode" if len(record["pareto_by_mode"]) > 1 else ""))
    return "\n".join(lines)
