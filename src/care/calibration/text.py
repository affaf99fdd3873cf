"""Texts for calibration and measuring, and how tokens are cut from them."""

import difflib
import gzip
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadInput
from .hub_texts import HUB_TEXTS


@cache
def _python_help() -> tuple[str, str]:
    """The help topics that ship with Python, every fourth one held out."""
    from pydoc_data.topics import topics  # noqa: PLC0415 - loads half a megabyte

    names = sorted(topics)
    held_out = [topics[name] for name in names[3::4]]
    return "\n\n".join(topics[name] for i, name in enumerate(names) if i % 4 != 3), "\n\n".join(held_out)


TEXTS: dict[str, Callable[[], str]] = {
    "python-help": lambda: _python_help()[0],
    "python-help-heldout": lambda: _python_help()[1],
}
"""Texts by name that are always there.

`python-help` is technical English that every Python brings along; the held-out part is disjoint.
"""


def load_text(name_or_file: str) -> str:
    """A text by name (TEXTS, HUB_TEXTS) or a UTF-8 file: plain, or `.jsonl` with a "text" key per row; either gzipped.

    BadInput for a file that is not there, with names that are like it, and for a text that cannot be fetched.
    """
    if name_or_file in TEXTS:
        return TEXTS[name_or_file]()
    if name_or_file in HUB_TEXTS:
        return HUB_TEXTS[name_or_file].load(name_or_file)
    path = Path(name_or_file)
    if path.is_file():
        return _read_file(path)
    names = [*TEXTS, *HUB_TEXTS]
    near = difflib.get_close_matches(name_or_file, names)
    hint = f"did you mean {' or '.join(near)}?" if near else f"texts by name: {', '.join(names)}"
    raise BadInput(f"no such text file: {name_or_file}; {hint}")


def _read_file(path: Path) -> str:
    """A file as one text."""
    content = read_text(path)
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return _join_rows(path, content)
    return content


def read_text(path: Path) -> str:
    """A UTF-8 file, gzipped where its name says so; BadInput if it is not one."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error


def _join_rows(path: Path, content: str) -> str:
    try:
        return "\n\n".join(json.loads(line)["text"] for line in content.splitlines() if line.strip())
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadInput(f'{path}: every row must be a JSON object with a "text" key') from error


MOST_WINDOWS = 24
"""Windows of a text that is measured on, where no number is asked for and the text has them."""


def whole_windows(num_tokens: int, length: int) -> int:
    """How many windows of `length` tokens are measured where no number is asked for: all there are, up to a bound."""
    return max(min(num_tokens // length, MOST_WINDOWS), 1)


def first_windows(tokens_T: Tensor, length: int, count: int, *, name: str = "the text") -> Tensor:
    """The first `count` windows of `length` tokens, one after the other: (count, length)."""
    _require(tokens_T, length, count, name)
    return tokens_T[: count * length].view(count, length)


def sampled_windows(tokens_T: Tensor, length: int, count: int, seed: int, *, name: str = "the text") -> Tensor:
    """`count` of the text's windows of `length` tokens, drawn without repetition: (count, length).

    They come in the order in which they were drawn, so that the first of them are a sample too.
    """
    _require(tokens_T, length, count, name)
    whole = len(tokens_T) // length
    chosen = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:count]
    return tokens_T[: whole * length].view(whole, length)[chosen]


def equal_shares(count: int, among: int) -> list[int]:
    """A count split evenly; where it does not divide, the first shares are larger by one."""
    return [len(range(first, count, among)) for first in range(among)]


def taken_in_turn(parts: Sequence[Tensor]) -> Tensor:
    """Windows (B, T) of several texts, one of each by turns: the first of them are from all texts too."""
    rounds = range(max(map(len, parts)))
    return torch.stack([part_BT[index] for index in rounds for part_BT in parts if index < len(part_BT)])


def _require(tokens_T: Tensor, length: int, count: int, name: str) -> None:
    if length < 2 or count < 1:
        raise BadInput(f"{count} windows of {length} tokens; need at least 1 window of 2 tokens")
    if len(tokens_T) < length:
        raise BadInput(
            f"{name} has {len(tokens_T)} tokens, less than one window of {length}; use a longer text or shorter windows"
        )
    if len(tokens_T) < length * count:
        raise BadInput(
            f"{name} has {len(tokens_T)} tokens, {count} windows of {length} need {length * count}; "
            f"use a longer text or fewer windows, of which it has {len(tokens_T) // length}"
        )
