"""What an output format is: it refuses what it cannot express, then names tensors and writes a config."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..types import LatentAttention, LayerRanks, Target

COMPUTED_KEYS = (
    "quantization_config",
    "_name_or_path",
    "auto_map",
    "architectures",
    "torch_dtype",
    "transformers_version",
)
"""Source config keys that do not describe the converted model."""


class Format(Protocol):
    """One checkpoint layout. Layer indices and prefixes come from the conversion."""

    one_width: ClassVar[bool]
    """Whether all layers must have the same rope dims and rank."""

    def check(self, target: Target) -> None:
        """Raise InvalidRecipe for anything that the layout cannot express exactly."""
        ...

    def config(
        self, target: Target, ranks: Sequence[LayerRanks], frequencies: Sequence[tuple[float, ...]]
    ) -> dict[str, Any]:
        """The converted model's config.json; ranks and rotary frequencies are per layer."""
        ...

    def attention_tensors(self, latent: LatentAttention, target: Target) -> dict[str, Tensor]:
        """A layer's attention tensors by their name within self_attn, in the target's dtype."""
        ...

    def carried_tensors(self, name: str, tensor: Tensor, target: Target) -> Mapping[str, Tensor]:
        """What a tensor outside attention becomes: itself, scaled, split, or nothing."""
        ...
