"""What the source and its conversion wrote, from the JSON of `care generate --against`."""

from collections.abc import Mapping
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

from ..errors import BadInput


@dataclass(frozen=True)
class Written:
    """Two continuations of one prompt: what they have in common from their start, and how each goes on.

    The texts are cut by character; `same_tokens` of `num_tokens`, those of the longer one, are counted in tokens.
    """

    prompt: str
    same_tokens: int
    num_tokens: int
    common: str
    source_rest: str
    converted_rest: str


def generations(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """One JSON file, by name, as plain data: the two models, how they were run, and `prompts`."""
    if result["against"] is None:
        raise BadInput(f"{name} has the texts of one model; care generate OUT PROMPT --against SRC writes those of two")
    source, converted = result["models"]
    return {
        "source": last_part(source, "source"),
        "converted": last_part(converted, "converted"),
        "max_new_tokens": result["max_new_tokens"],
        "chat": result["chat"],
        "dtype": result["dtype"],
        "prompts": [vars(_written(made, source, converted)) for made in result["generations"]],
    }


def last_part(model: str, otherwise: str) -> str:
    """A model without where it lies; `otherwise` for a directory such as the current one."""
    return Path(model).name.strip(".") or otherwise


def _written(made: Mapping[str, Any], source: str, converted: str) -> Written:
    texts, tokens = made["texts"], made["tokens"]
    common = commonprefix([texts[source], texts[converted]])  # noqa: RUF071 - character by character is meant
    return Written(
        prompt=made["prompt"],
        same_tokens=made["same_tokens"],
        num_tokens=max(tokens[source], tokens[converted]),
        common=common,
        source_rest=texts[source].removeprefix(common),
        converted_rest=texts[converted].removeprefix(common),
    )
