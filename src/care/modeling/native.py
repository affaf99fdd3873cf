"""The native format as transformers classes: the source's own model with its attention swapped.

For a source `llama` this makes `CareLlamaConfig` and `CareLlamaForCausalLM`, subclasses of transformers' Llama
classes. Masks, caches, MLPs, generation and checkpointing are the source's; only self_attn is ours.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..architectures import ARCHITECTURES
from ..carried import QkNorm
from ..errors import BadInput
from ..formats.native import FORMAT_VERSION, MODEL_TYPE_PREFIX, Native, native_class_name
from ..types import LatentAttention, Target
from .attention import LatentAttentionModule
from .shape import LatentShape


def layer_shapes(config: Any) -> list[LatentShape]:  # noqa: ANN401 - transformers configs are made at run time
    """The shape of every layer from a native config."""
    table = config.latent_attention
    if table["format_version"] > FORMAT_VERSION:
        raise BadInput(
            f"the checkpoint has native format {table['format_version']}, this version reads up to {FORMAT_VERSION}; "
            "upgrade care"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    qk_norm = table.get("qk_norm")
    return [
        LatentShape(
            mode=table["mode"], hidden_size=config.hidden_size, num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads, head_dim=head_dim, nope_dim=table["qk_nope_head_dim"][i],
            v_head_dim=table["v_head_dim"], rope_dim=table["qk_rope_head_dim"][i],
            kv_lora_rank=table["kv_lora_rank"][i], key_rank=table["key_rank"][i], value_rank=table["value_rank"][i],
            frequencies=tuple(table["rope_frequencies"][i]), scale=table.get("softmax_scale") or head_dim**-0.5,
            qkv_bias=table.get("qkv_bias", False), out_bias=table.get("out_bias", False),
            qk_norm=QkNorm(**qk_norm) if qk_norm else None, softcap=table.get("softcap"),
        )
        for i in range(config.num_hidden_layers)
    ]  # fmt: skip


def _set_attention(model: nn.Module, model_type: str, index: int, module: nn.Module) -> nn.Module:
    """Put a module in the place of a layer's attention; returns the old one."""
    path, _, name = ARCHITECTURES[model_type].attention.format(i=index).rpartition(".")
    parent = model.get_submodule(path)
    old = getattr(parent, name)
    setattr(parent, name, module)
    return old


@cache
def native_classes(model_type: str) -> tuple[type, type]:
    """Config and model class of the native format for a source model type."""
    source_config: Any = CONFIG_MAPPING[model_type]
    source_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[source_config]
    name = native_class_name(model_type)

    def init(self: Any, config: Any) -> None:  # noqa: ANN401
        source_model.__init__(self, config)
        for index, shape in enumerate(layer_shapes(config)):
            _set_attention(self, model_type, index, LatentAttentionModule(shape, index))

    config_class = type(
        name.replace("ForCausalLM", "Config"),
        (source_config,),
        {"model_type": MODEL_TYPE_PREFIX + model_type, "__module__": __name__},
    )
    model_class = type(
        name,
        (source_model,),
        {
            "config_class": config_class,
            "__init__": init,
            "__module__": __name__,
            # The backends that latent attention does not have are switched off, not emulated.
            "_supports_flash_attn": False,
            "_supports_flex_attn": False,
            "_supports_attention_backend": False,
        },
    )
    return config_class, model_class


def __getattr__(name: str) -> type:
    """The classes by their names, which is how pickle finds the class of a config in another process."""
    for model_type in ARCHITECTURES:
        stem = native_class_name(model_type).removesuffix("ForCausalLM")
        if name in (f"{stem}Config", f"{stem}ForCausalLM"):
            return native_classes(model_type)[name.endswith("ForCausalLM")]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Let transformers' Auto classes load native checkpoints."""
    for model_type in ARCHITECTURES:
        config_class, model_class = native_classes(model_type)
        AutoConfig.register(MODEL_TYPE_PREFIX + model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        conversion: Any = get_checkpoint_conversion_mapping(model_type)
        if conversion is not None:
            # Without it a mixture's experts, one by one in files and fused in memory, would be left at random.
            register_checkpoint_conversion_mapping(MODEL_TYPE_PREFIX + model_type, conversion, overwrite=True)


def build_layer(latent: LatentAttention, target: Target, index: int) -> LatentAttentionModule:
    """A converted layer's module without going through files; weights are shared where they can be."""
    with torch.device("meta"):
        module = LatentAttentionModule(LatentShape.of(latent, target.spec.rope_frequencies[index]), index)
    module.load_state_dict(Native().attention_tensors(latent, target), assign=True)
    return module.eval()


def build_attention(latents: Sequence[LatentAttention], target: Target) -> list[LatentAttentionModule]:
    """The modules of all layers of a converted model."""
    return [build_layer(latent, target, index) for index, latent in enumerate(latents)]


@contextmanager
def layer_swapped(model: nn.Module, model_type: str, index: int, module: nn.Module) -> Generator[None]:
    """Run one layer of a source model with another attention module."""
    own = _set_attention(model, model_type, index, module)
    try:
        yield
    finally:
        _set_attention(model, model_type, index, own)


@contextmanager
def attention_swapped(model: nn.Module, model_type: str, modules: Sequence[nn.Module]) -> Generator[None]:
    """Run a source model with other attention modules, and give it its own back."""
    own = [_set_attention(model, model_type, index, module) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for index, module in enumerate(own):
            _set_attention(model, model_type, index, module)
