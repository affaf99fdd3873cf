"""What all commands share: options, progress on stderr, results on stdout or as JSON."""

import json
import sys
import time
import unicodedata
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..calibration import MOST_WINDOWS
from ..errors import BadInput, InvalidRecipe
from ..output import writing
from ..ranks import is_main, own_device
from ..statistics import CalibrationRequest

Item = TypeVar("Item")
Decorated = TypeVar("Decorated", bound=Callable[..., Any])

LOG_SECONDS = 20.0

HELD_OUT = "python-help-heldout"
"""The text that is measured on where none is named."""

WIDTH_OF_FILES = 160
"""Columns of a table that goes to a pipe or a file."""

out = Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
err = Console(stderr=True)


def writable(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a file that cannot be written before any work is done."""
    if value not in (None, "-") and not Path(value).absolute().parent.is_dir():
        raise BadInput(f"cannot write {value}: no such directory")
    return value


def plot_option(about: str) -> Callable[[Decorated], Decorated]:
    """A picture to draw."""
    return click.option("--plot", metavar="FILE.png", callback=writable, help=about)


json_option = click.option(
    "--json", "json_file", metavar="FILE", callback=writable, help="Write the result as JSON; - is stdout."
)
device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    callback=lambda _context, _parameter, value: own_device(value),
    help="Where the model runs: cpu, cuda, cuda:1.",
)
dtype_option = click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Weights' type.")


def calibration_options(function: Decorated) -> Decorated:
    """How much calibration text to take, the same in every command."""
    request = CalibrationRequest
    for option in (
        click.option(
            "--context",
            default=request.context,
            show_default=True,
            help="Context length to serve: attention distances are taken on windows this long.",
        ),
        click.option("--seed", default=request.seed, show_default=True, help="Draws the calibration windows."),
        click.option("--length", default=request.window, show_default=True, help="Tokens per calibration window."),
        click.option("--samples", default=request.num_windows, show_default=True, help="Calibration windows."),
    ):
        function = option(function)
    return function


def calibration_text_option(name: str, about: str) -> Callable[[Decorated], Decorated]:
    """The texts to calibrate on, the same in every command."""
    return click.option(
        name, "calibration", multiple=True, default=("python-help",), show_default=True,
        help=f"{about}; given again, windows are taken of all texts in equal shares.",
    )  # fmt: skip


def window_options(function: Decorated) -> Decorated:
    """How a text is cut, the same in every command."""
    for option in (
        click.option("--skip", default=0, help="Predictions of each window, from its start, that are not counted."),
        click.option(
            "--windows",
            type=click.IntRange(min=1),
            help=f"How many windows, from the start of the text. [default: {MOST_WINDOWS}, or as many as it has]",
        ),
        click.option("--window", default=1024, show_default=True, help="Tokens per window."),
    ):
        function = option(function)
    return function


def rich_track(items: Iterable[Item], *, label: str, total: int) -> Iterable[Item]:
    """A progress bar with elapsed and remaining time on a terminal, else a line now and then; on stderr, on rank 0."""
    if not is_main():
        yield from items
        return
    if not err.is_terminal:
        yield from _logged(items, label, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=err) as progress:
        yield from progress.track(items, total=total, description=label)


def _logged(items: Iterable[Item], label: str, total: int) -> Iterable[Item]:
    """Progress for a log file: at most one line every LOG_SECONDS, and one at the end."""
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= LOG_SECONDS:
            said = now
            click.echo(f"{label}: {done}/{total}, {(now - start) / done * (total - done):.0f} s left", err=True)
        yield item
    click.echo(f"{label}: done in {time.monotonic() - start:.1f} s", err=True)


def say(message: str) -> None:
    """One line for the person at the terminal, on stderr."""
    if is_main():
        click.echo(message, err=True)


@contextmanager
def working(label: str) -> Generator[None]:
    """A spinner for work whose length is unknown."""
    with err.status(label) if is_main() else nullcontext():
        yield


def emit(result: Mapping[str, Any], json_file: str | None, *shown: object) -> None:
    """Show a result to a person, or write it as JSON, or both when the JSON goes to a file; on rank 0."""
    if not is_main():
        return
    if json_file == "-":
        click.echo(json.dumps(result, indent=2))
        return
    for part in shown:
        out.print(part)
    if json_file is not None:
        with writing(Path(json_file)):
            Path(json_file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def verbatim(text: str, style: str = "") -> Text:
    """Text of a model or a user as it is: no markup, and control characters shown as such, not obeyed."""
    obeyed = (c for c in set(text) - set("\t\n\r") if unicodedata.category(c) == "Cc")
    return Text(text.translate(dict.fromkeys(map(ord, obeyed), "\N{REPLACEMENT CHARACTER}")), style)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A plain table; the first column is left, the others right."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        made.add_row(*row)
    return made


def parse_list(value: str, option: str) -> list[str]:
    """A comma-separated option."""
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts:
        raise InvalidRecipe(f"{option} is empty")
    return parts


def parse_budgets(value: str) -> list[float]:
    """Comma-separated budgets."""
    try:
        return [float(part) for part in parse_list(value, "--kv-budgets")]
    except ValueError as error:
        raise InvalidRecipe(f"--kv-budgets {value!r} must be numbers such as 0.5,0.25") from error
