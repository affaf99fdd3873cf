"""A transformers cache that holds its entries quantized, for native and for source models."""

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..errors import BadInput
from ..kernels import Quantizer


class QuantizedLayer(DynamicLayer):
    """One layer whose `keys` and `values` are rows of bytes; attention is given what they mean.

    A latent entry starts with its rotary key of `rope_dim` values, which is scaled apart. Keys and values of a source
    are scaled per head.
    """

    def __init__(self, quantizer: Quantizer, rope_dim: int = 0) -> None:
        super().__init__()
        self._quantizer, self._rope_dim = quantizer, rope_dim

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Take new entries (B, heads, T, width) in; all entries, as they come out again."""
        states = (key_states, value_states)
        parts = [(min(self._rope_dim, s.shape[-1]), max(s.shape[-1] - self._rope_dim, 0)) for s in states]
        rows = [self._quantizer.encode(s, p) for s, p in zip(states, parts, strict=True)]
        held = super().update(rows[0], rows[1], *args, **kwargs)
        keys, values = (self._quantizer.decode(h, p, key_states.dtype) for h, p in zip(held, parts, strict=True))
        return keys, values


def quantized_cache(config: Any, quantizer: Quantizer) -> Cache:  # noqa: ANN401 - a transformers config
    """An empty cache for a native or a source model; BadInput where layers keep only a window."""
    if getattr(config, "sliding_window", None):
        raise BadInput("a quantized cache has no sliding windows; use transformers' own cache for this model")
    table = getattr(config, "latent_attention", None)
    rope_dims = [0] * config.num_hidden_layers if table is None else table["qk_rope_head_dim"]
    if table is not None and table["mode"] == "rebuild":
        rope_dims = [0] * config.num_hidden_layers
    return Cache(layers=[QuantizedLayer(quantizer, rope_dim) for rope_dim in rope_dims])
