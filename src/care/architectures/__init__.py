"""Source architectures, by the `model_type` of their config.json. See docs/add-architecture.md."""

from collections.abc import Mapping
from typing import Any

from ..errors import BadInput, UnsupportedModel
from .base import Architecture
from .llama import LLAMA
from .mistral import MISTRAL

ARCHITECTURES: dict[str, Architecture] = {"llama": LLAMA, "mistral": MISTRAL}


def architecture_for(config: Mapping[str, Any]) -> Architecture:
    """The facts for a config; UnsupportedModel names the known families."""
    model_type = config.get("model_type")
    if model_type is None:
        raise BadInput("config.json has no model_type; is this a language model?")
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModel(
            f"model_type {model_type!r} is not supported; known: {known}. See docs/add-architecture.md"
        )
    return ARCHITECTURES[model_type]
