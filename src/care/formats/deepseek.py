"""The stock layout of `DeepseekV3ForCausalLM`, dense layers only: loads with no code of ours.

Three things of the source have no key in that layout and are folded into weights instead:

* the softmax scale is (nope + rope)^-1/2 there: the ratio to the source's is folded into the queries;
* an RMSNorm stands on the latent: the latent is scaled so far down that the norm's eps dominates, which makes
  it the linear map c -> c * weight / sqrt(eps), and the weight undoes both;
* engines take that eps from different places and agree only when `rms_norm_eps` is 1e-6. A source with another
  eps gets there exactly by scaling the residual stream: norm(a x; a^2 eps) = norm(x; eps).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InvalidRecipe
from ..rope import inverse_frequencies, rope_settings
from ..types import LatentAttention, LayerRanks, Target

MODEL_TYPE = "deepseek_v3"

LATENT_NORM_EPS = 1e-6
"""Eps of kv_a_layernorm, hard-coded in transformers; other engines use rms_norm_eps, so that is set to it."""

LATENT_HEADROOM = 1e-6
"""Upper bound of mean(c^2) / eps for a scaled latent c, hence twice the bound of the norm's relative error."""

INPUT_MEAN_SQUARE = 1e4
"""Largest mean square of an attention input for which the headroom is promised (norm gains up to 100)."""

TABLE_TOLERANCE = 1e-6
"""Relative difference at which a frequency counts as the table's own: fp32 rounding of the two formulas."""

SAME_EPS = 1e-3
"""Relative difference at which a source's eps counts as 1e-6 already: GGUF files store it in fp32."""

EMBEDDING, HEAD, DOWN = "model.embed_tokens.weight", "lm_head.weight", "mlp.down_proj.weight"

COPIED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
)  # fmt: skip


@dataclass(frozen=True)
class Deepseek:
    """DeepSeek-V3 tensors: q_proj, kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj."""

    one_width: ClassVar[bool] = True

    def check(self, target: Target) -> None:
        """Refuse rebuild mode, what the layout has no place for, and rope tables that are not base^(-2i/d)."""
        config, spec = target.config, target.spec
        if target.mode != "absorbed":
            raise InvalidRecipe("format deepseek cannot rebuild keys; use --mode absorbed or --format native")
        if not target.deepseek_body or config.get("mlp_bias"):
            raise InvalidRecipe(f"format deepseek cannot hold a {config['model_type']} body; use --format native")
        lacking = {
            "no biases in attention": spec.qkv_bias or spec.out_bias,
            "no norm on queries and keys": spec.qk_norm,
            "no soft cap on scores": spec.softcap,
            "no sliding window": any(spec.windows),
        }
        for lack, used in lacking.items():
            if used:
                raise InvalidRecipe(f"format deepseek has {lack}, which this source uses; use --format native")
        if config.get("hidden_act", "silu") != "silu":
            raise InvalidRecipe(
                f"format deepseek needs hidden_act silu, not {config['hidden_act']}; use --format native"
            )
        if target.dtype == torch.float16:
            raise InvalidRecipe("format deepseek underflows in float16; use --dtype bfloat16 or float32")
        self._rope_base(target)

    def _rope_base(self, target: Target) -> float:
        """The base whose table is exactly the slots' frequencies."""
        if target.slot_frequencies is None:
            raise InvalidRecipe("format deepseek needs one table of rope slots for all layers; use --format native")
        frequencies = torch.tensor(target.slot_frequencies, dtype=torch.float64)
        count = len(frequencies)
        candidates = [float(rope_settings(target.config)["rope_theta"])]
        if count > 1 and 0 < float(frequencies[1]) < 1:
            candidates.append(float(frequencies[1]) ** -count)
        for base in candidates:
            if torch.allclose(inverse_frequencies(base, 2 * count).double(), frequencies, rtol=TABLE_TOLERANCE, atol=0):
                return base
        raise InvalidRecipe(
            f"format deepseek rotates by base^(-2i/{2 * count}), which is not the table of these {count} rope slots; "
            "use --format native"
        )

    def config(
        self, target: Target, ranks: Sequence[LayerRanks], frequencies: Sequence[tuple[float, ...]]
    ) -> dict[str, Any]:
        """A dense DeepseekV3Config that transformers, vLLM and llama.cpp read alike."""
        spec, source = target.spec, target.config
        base = self._rope_base(target)
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": MODEL_TYPE,
            **{key: source[key] for key in COPIED_KEYS if key in source},
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_heads,
            "kv_lora_rank": ranks[0].latent_rank,
            "q_lora_rank": None,
            "qk_rope_head_dim": ranks[0].rope_dim,
            "qk_nope_head_dim": spec.head_dim,
            "v_head_dim": spec.head_dim,
            "rms_norm_eps": LATENT_NORM_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": base},
            "rope_theta": base,
            "rope_scaling": None,
            "rope_interleave": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            # Every layer is dense; the mixture keys must be integers all the same.
            "first_k_dense_replace": spec.num_layers,
            "moe_intermediate_size": source["intermediate_size"],
            "n_routed_experts": 1, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
            "routed_scaling_factor": 1.0, "norm_topk_prob": True, "moe_layer_freq": 1, "num_nextn_predict_layers": 0,
            "dtype": str(target.dtype).removeprefix("torch."),
        }  # fmt: skip

    def attention_tensors(self, latent: LatentAttention, target: Target) -> dict[str, Tensor]:
        """Queries with the scale folded in, the scaled latent, and per-head up-projections."""
        if latent.rope is None:
            raise InvalidRecipe("format deepseek cannot rebuild keys")
        D = latent.q_HKD.shape[2]
        R, N = latent.kv_down_RX.shape[0], target.spec.head_dim
        shrink, norm_weight = latent_scale(latent.kv_down_RX)
        tensors = {
            "q_proj.weight": _queries(latent, N),
            "kv_a_proj_with_mqa.weight": torch.cat((latent.kv_down_RX * shrink, latent.rope.k_rope_PX)),
            "kv_a_layernorm.weight": torch.full((R,), norm_weight, dtype=torch.float64),
            "kv_b_proj.weight": _up_projections(latent, N),
            "o_proj.weight": latent.out_DHV.reshape(D, -1).double() * residual_scale(target),
        }
        return {name: tensor.to(target.dtype) for name, tensor in tensors.items()}

    def carried_tensors(self, name: str, tensor: Tensor, target: Target) -> Mapping[str, Tensor]:
        """Scale what writes to the residual stream, and untie the head."""
        tied = bool(target.config.get("tie_word_embeddings"))
        if name == HEAD and tied:
            return {}
        if name == EMBEDDING:
            head = {HEAD: tensor.to(target.dtype, copy=True)} if tied else {}  # a file holds no tensor twice
            return {name: _scaled(tensor, residual_scale(target), target.dtype), **head}
        factor = residual_scale(target) if name.endswith(DOWN) else 1.0
        return {name: _scaled(tensor, factor, target.dtype)}


