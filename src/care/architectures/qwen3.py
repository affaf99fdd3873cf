"""Qwen3: Llama's body, with a norm on every query and key head."""

from .base import Architecture, Norms
from .qwen2 import last_layers

QWEN3 = Architecture(
    model_type="qwen3",
    norms=Norms(),
    defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "rms_norm_eps": 1e-6},
    sliding=last_layers,
)
