"""Gemma 2: capped scores, a softmax scale of its own, every other layer within a window."""

from .base import Architecture, Config


def _sliding(config: Config, index: int) -> bool:
    kinds = config.get("layer_types")
    return kinds[index] == "sliding_attention" if kinds else index % 2 == 0


GEMMA2 = Architecture(
    model_type="gemma2",
    deepseek_body=False,
    post_norm=True,
    defaults={
        "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "sliding_window": 4096,
    },
    scale_key="query_pre_attn_scalar",
    softcap_key="attn_logit_softcapping",
    refused=("use_bidirectional_attention",),
    sliding=_sliding,
)  # fmt: skip
