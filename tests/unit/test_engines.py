"""Which engine takes what: a table of configs, and the reasons."""

from typing import Any

import pytest

from care.engines import ENGINES, engine_prospects, engine_verdicts, vllm_shape
from care.errors import InvalidRecipe
from care.types import AttentionSpec

DENSE: dict[str, Any] = {
    "model_type": "deepseek_v3", "num_hidden_layers": 2, "first_k_dense_replace": 2, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
"""Taken by every engine."""

ALL = {"transformers", "care", "vllm", "vllm-cpu", "llama.cpp"}
OWN = {"transformers", "care"}
TABLE: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "all": ({}, ALL, ""),
    "a narrower latent": ({"kv_lora_rank": 256}, ALL - {"vllm-cpu"}, "rank and rope are (256, 64)"),
    "512 in all": ({"kv_lora_rank": 448}, ALL - {"vllm-cpu"}, "rank and rope are (448, 64)"),
    "any width": (
        {"kv_lora_rank": 144, "qk_rope_head_dim": 48}, OWN | {"llama.cpp"},
        "rank + rope is 192, it has kernels for 320, 512, 576",
    ),
    "the right width, split otherwise": (
        {"kv_lora_rank": 480, "qk_rope_head_dim": 96}, OWN | {"llama.cpp"}, "dims are (128, 96, 128)",
    ),
    "small heads": (
        {"qk_nope_head_dim": 64, "v_head_dim": 64}, ALL - {"vllm"}, "(no-rope, rope, value) dims are (64, 64, 64)",
    ),
    "heads with wider values": ({"qk_nope_head_dim": 64}, ALL, ""),
    "biases": ({"attention_bias": True}, OWN, "biases in attention are dropped"),
    "another eps": ({"rms_norm_eps": 1e-5}, OWN, "rms_norm_eps 1e-05 would be used for the latent norm too"),
    "tied": ({"tie_word_embeddings": True}, OWN | {"llama.cpp"}, "tied embeddings give flat logits"),
    "scaled rope": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, OWN, "rope type llama3 is computed",
    ),
    "scaled rope, older key": (
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, OWN, "rope type yarn",
    ),
    "experts": ({"first_k_dense_replace": 1}, OWN, "only dense layers"),
    "low-rank queries": ({"q_lora_rank": 64}, ALL - {"llama.cpp"}, "a low-rank query"),
    "another activation": ({"hidden_act": "gelu"}, ALL - {"llama.cpp"}, "computes silu, not gelu"),
    "native": (
        {"model_type": "care_qwen3", "latent_attention": {"mode": "absorbed"}}, {"care", "vllm-cpu"},
        "--recipe best-deepseek --format deepseek",
    ),
    "native, rebuilt keys": (
        {"model_type": "care_llama", "latent_attention": {"mode": "rebuild"}}, {"care"}, "convert with --mode absorbed",
    ),
    "native, another body": (
        {"model_type": "care_olmo2", "latent_attention": {"mode": "absorbed"}}, {"care"}, "not that of olmo2",
    ),
    "native, another activation": (
        {"model_type": "care_llama", "hidden_act": "gelu", "latent_attention": {"mode": "absorbed"}}, {"care"},
        "not that of llama",
    ),
    "not converted": ({"model_type": "llama"}, OWN, "model_type llama is not a converted model's"),
}  # fmt: skip
"""What differs from DENSE, who takes it, and words from the reason of the others."""


@pytest.mark.parametrize("name", list(TABLE))
def test_who_takes_it(name: str) -> None:
    changes, takers, words = TABLE[name]
    verdicts = engine_verdicts({**DENSE, **changes})
    assert {engine for engine, verdict in verdicts.items() if verdict.startswith("yes")} == takers
    reasons = [verdict for engine, verdict in verdicts.items() if engine not in takers]
    assert all(reason.startswith("no (") for reason in reasons)
    assert any(words in reason for reason in reasons) or not reasons


def test_every_engine_refuses_something() -> None:
    """But for our own class, which is what the others are measured against."""
    refused = {engine for _, takers, _ in TABLE.values() for engine in ENGINES if engine not in takers}
    assert refused == set(ENGINES) - {"care"}


def spec(num_kv_heads: int, head_dim: int) -> AttentionSpec:
    """A source's sizes."""
    return AttentionSpec(2, 64, 32, num_kv_heads, head_dim, ((0.1,) * (head_dim // 2),) * 2, head_dim**-0.5)


PROSPECTS = {
    # Llama-3's shape: 2 * 8 * 128 = 2048 values.
    (8, 128): {
        "vllm": "256 + 64 (--kv-budget 0.157) or 448 + 64 (--kv-budget 0.25) or 512 + 64 (--kv-budget 0.282)",
        "llama.cpp": "yes, format deepseek at any width",
        "vllm-cpu": "yes, format native at any width, with care installed beside vLLM",
    },
    # 2 * 2 * 128 = 512 values, which would be parity.
    (2, 128): {"vllm": "yes, format deepseek with --for vllm, rank + rope of 256 + 64 (--kv-budget 0.625)"},
    # 2 * 1 * 128 = 256 values.
    (1, 128): {"vllm": "no (its least width is 320, the source caches 256)"},
    (8, 64): {"vllm": "no (its prefill has no heads of 64"},
}


@pytest.mark.parametrize("shape", list(PROSPECTS), ids=str)
def test_prospects_of_a_source(shape: tuple[int, int]) -> None:
    made = engine_prospects("llama", {}, spec(*shape), None)
    assert set(made) == ALL
    for engine, words in PROSPECTS[shape].items():
        assert words in made[engine]


def test_prospects_of_a_source_that_only_native_holds() -> None:
    made = engine_prospects("qwen2", {}, spec(8, 128), "format deepseek has no biases")
    assert {engine for engine, verdict in made.items() if verdict.startswith("yes")} == OWN | {"vllm-cpu"}
    assert made["llama.cpp"] == "no (format deepseek has no biases)"


def test_prospects_of_a_body_that_the_plugin_does_not_have() -> None:
    assert engine_prospects("gemma2", {}, spec(8, 128), None)["vllm-cpu"].startswith("no (care's plugin has Llama's")


@pytest.mark.parametrize(("budget", "shape"), [(0.5, (512, 64)), (0.25, (448, 64)), (0.157, (256, 64))])
def test_the_widest_shape_within_the_budget(budget: float, shape: tuple[int, int]) -> None:
    assert vllm_shape(spec(8, 128), budget) == shape


def test_the_source_width_is_no_shape() -> None:
    """448 + 64 of 512 values: at the full budget conversion is parity, which has other rope dims."""
    assert vllm_shape(spec(2, 128), 1.0) == (256, 64)


@pytest.mark.parametrize(
    ("shape", "budget", "words"),
    [
        ((8, 128), 0.1, r"raise --kv-budget to 0\.157 or take --for vllm-cpu"),
        ((8, 64), 0.5, "no heads of 64 no-rope and value dims; --for vllm-cpu has any width"),
        ((1, 128), 0.5, "least width is 320, the source caches 256"),
    ],
)
def test_no_shape_within_the_budget(shape: tuple[int, int], budget: float, words: str) -> None:
    with pytest.raises(InvalidRecipe, match=words):
        vllm_shape(spec(*shape), budget)