def residual_scale(target: Target) -> float:
    """The factor a on the residual stream with a^2 * eps(source) = 1e-6; 1 when the source has that eps."""
    eps = float(target.config["rms_norm_eps"])
    return 1.0 if abs(eps / LATENT_NORM_EPS - 1) < SAME_EPS else (LATENT_NORM_EPS / eps) ** 0.5


def latent_scale(kv_down_RX: Tensor) -> tuple[float, float]:
    """Factor on the latent, and norm weight that undoes it, for a norm that acts as a linear map.

    mean(c^2) <= |W|_F^2 |x|^2 / R bounds the latent of any input; no calibration is needed. The weight is a
    power of two, which every dtype stores exactly: rounded, it would scale all values of a layer alike.
    """
    R, D = kv_down_RX.shape
    largest = float(kv_down_RX.double().pow(2).sum()) * INPUT_MEAN_SQUARE * D / R
    least_weight = (largest / LATENT_HEADROOM) ** 0.5
    norm_weight = 2.0 ** math.ceil(math.log2(least_weight))
    return LATENT_NORM_EPS**0.5 / norm_weight, norm_weight


def _scaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Scaled in fp64 and rounded once."""
    return tensor.to(dtype) if factor == 1.0 else (tensor.double() * factor).to(dtype)


def _queries(latent: LatentAttention, N: int) -> Tensor:
    """Rows [no-rope, rope] of each head; a layer without no-rope keys gets N rows of zeros."""
    assert latent.rope is not None
    H, _, D = latent.q_HKD.shape
    nope_HND = torch.einsum("hnk,hkd->hnd", latent.rope.q_nope_HNK, latent.q_HKD.double())
    rope_HPD = torch.einsum("hpk,hkd->hpd", latent.rope.q_rope_HPK, latent.q_HKD.double())
    pad_HND = nope_HND.new_zeros(H, N - nope_HND.shape[1], D)
    rows = torch.cat((nope_HND, pad_HND, rope_HPD), dim=1)
    return rows.flatten(0, 1) * (latent.scale * (N + rope_HPD.shape[1]) ** 0.5)


def _up_projections(latent: LatentAttention, N: int) -> Tensor:
    """Rows [no-rope key, value] of each query head; a separate latent becomes blocks of zeros."""
    G, V, _ = latent.v_up_GVR.shape
    H, R = latent.q_HKD.shape[0], latent.kv_down_RX.shape[0]
    up = latent.k_up_GNR.new_zeros(G, N + V, R)
    up[:, : latent.k_up_GNR.shape[1], : latent.k_rank] = latent.k_up_GNR
    up[:, N:, R - latent.v_rank :] = latent.v_up_GVR
    return up.repeat_interleave(H // G, 0).flatten(0, 1)
