"""Which engine takes what: a table of configs, and the reasons."""

from typing import Any

import pytest

from care.engines import ENGINES, engine_prospects, engine_verdicts
from care.types import AttentionSpec

DENSE: dict[str, Any] = {
    "model_type": "deepseek_v3", "num_hidden_layers": 2, "first_k_dense_replace": 2, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
"""Taken by every engine."""

ALL = {"transformers", "care", "vllm-gpu", "vllm-cpu", "llama.cpp"}
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
        {"qk_nope_head_dim": 64, "v_head_dim": 64}, ALL - {"vllm-gpu"}, "(no-rope, rope, value) dims are (64, 64, 64)",
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
    "native": ({"model_type": "care_llama"}, {"care"}, "--recipe best-deepseek --format deepseek"),
    "not converted": ({"model_type": "llama"}, OWN, "model_type llama is not a converted model's"),
}  # fmt: skip
"""What differs from DENSE, who takes it, and words from the reason of the others."""


@pytest.mark.parametrize("name", list(TABLE))
def test_who_takes_it(name: str) -> None:
    changes, takers, words = TABLE[name]
    verdicts = engine_verdicts({**DENSE, **changes})
    assert {engine for engine, verdict in verdicts.items() if verdict == "yes"} == takers
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
        "vllm-gpu": "256 + 64 (--kv-budget 0.156) or 448 + 64 (--kv-budget 0.250) or 512 + 64 (--kv-budget 0.281)",
        "vllm-cpu": "yes, format deepseek at rank + rope of 512 + 64 (--kv-budget 0.281)",
        "llama.cpp": "yes, format deepseek at any width",
    },
    # 2 * 2 * 128 = 512 values.
    (2, 128): {"vllm-gpu": "448 + 64 (--kv-budget 1.000)", "vllm-cpu": "its least width is 576, the source caches 512"},
    # 2 * 1 * 128 = 256 values.
    (1, 128): {"vllm-gpu": "no (its least width is 320, the source caches 256)"},
    (8, 64): {"vllm-gpu": "no (its prefill has no heads of 64", "vllm-cpu": "512 + 64 (--kv-budget 0.562)"},
}


@pytest.mark.parametrize("shape", list(PROSPECTS), ids=str)
def test_prospects_of_a_source(shape: tuple[int, int]) -> None:
    made = engine_prospects(spec(*shape), None)
    assert set(made) == ALL
    for engine, words in PROSPECTS[shape].items():
        assert words in made[engine]


def test_prospects_of_a_source_that_only_native_holds() -> None:
    made = engine_prospects(spec(8, 128), "format deepseek has no biases")
    assert {engine for engine, verdict in made.items() if verdict.startswith("yes")} == OWN
    assert made["llama.cpp"] == "no (format deepseek has no biases)"
