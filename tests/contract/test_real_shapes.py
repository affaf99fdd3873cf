"""Every family at its real sizes, from the keys of its real config.json, on the meta device: no weight is allocated."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from care.architectures import ARCHITECTURES, architecture_for
from care.modeling.loading import checkpoint_shapes
from modules import assert_spec_is_the_models


@dataclass(frozen=True)
class Real:
    """A published model: its config.json, as far as sizes and attention go, and its number of parameters."""

    parameters: int
    config: dict[str, Any]


def config(model_type: str, sizes: tuple[int, int, int, int, int, int], **others: Any) -> dict[str, Any]:
    """Hidden and intermediate size, layers, query heads, key heads and vocabulary under their usual keys."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {"model_type": model_type, **dict(zip((*keys, "vocab_size"), sizes, strict=True)), **others}


LLAMA31 = {
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
QWEN25 = {
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 32768,
    "max_window_layers": 24,
}  # fmt: skip
QWEN3 = {
    "rms_norm_eps": 1e-6, "head_dim": 128, "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
    "rope_scaling": None,
}  # fmt: skip
GEMMA3 = {
    "rms_norm_eps": 1e-6, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512,
    "sliding_window_pattern": 6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None,
    "attn_logit_softcapping": None, "attention_bias": False, "use_bidirectional_attention": False,
}  # fmt: skip

REAL = {
    "Llama-2-7B": Real(6738415616, config(
        "llama", (4096, 11008, 32, 32, 32, 32000), rms_norm_eps=1e-5, rope_scaling=None, tie_word_embeddings=False,
    )),
    "Llama-3.1-8B-Instruct": Real(8030261248, config("llama", (4096, 14336, 32, 32, 8, 128256), **LLAMA31)),
    "Llama-3.1-70B-Instruct": Real(70553706496, config("llama", (8192, 28672, 80, 64, 8, 128256), **LLAMA31)),
    "Mistral-7B-v0.1": Real(7241732096, config(
        "mistral", (4096, 14336, 32, 32, 8, 32000), rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
    )),
    "SmolLM2-135M": Real(134515008, config(
        "llama", (576, 1536, 30, 9, 3, 49152), rms_norm_eps=1e-5, rope_theta=100000, tie_word_embeddings=True,
    )),
    "SmolLM2-1.7B": Real(1711376384, config(
        "llama", (2048, 8192, 24, 32, 32, 49152), rms_norm_eps=1e-5, rope_theta=130000, tie_word_embeddings=True,
    )),
    "SmolLM3-3B": Real(3075098624, config(
        "smollm3", (2048, 11008, 36, 16, 4, 128256), rms_norm_eps=1e-6, rope_theta=5000000.0, no_rope_layer_interval=4,
        use_sliding_window=False, sliding_window=None,
    )),
    "Qwen2.5-0.5B": Real(494032768, config(
        "qwen2", (896, 4864, 24, 14, 2, 151936), tie_word_embeddings=True, **QWEN25,
    )),
    "Qwen2.5-7B": Real(7615616512, config(
        "qwen2", (3584, 18944, 28, 28, 4, 152064), tie_word_embeddings=False, **QWEN25,
    )),
    "Qwen3-4B-Instruct-2507": Real(4022468096, config(
        "qwen3", (2560, 9728, 36, 32, 8, 151936), tie_word_embeddings=True, rope_theta=5000000, **QWEN3,
    )),
    "Qwen3-30B-A3B-Instruct-2507": Real(30532122624, config(
        "qwen3_moe", (2048, 6144, 48, 32, 4, 151936), tie_word_embeddings=False, rope_theta=10000000,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, decoder_sparse_step=1, mlp_only_layers=[],
        **QWEN3,
    )),
    "Gemma-2-2B": Real(2614341888, config(
        "gemma2", (2304, 9216, 26, 8, 4, 256000), head_dim=256, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, sliding_window=4096, rms_norm_eps=1e-6, rope_theta=10000.0,
    )),
    "Gemma-3-270m": Real(268098176, config("gemma3_text", (640, 2048, 18, 4, 1, 262144), **GEMMA3)),
    "Gemma-3-1B": Real(999885952, config("gemma3_text", (1152, 6912, 26, 4, 1, 262144), **GEMMA3)),
    "Mixtral-8x7B": Real(46702792704, config(
        "mixtral", (4096, 14336, 32, 32, 8, 32000), rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
        num_local_experts=8, num_experts_per_tok=2,
    )),
    "Phi-3-mini-4k": Real(3821079552, config(
        "phi3", (3072, 8192, 32, 32, 32, 32064), rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=2047,
        rope_scaling=None,
    )),
    "OLMo-2-7B": Real(7298617344, config(
        "olmo2", (4096, 11008, 32, 32, 32, 100352), rms_norm_eps=1e-6, rope_theta=500000, attention_bias=False,
    )),
}  # fmt: skip

EVERY = pytest.mark.parametrize("name", list(REAL))


class Headers:
    """A checkpoint of which only names and shapes are known."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    def num_bytes(self) -> int:
        raise AssertionError


@cache
def headers_of(name: str) -> Headers:
    """The checkpoint's names and shapes, as transformers would save it."""
    return Headers(checkpoint_shapes(transformers.AutoConfig.for_model(**REAL[name].config)))


def test_every_architecture_has_a_real_model() -> None:
    assert {real.config["model_type"] for real in REAL.values()} == set(ARCHITECTURES)


@EVERY
def test_the_checkpoint_is_the_published_one(name: str) -> None:
    """By its number of parameters, which the model's card states."""
    headers = headers_of(name)
    assert sum(torch.Size(headers.shape(n)).numel() for n in headers.names()) == REAL[name].parameters


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("Mixtral-8x7B", "model.layers.31.block_sparse_moe.experts.7.w3.weight", (14336, 4096)),
        ("Mixtral-8x7B", "model.layers.0.block_sparse_moe.gate.weight", (8, 4096)),
        ("Qwen3-30B-A3B-Instruct-2507", "model.layers.47.mlp.experts.127.gate_proj.weight", (768, 2048)),
        ("Qwen3-30B-A3B-Instruct-2507", "model.layers.0.self_attn.k_norm.weight", (128,)),
        ("Qwen2.5-7B", "model.layers.27.self_attn.v_proj.bias", (512,)),
        ("Phi-3-mini-4k", "model.layers.31.self_attn.qkv_proj.weight", (9216, 3072)),
        ("OLMo-2-7B", "model.layers.31.self_attn.q_norm.weight", (4096,)),
    ],
)
def test_tensors_have_their_published_names(name: str, tensor: str, shape: tuple[int, ...]) -> None:
    """Experts one by one, not fused as in memory."""
    assert headers_of(name).shape(tensor) == shape


