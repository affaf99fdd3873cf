"""Qwen3 mixtures of experts: the norms of Qwen3; a window, where there is one, holds for all layers."""

from .base import Architecture, Config, Norms


def _sliding(config: Config, index: int) -> bool:
    return bool(config.get("use_sliding_window"))


QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    norms=Norms(),
    deepseek_body=False,
    defaults={"num_key_value_heads": 4, "sliding_window": 4096, "rms_norm_eps": 1e-6},
    sliding=_sliding,
)
