"""Phi-3 and Phi-4 mini: queries, keys and values from one projection. Longrope and partial rotation are refused."""

from .base import Architecture, every_layer

PHI3 = Architecture(
    model_type="phi3",
    qkv="qkv_proj",
    deepseek_body=False,
    bias_key=None,
    sliding=every_layer,
)
