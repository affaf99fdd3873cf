"""OLMo 2: one norm over all query heads and one over all key heads; blocks are normalized behind, not before."""

from .base import Architecture, Norms

OLMO2 = Architecture(
    model_type="olmo2",
    norms=Norms(over_all_heads=True),
    deepseek_body=False,
    post_norm=True,
    defaults={"rms_norm_eps": 1e-5},
)
