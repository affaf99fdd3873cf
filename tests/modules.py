"""What transformers' own modules say of a model's attention, layer by layer: the reference for a spec."""

from typing import Any

import torch
from torch import Tensor

from care.types import AttentionSpec
from tolerances import assert_close


def assert_spec_is_the_models(spec: AttentionSpec, model: Any, rotary: Any) -> None:
    """Sizes, scale, cap, windows and rope tables; the weights may be on the meta device, `rotary` must not."""
    assert spec.num_layers == len(model.model.layers) == len(spec.rope_frequencies)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        assert spec.head_dim == attention.head_dim
        assert spec.num_heads // spec.num_kv_heads == attention.num_key_value_groups
        assert (spec.hidden_size, spec.num_heads * spec.head_dim) == tuple(attention.o_proj.weight.shape)
        assert spec.scale == attention.scaling
        assert spec.softcap == getattr(attention, "attn_logit_softcapping", None)
        assert (spec.windows[index] if spec.windows else None) == window_of(attention)
        assert_close(torch.tensor(spec.rope_frequencies[index]), rope_table(rotary, attention), "fp32 table")


def window_of(attention: Any) -> int | None:
    """A layer's own window, or that of all layers where modules do not have one each."""
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


def rope_table(rotary: Any, attention: Any) -> Tensor:
    """Inverse frequencies of a layer: one table, one per kind of layer, or none."""
    own = f"{getattr(attention, 'layer_type', None)}_inv_freq"
    table = getattr(rotary, own) if hasattr(rotary, own) else rotary.inv_freq
    return table if getattr(attention, "use_rope", True) else torch.zeros_like(table)
