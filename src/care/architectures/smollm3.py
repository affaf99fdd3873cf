"""SmolLM3: Llama's layout; every fourth layer does not rotate."""

from .base import Architecture, Config


def _rotates(config: Config, index: int) -> bool:
    listed = config.get("no_rope_layers")
    # The list has a 1 for layers with RoPE, in spite of its name.
    return bool(listed[index]) if listed else (index + 1) % config["no_rope_layer_interval"] != 0


def _rope(config: Config, index: int) -> Config | None:
    return config if _rotates(config, index) else None


def _sliding(config: Config, index: int) -> bool:
    if not config.get("use_sliding_window"):
        return False
    kinds = config.get("layer_types")
    return kinds[index] == "sliding_attention" if kinds else not _rotates(config, index)


SMOLLM3 = Architecture(
    model_type="smollm3",
    defaults={"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "no_rope_layer_interval": 4},
    sliding=_sliding,
    rope=_rope,
)
