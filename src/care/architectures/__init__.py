"""Source architectures, by the `model_type` of their config.json. See docs/add-architecture.md."""

from collections.abc import Mapping
from typing import Any

from ..errors import BadInput, UnsupportedModel
from .base import Architecture
from .gemma2 import GEMMA2
from .gemma3_text import GEMMA3_TEXT
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmo2 import OLMO2
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE
from .smollm3 import SMOLLM3

ARCHITECTURES: dict[str, Architecture] = {
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "smollm3": SMOLLM3,
}


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
