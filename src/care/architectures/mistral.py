"""Mistral: Llama's layout; early releases attend within a sliding window."""

from .base import Architecture, every_layer

MISTRAL = Architecture(
    model_type="mistral",
    bias_key=None,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    sliding=every_layer,
)
