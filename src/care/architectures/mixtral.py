"""Mixtral: Mistral's attention beside a mixture of experts."""

from .base import Architecture, every_layer

MIXTRAL = Architecture(
    model_type="mixtral",
    deepseek_body=False,
    bias_key=None,
    defaults={"num_key_value_heads": 8, "rope_theta": 1_000_000.0},
    sliding=every_layer,
)
