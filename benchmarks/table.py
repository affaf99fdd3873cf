"""The README's tables from the JSON of `care compare`: one per text, then ours beside the best published recipe.

Usage: python benchmarks/table.py compare.json [compare.json ...]
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = ("recipe", "mode", "cache kept", "perplexity", "excess", "KL", "top-1", "cache bytes/token")
RATIOS = ("source, text", "cache kept", "mode", "best published", "its excess", "ours", "excess", "ratio")
OURS = "best"
"""What the names of this project's own recipes start with."""


def row(cells: tuple[str, ...]) -> str:
    """One Markdown row."""
    return "| " + " | ".join(cells) + " |"


def head(cells: tuple[str, ...], left: int) -> str:
    """A Markdown table's head, its first columns to the left."""
    return row(cells) + "\n" + row((*["---"] * left, *["---:"] * (len(cells) - left)))


def numbers(record: dict[str, Any]) -> tuple[str, ...]:
    """The measured cells of a record."""
    error = record["perplexity"] * record["nll_standard_error"]
    return (
        f"{record['perplexity']:,.2f} ± {error:,.2f}",
        f"{record.get('excess', 0.0):.3f}",
        f"{record['kl']:.3f}",
        f"{record['top1_agreement']:.1%}",
        f"{record['cache_bytes_per_token']:,.0f}",
    )


def measured(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with figures, budgets from large to small and the best recipe of each mode first."""
    rows = [r for r in table["rows"] if "refused" not in r]
    return sorted(rows, key=lambda r: (-r["kv_budget"], r["mode"], r["perplexity"]))


def print_text(text: str, table: dict[str, Any]) -> None:
    """All rows of one text."""
    print(f"\n{text}\n\n{head(HEAD, 2)}")
    print(row(("source", "", "100 %", *numbers(table["source"]))))
    for record in measured(table):
        print(row((record["recipe"], record["mode"], f"{record['kv_budget']:.0%}", *numbers(record))))


def print_ratios(name: str, table: dict[str, Any]) -> None:
    """Each of our recipes beside the best published one of its mode and budget."""
    rows = measured(table)
    for ours in (r for r in rows if r["recipe"].startswith(OURS)):
        published = [
            r for r in rows
            if (r["mode"], r["kv_budget"]) == (ours["mode"], ours["kv_budget"]) and not r["recipe"].startswith(OURS)
        ]  # fmt: skip
        if published:
            rival = min(published, key=lambda r: r["excess"])
            print(row((
                name, f"{ours['kv_budget']:.0%}", ours["mode"], rival["recipe"], f"{rival['excess']:.3f}",
                ours["recipe"], f"{ours['excess']:.3f}", f"{ours['excess'] / rival['excess']:.2f}",
            )))  # fmt: skip


def main(paths: list[Path]) -> None:
    """Print all tables."""
    results = [json.loads(path.read_text()) for path in paths]
    for result in results:
        for text, table in result["texts"].items():
            print_text(text, table)
    print(f"\n{head(RATIOS, 1)}")
    for result in results:
        for text, table in result["texts"].items():
            print_ratios(f"{Path(result['protocol']['source']).name}, {Path(text).name}", table)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
