"""The README's table from the JSON of `care compare`.

Usage: python benchmarks/table.py compare.json
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = ("recipe", "mode", "cache kept", "perplexity", "excess", "KL", "top-1", "cache bytes/token")


def row(cells: tuple[str, ...]) -> str:
    """One Markdown row."""
    return "| " + " | ".join(cells) + " |"


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


def main(path: Path) -> None:
    """Print the table, budgets from large to small and the best recipe of each first."""
    result = json.loads(path.read_text())
    print(row(HEAD))
    print(row(("---", "---", *["---:"] * (len(HEAD) - 2))))
    print(row(("source", "", "100 %", *numbers(result["source"]))))
    measured = [r for r in result["rows"] if "refused" not in r]
    for record in sorted(measured, key=lambda r: (-r["kv_budget"], r["mode"], r["perplexity"])):
        print(row((record["recipe"], record["mode"], f"{record['kv_budget']:.0%}", *numbers(record))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
