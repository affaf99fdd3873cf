"""Which inference engine takes a checkpoint, and why another does not, from its config alone.

Every rule was met by running the engine or reading its source (docs/engines.md has versions). An engine that would load
a checkpoint and compute something else counts as one that does not take it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .rope import rope_settings
from .types import AttentionSpec

DEEPSEEK, NATIVE_PREFIX = "deepseek_v3", "care_"
"""Model types of the two formats; any other is a source, which engines read without our doing."""

ONE_EPS = 1e-6
"""The eps of transformers' latent norm; an engine with one eps for all norms must find it in rms_norm_eps."""

VLLM_WIDTHS = (320, 512, 576)
"""Cache widths (kv_lora_rank + qk_rope_head_dim) of vLLM's attention backends for latents."""

VLLM_CPU_RANK_ROPE = (512, 64)
"""Rank and rope dims of its only CPU kernel."""

VLLM_GPU_PREFILL = ((128, 64, 128), (192, 64, 256), (64, 64, 128))
"""No-rope, rope and value dims of a head that its prefill kernels on GPUs have."""

Rule = Callable[[Mapping[str, Any]], str | None]


def _stock(config: Mapping[str, Any]) -> str | None:
    """What keeps any engine from reading the config as a dense DeepSeek-V3 with one meaning."""
    if str(config.get("model_type")).startswith(NATIVE_PREFIX):
        return "per-layer widths need care's own class; convert with --recipe best-deepseek --format deepseek"
    if config.get("model_type") != DEEPSEEK:
        return f"model_type {config.get('model_type')} is not a converted model's"
    if config.get("first_k_dense_replace") != config["num_hidden_layers"]:
        return "only dense layers are written and tested here"
    if config.get("attention_bias"):
        return "biases in attention are dropped without a message"
    kind = rope_settings(config)["rope_type"]
    if kind != "default":
        return f"rope type {kind} is computed differently from engine to engine"
    return None


def _one_eps(config: Mapping[str, Any]) -> str | None:
    eps = config["rms_norm_eps"]
    return None if eps == ONE_EPS else f"rms_norm_eps {eps} would be used for the latent norm too, which has {ONE_EPS}"


def _transformers(config: Mapping[str, Any]) -> str | None:
    if str(config.get("model_type")).startswith(NATIVE_PREFIX):
        return "call care.register() first"
    return None


def _care(_config: Mapping[str, Any]) -> str | None:
    return None


def _vllm(config: Mapping[str, Any]) -> str | None:
    if (reason := _stock(config) or _one_eps(config)) is not None:
        return reason
    if config.get("tie_word_embeddings"):
        return "tied embeddings give flat logits without a message"
    return None


def _vllm_gpu(config: Mapping[str, Any]) -> str | None:
    if (reason := _vllm(config)) is not None:
        return reason
    width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    if width not in VLLM_WIDTHS:
        return f"rank + rope is {width}, it has kernels for {_listed(VLLM_WIDTHS)}"
    head = (config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"])
    if head not in VLLM_GPU_PREFILL:
        return f"(no-rope, rope, value) dims are {head}, its prefill has {_listed(VLLM_GPU_PREFILL)}"
    return None


def _vllm_cpu(config: Mapping[str, Any]) -> str | None:
    if (reason := _vllm(config)) is not None:
        return reason
    rank_rope = (config["kv_lora_rank"], config["qk_rope_head_dim"])
    if rank_rope != VLLM_CPU_RANK_ROPE:
        return f"rank and rope are {rank_rope}, its CPU kernel has {VLLM_CPU_RANK_ROPE}"
    return None


def _llama_cpp(config: Mapping[str, Any]) -> str | None:
    if (reason := _stock(config) or _one_eps(config)) is not None:
        return reason
    if config.get("q_lora_rank"):
        return "a low-rank query is not written by care export"
    if config.get("hidden_act") != "silu":
        return f"its deepseek2 computes silu, not {config.get('hidden_act')}"
    return None


ENGINES: dict[str, Rule] = {
    "transformers": _transformers,
    "care": _care,
    "vllm-gpu": _vllm_gpu,
    "vllm-cpu": _vllm_cpu,
    "llama.cpp": _llama_cpp,
}
"""Engine to the rule that says why it does not take a config, None where it does. llama.cpp reads the exported file."""


def engine_verdicts(config: Mapping[str, Any]) -> dict[str, str]:
    """For a checkpoint's config: "yes", or "no" with the reason, by engine."""
    return {engine: _said(rule(config)) for engine, rule in ENGINES.items()}


def engine_prospects(spec: AttentionSpec, deepseek_refusal: str | None) -> dict[str, str]:
    """For a source: what each engine would take of its conversions.

    `deepseek_refusal` is why format deepseek cannot hold the source; None where it can.
    """
    every = {"transformers": "yes, native after care.register()", "care": "yes, any format"}
    if deepseek_refusal is not None:
        return every | dict.fromkeys(("vllm-gpu", "vllm-cpu", "llama.cpp"), f"no ({deepseek_refusal})")
    gpu_ropes = [rope for nope, rope, value in VLLM_GPU_PREFILL if nope == value == spec.head_dim]
    gpu = [(width - rope, rope) for rope in gpu_ropes for width in VLLM_WIDTHS]
    return every | {
        "vllm-gpu": _widths(spec, gpu, f"its prefill has no heads of {spec.head_dim} no-rope and value dims"),
        "vllm-cpu": _widths(spec, [VLLM_CPU_RANK_ROPE], ""),
        "llama.cpp": "yes, format deepseek at any width, through care export",
    }


def _widths(spec: AttentionSpec, rank_ropes: list[tuple[int, int]], none: str) -> str:
    """The budgets that give an engine's widths, or that there are none."""
    fitting = [(rank, rope) for rank, rope in rank_ropes if rank + rope <= spec.cache_width]
    if not rank_ropes:
        return f"no ({none})"
    if not fitting:
        least = min(rank + rope for rank, rope in rank_ropes)
        return f"no (its least width is {least}, the source caches {spec.cache_width})"
    budgets = (f"{rank} + {rope} (--kv-budget {(rank + rope) / spec.cache_width:.3f})" for rank, rope in fitting)
    return "yes, format deepseek at rank + rope of " + " or ".join(budgets)


def _said(reason: str | None) -> str:
    return "yes" if reason is None else f"no ({reason})"


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))