@EVERY
def test_every_tensor_is_claimed_once(name: str) -> None:
    headers, real = headers_of(name), REAL[name].config
    architecture = architecture_for(real)
    spec = architecture.spec(real)
    converted = {
        n: shape for i in range(spec.num_layers) for n, shape in architecture.attention_shapes(i, spec).items()
    }
    assert {n: headers.shape(n) for n in converted} == converted
    carried = [n for names in architecture.untouched(headers, spec).values() for n in names]
    assert Counter([*converted, *carried]) == Counter(headers.names())
    assert not any(".self_attn." in n for n in carried)


@EVERY
def test_spec_is_the_models(name: str) -> None:
    real = REAL[name].config
    known = transformers.AutoConfig.for_model(**real)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(known)
    rotary = type(model.model.rotary_emb)(known)
    assert_spec_is_the_models(architecture_for(real).spec(real), model, rotary)


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen3-4B-Instruct-2507", "Qwen3-30B-A3B-Instruct-2507", "SmolLM3-3B"])
def test_windows_that_are_switched_on(name: str) -> None:
    """Published configs have the keys but no list of layer kinds; which layers they mean is the family's rule."""
    real: dict[str, Any] = {
        **REAL[name].config,
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 20,
    }
    known = transformers.AutoConfig.for_model(**real)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(known)
    spec = architecture_for(real).spec(real)
    assert 64 in spec.windows
    assert_spec_is_the_models(spec, model, type(model.model.rotary_emb)(known))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_absent_keys_have_transformers_defaults(name: str) -> None:
    """A config.json that states nothing but the sizes that have no default here."""
    known: Any = transformers.AutoConfig.for_model(name)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    spec = ARCHITECTURES[name].spec({key: getattr(known, key) for key in sizes})
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(known)
    assert_spec_is_the_models(spec, model, type(model.model.rotary_emb)(known))
    if spec.qk_norm:
        norm = model.model.layers[0].self_attn.k_norm
        assert spec.qk_norm.eps == getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
