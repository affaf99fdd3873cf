"""The license that a model states of itself, in its README's metadata, its config or its GGUF header."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import read_json
from .errors import BadInput

CARD_NAME = "README.md"
"""A model's card, with its metadata in a block of YAML on top."""

KEYS = ("license", "license_name", "license_link")
"""What of it says the license; the last two go with `license: other`."""

FRONT_MATTER = re.compile(r"\A\ufeff?---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
ENTRY = re.compile(rf"^({'|'.join(KEYS)}):[ \t]*\n?(?:[ \t]*-[ \t]+)?(\S.*)$", re.MULTILINE)
"""One value on the key's line, or the first of a list below it."""


def stated_license(directory: Path, gguf_file: str | None = None) -> dict[str, str] | None:
    """`license`, and `license_name` and `license_link` where they are given; None where nothing is stated."""
    if gguf_file is not None:
        return _named(_gguf_license(directory / gguf_file))
    card = directory / CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return front_matter_license(text) or _named(_config(directory).get("license"))


def front_matter_license(text: str) -> dict[str, str] | None:
    """The license in the metadata on top of a card. Only plain values are looked for, so no YAML library is needed."""
    block = FRONT_MATTER.match(text)
    found = {} if block is None else {key: value.strip().strip("'\"") for key, value in ENTRY.findall(block[1])}
    return {key: found[key] for key in KEYS if found.get(key)} if found.get("license") else None


def _config(directory: Path) -> Mapping[str, Any]:
    try:
        return read_json(directory / "config.json")
    except BadInput:
        return {}


def _named(value: object) -> dict[str, str] | None:
    return {"license": value} if isinstance(value, str) and value else None


def _gguf_license(path: Path) -> object:
    from gguf import GGUFReader  # noqa: PLC0415 - an optional dependency

    field = GGUFReader(path).fields.get("general.license")
    return None if field is None else field.contents()
