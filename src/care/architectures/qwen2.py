"""Qwen2 and Qwen2.5: Llama's body, with biases on queries, keys and values."""

from .base import Architecture, Config


def last_layers(config: Config, index: int) -> bool:
    """Within the window where that is switched on: the layers listed as such, else those from `max_window_layers`."""
    if not config.get("use_sliding_window"):
        return False
    kinds = config.get("layer_types")
    return kinds[index] == "sliding_attention" if kinds else index >= config.get("max_window_layers", 28)


QWEN2 = Architecture(
    model_type="qwen2",
    bias_key=None,
    qkv_bias=True,
    defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    sliding=last_layers,
)
