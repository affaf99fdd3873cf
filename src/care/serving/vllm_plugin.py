"""The plugin by which vLLM knows the native format (entry point `vllm.general_plugins`).

vLLM calls `register` in each of its processes before a model is looked up. What it will not compute exactly is refused
when it reads the config, by the same rules that `care inspect` prints.
"""

# vLLM is not installed where this is checked.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from typing import Any

from vllm import ModelRegistry
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from ..architectures import ARCHITECTURES
from ..engines import ENGINES
from ..errors import InvalidRecipe
from ..formats.native import MODEL_TYPE_PREFIX, native_class_name
from ..modeling import native

MODEL = "care.serving.vllm_model:LatentForCausalLM"
"""Imported by vLLM when such a model is loaded, not before."""


class NativeConvertor(ModelArchConfigConvertorBase):
    """What vLLM must know of a native config before the model is built."""

    def convert(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - vLLM's
        """Refuse what the model class does not compute."""
        engine = "vllm-cpu" if current_platform.is_cpu() else "vllm"
        if (reason := ENGINES[engine].rule(self.hf_text_config.to_dict())) is not None:
            raise InvalidRecipe(f"vLLM does not take this checkpoint: {reason}")
        return super().convert(*arguments, **options)

    def get_total_num_kv_heads(self) -> int:
        """All query heads read one entry per token."""
        return 1

    def get_head_size(self) -> int:
        """The widest layer's entry; each layer states its own to the cache."""
        table = self.hf_text_config.latent_attention
        return max(map(sum, zip(table["kv_lora_rank"], table["qk_rope_head_dim"], strict=True)))


def register() -> None:
    """Make the native format of every source known to vLLM; more than once is harmless."""
    native.register()
    for model_type in ARCHITECTURES:
        MODEL_ARCH_CONFIG_CONVERTORS[MODEL_TYPE_PREFIX + model_type] = NativeConvertor
        ModelRegistry.register_model(native_class_name(model_type), MODEL)
