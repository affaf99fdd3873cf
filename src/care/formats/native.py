"""Our own layout: the source's tensors, with latent attention of per-layer widths in either mode.

q_proj and o_proj are the source's own; `q_head_map` turns each query head into its no-rope and rotary
queries. kv_a_proj_with_mqa holds the latent's rows, then the rotary key's, as in DeepSeek's layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..carried import Carried
from ..types import AttentionSpec, LatentAttention, LayerRanks, Target
from .base import COMPUTED_KEYS

FORMAT_VERSION = 2
"""Version 1 knows layers without biases, norms, softcap and scale of their own; those are still written as such."""

MODEL_TYPE_PREFIX = "care_"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Native:
    """Loaded by `care.register()` and transformers' Auto classes (care.modeling)."""

    one_width: ClassVar[bool] = False

    def check(self, target: Target) -> None:
        """Nothing that a source architecture allows is refused."""

    def config(
        self, target: Target, ranks: Sequence[LayerRanks], frequencies: Sequence[tuple[float, ...]]
    ) -> dict[str, Any]:
        """The source's config plus one `latent_attention` table of per-layer widths."""
        source, head_dim = target.config, target.spec.head_dim
        slots = target.mode == "absorbed"
        return {
            **{key: value for key, value in source.items() if key not in COMPUTED_KEYS},
            "architectures": [native_class_name(source["model_type"])],
            "model_type": MODEL_TYPE_PREFIX + source["model_type"],
            "dtype": str(target.dtype).removeprefix("torch."),
            "latent_attention": {
                "format_version": FORMAT_VERSION if (extras := _extras(target.spec)) else 1,
                "mode": target.mode,
                "kv_lora_rank": [r.latent_rank for r in ranks],
                "key_rank": [r.key_rank for r in ranks],
                "value_rank": [r.value_rank for r in ranks],
                "qk_rope_head_dim": [r.rope_dim for r in ranks],
                "qk_nope_head_dim": [0 if slots and not r.key_rank else head_dim for r in ranks],
                "v_head_dim": head_dim,
                "rope_frequencies": [list(table) for table in frequencies],
                **extras,
            },
        }

    def attention_tensors(self, latent: LatentAttention, target: Target) -> dict[str, Tensor]:
        """Only what has rows and columns: a layer without no-rope keys has no k_b_proj."""
        D, carried = latent.q_HKD.shape[2], latent.carried
        tensors = {
            "q_proj.weight": latent.q_HKD.flatten(0, 1),
            "k_b_proj.weight": latent.k_up_GNR.flatten(0, 1),
            "v_b_proj.weight": latent.v_up_GVR.flatten(0, 1),
            "o_proj.weight": latent.out_DHV.reshape(D, -1),
        }
        down = latent.kv_down_RX
        if latent.rope is not None:
            tensors["q_head_map"] = torch.cat((latent.rope.q_nope_HNK, latent.rope.q_rope_HPK), dim=1)
            down = torch.cat((down, latent.rope.k_rope_PX))
        if carried.constant:
            tensors["kv_a_proj_with_mqa.bias"] = down[:, -1]
            down = down[:, :-1].contiguous()
        tensors["kv_a_proj_with_mqa.weight"] = down
        tensors |= _carried_tensors(carried)
        return {name: tensor.to(target.dtype) for name, tensor in tensors.items() if tensor.numel()}

    def carried_tensors(self, name: str, tensor: Tensor, target: Target) -> Mapping[str, Tensor]:
        """Everything as it is; a tied head is left to its tie."""
        if name == HEAD and target.config.get("tie_word_embeddings"):
            return {}
        return {name: tensor.to(target.dtype)}


def _extras(spec: AttentionSpec) -> dict[str, Any]:
    """What attention has beside its linear maps, as far as this source has it."""
    extras = {
        "qkv_bias": spec.qkv_bias,
        "out_bias": spec.out_bias,
        "qk_norm": asdict(spec.qk_norm) if spec.qk_norm else None,
        "softcap": spec.softcap,
        "softmax_scale": None if spec.scale == spec.head_dim**-0.5 else spec.scale,
    }
    return {key: value for key, value in extras.items() if value}


def _carried_tensors(carried: Carried) -> dict[str, Tensor]:
    """The source's own biases, norms and, where these make features, its key projection."""
    tensors = {
        "q_proj.bias": None if carried.q_bias_HK is None else carried.q_bias_HK.flatten(),
        "o_proj.bias": carried.out_bias_D,
        "q_norm.weight": carried.q_norm.weight_W if carried.q_norm else None,
    }
    if carried.keys is not None:
        tensors["k_proj.weight"], tensors["k_proj.bias"] = carried.keys.proj_ED, carried.keys.bias_E
        tensors["k_norm.weight"] = carried.keys.norm.weight_W
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def native_class_name(model_type: str) -> str:
    """The name under which care.modeling makes the class of a source model type."""
    return "Care" + "".join(part.capitalize() for part in model_type.split("_")) + "ForCausalLM"
