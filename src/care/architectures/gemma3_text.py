"""Gemma 3, text only: norms with gain 1 + weight; most layers are local, with a window and a rope base of their own."""

from .base import Architecture, Config, Norms


def _sliding(config: Config, index: int) -> bool:
    kinds = config.get("layer_types")
    return kinds[index] == "sliding_attention" if kinds else (index + 1) % config["sliding_window_pattern"] != 0


def _rope(config: Config, index: int) -> Config:
    """Newer configs hold one entry per kind of layer, older ones a second base for local layers."""
    local = _sliding(config, index)
    by_kind = config.get("rope_parameters")
    own = None if local else config.get("rope_scaling")
    if by_kind:
        own = by_kind.get("sliding_attention" if local else "full_attention")
    return {"rope_theta": config["rope_local_base_freq" if local else "rope_theta"], "rope_parameters": own}


GEMMA3_TEXT = Architecture(
    model_type="gemma3_text",
    norms=Norms(offset=1.0, heads_first=True),
    deepseek_body=False,
    post_norm=True,
    defaults={
        "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 6, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "rms_norm_eps": 1e-6,
    },
    scale_key="query_pre_attn_scalar",
    refused=("use_bidirectional_attention",),
    sliding=_sliding,
    rope=_rope,
)  # fmt: skip
