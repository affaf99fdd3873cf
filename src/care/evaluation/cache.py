"""Bytes in the live key/value cache, counted from the tensors that a running model holds."""

from dataclasses import dataclass
from typing import Any

import torch

PROBE_TOKENS = 64


@dataclass(frozen=True)
class CacheUse:
    """What one token costs over all layers."""

    values_per_token: float
    bytes_per_token: float


def live_cache(model: Any, num_tokens: int = PROBE_TOKENS) -> CacheUse:  # noqa: ANN401 - any transformers model
    """Run `num_tokens` tokens and count every tensor that the cache then holds."""
    tokens = torch.arange(num_tokens, device=model.device)[None] % model.config.vocab_size
    with torch.inference_mode():
        output = model(input_ids=tokens, use_cache=True)
    tensors = [t for layer in live_layers(output) for t in (layer.keys, layer.values)]
    return CacheUse(
        sum(t.numel() for t in tensors) / num_tokens,
        sum(t.numel() * t.element_size() for t in tensors) / num_tokens,
    )


def live_layers(output: Any) -> Any:  # noqa: ANN401 - transformers' cache layers
    """The cache's layers in a model output."""
    return output[cache_name(output)].layers


def cache_name(output: Any) -> str:  # noqa: ANN401
    """What a model calls its cache, as an output and as an argument; transformers 5.24 renamed it."""
    return "cache" if "cache" in output else "past_key_values"
