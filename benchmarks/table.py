"""The README's tables from the JSON of `care compare`: one per text, then ours beside the best published recipe.

python benchmarks/table.py compare.json [compare.json ...] [--plot FILE.png] [--only TEXT]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from care.commands.front import points
from care.report.pictures import pareto_figure, save_png

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


def panels(results: list[dict[str, Any]], only: str | None) -> list[dict[str, Any]]:
    """What is drawn: a panel for each source and text, or for each source on one text."""
    return [
        {**point, "text": title(result, text)}
        for result in results
        for text, table in result["texts"].items()
        if only in (None, Path(text).name)
        for point in points(text, table)
    ]


def title(result: dict[str, Any], text: str) -> str:
    """Source and text, without where they lie."""
    return f"{Path(result['protocol']['source']).name}, {Path(text).name}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="compare.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw cache kept against perplexity as well")
    parser.add_argument("--only", metavar="TEXT", help="draw this text alone, by the name of its file")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    """Print all tables, and draw."""
    results = [json.loads(path.read_text()) for path in options.results]
    for result in results:
        for text, table in result["texts"].items():
            print_text(text, table)
    print(f"\n{head(RATIOS, 1)}")
    for result in results:
        for text, table in result["texts"].items():
            print_ratios(title(result, text), table)
    if options.plot is not None:
        save_png(pareto_figure(panels(results, options.only)), options.plot)


if __name__ == "__main__":
    main(parse())
