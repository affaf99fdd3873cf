"""Which inference engine takes a checkpoint, and why another does not, from its config alone.

Every rule was met by running the engine or reading its source (docs/engines.md has versions). An engine that would load
a checkpoint and compute something else counts as one that does not take it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .architectures import ARCHITECTURES
from .errors import InvalidRecipe
from .formats.deepseek import LATENT_NORM_EPS
from .formats.deepseek import MODEL_TYPE as DEEPSEEK_TYPE
from .formats.native import MODEL_TYPE_PREFIX
from .rope import rope_settings
from .types import AttentionSpec

VLLM_WIDTHS = (320, 512, 576)
"""Cache widths (kv_lora_rank + qk_rope_head_dim) of vLLM's attention backends for latents."""

VLLM_CPU_RANK_ROPE = (512, 64)
"""Rank and rope dims of its only CPU kernel."""

VLLM_GPU_PREFILL = ((128, 64, 128), (192, 64, 256), (64, 64, 128))
"""No-rope, rope and value dims of a head that its prefill kernels on GPUs have."""

Rule = Callable[[Mapping[str, Any]], str | None]


def _is_native(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type")).startswith(MODEL_TYPE_PREFIX)


def is_converted(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of one of our formats."""
    return _is_native(config) or config.get("model_type") == DEEPSEEK_TYPE


def _stock(config: Mapping[str, Any]) -> str | None:
    """What keeps any engine from reading the config as a dense DeepSeek-V3 with one meaning."""
    if _is_native(config):
        return "per-layer widths need care's own class; convert with --recipe best-deepseek --format deepseek"
    if config.get("model_type") != DEEPSEEK_TYPE:
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
    """An engine with one eps for all norms must find that of the latent's in rms_norm_eps."""
    eps = config["rms_norm_eps"]
    return (
        None
        if eps == LATENT_NORM_EPS
        else f"rms_norm_eps {eps} would be used for the latent norm too, which has {LATENT_NORM_EPS}"
    )


def _transformers(config: Mapping[str, Any]) -> str | None:
    return "call care.register() first" if _is_native(config) else None


def _care(_config: Mapping[str, Any]) -> str | None:
    return None


def _vllm_stock(config: Mapping[str, Any]) -> str | None:
    if (reason := _stock(config) or _one_eps(config)) is not None:
        return reason
    if config.get("tie_word_embeddings"):
        return "tied embeddings give flat logits without a message"
    return None


def _vllm(config: Mapping[str, Any]) -> str | None:
    if _is_native(config):
        return "care's plugin was run on CPUs only; convert with --for vllm"
    if (reason := _vllm_stock(config)) is not None:
        return reason
    width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    if width not in VLLM_WIDTHS:
        return f"rank + rope is {width}, it has kernels for {_listed(VLLM_WIDTHS)}"
    head = (config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"])
    if head not in VLLM_GPU_PREFILL:
        return f"(no-rope, rope, value) dims are {head}, its prefill has {_listed(VLLM_GPU_PREFILL)}"
    return None


def _vllm_cpu(config: Mapping[str, Any]) -> str | None:
    if _is_native(config):
        return _vllm_plugin(config)
    if (reason := _vllm_stock(config)) is not None:
        return reason
    rank_rope = (config["kv_lora_rank"], config["qk_rope_head_dim"])
    if rank_rope != VLLM_CPU_RANK_ROPE:
        return f"rank and rope are {rank_rope}, its CPU kernel has {VLLM_CPU_RANK_ROPE}; format native has any"
    return None


def _vllm_plugin(config: Mapping[str, Any]) -> str | None:
    """What care's own classes in vLLM do not compute: they have Llama's body and attend to latents as they lie."""
    if config["latent_attention"]["mode"] != "absorbed":
        return "keys would be rebuilt at every step; convert with --mode absorbed"
    model_type = config["model_type"].removeprefix(MODEL_TYPE_PREFIX)
    if not ARCHITECTURES[model_type].deepseek_body or config.get("hidden_act", "silu") != "silu":
        return f"care's plugin has Llama's body, not that of {model_type}"
    return None


def _llama_cpp(config: Mapping[str, Any]) -> str | None:
    if (reason := _stock(config) or _one_eps(config)) is not None:
        return reason
    if config.get("q_lora_rank"):
        return "a low-rank query is not written by care export"
    if config.get("hidden_act") != "silu":
        return f"its deepseek2 computes silu, not {config.get('hidden_act')}"
    return None


@dataclass(frozen=True)
class Engine:
    """`rule` says why the engine does not take a config, None where it does; `recipe` is the best one for it.

    `loads` is how it is given a checkpoint in the directory OUT.
    """

    rule: Rule
    recipe: str
    loads: str


FROM_PRETRAINED = "`AutoModelForCausalLM.from_pretrained(OUT)`"

ENGINES: dict[str, Engine] = {
    "transformers": Engine(_transformers, "best-deepseek", f"{FROM_PRETRAINED}, nothing of care's"),
    "care": Engine(_care, "best", f"`import care; care.register()`, then {FROM_PRETRAINED}; `care serve OUT`"),
    "vllm": Engine(_vllm, "best-deepseek", "`vllm serve OUT --dtype bfloat16`; it has kernels for this shape"),
    "vllm-cpu": Engine(_vllm_cpu, "best", "`care serve OUT --engine vllm`"),
    "llama.cpp": Engine(
        _llama_cpp, "best-deepseek", "`care export OUT model.gguf --quantize q8_0`, then `llama-cli -m model.gguf`"
    ),
}
"""transformers is that without our code, vllm is that on GPUs; llama.cpp reads the exported file."""

PLUGIN = "care installed beside vLLM"


def engine_verdicts(config: Mapping[str, Any]) -> dict[str, str]:
    """For a checkpoint's config: "yes", with a condition where there is one, or "no" with the reason, by engine."""
    verdicts: dict[str, str] = {}
    for name, engine in ENGINES.items():
        reason = engine.rule(config)
        condition = f", with {PLUGIN}" if name == "vllm-cpu" and _is_native(config) else ""
        verdicts[name] = f"yes{condition}" if reason is None else f"no ({reason})"
    return verdicts


def engine_loading(config: Mapping[str, Any]) -> dict[str, str]:
    """The verdicts, with how to load where they are "yes"."""
    verdicts = engine_verdicts(config)
    return {
        name: f"{verdict}: {ENGINES[name].loads}" if verdict.startswith("yes") else verdict
        for name, verdict in verdicts.items()
    }


def engine_prospects(
    model_type: str, source_config: Mapping[str, Any], spec: AttentionSpec, deepseek_refusal: str | None
) -> dict[str, str]:
    """For a source: what each engine would take of its conversions.

    `deepseek_refusal` is why format deepseek cannot hold the source; None where it can.
    """
    prospects = {
        "transformers": "yes, native after care.register()",
        "care": "yes, any format",
        "vllm": f"no ({deepseek_refusal})",
        "vllm-cpu": f"yes, format native at any width, with {PLUGIN}",
        "llama.cpp": f"no ({deepseek_refusal})",
    }
    if (reason := plugin_refusal(model_type, source_config)) is not None:
        prospects["vllm-cpu"] = f"no ({reason})"
    if deepseek_refusal is None:
        prospects["vllm"] = _widths(spec)
        prospects["llama.cpp"] = "yes, format deepseek at any width, through care export"
    return prospects


def _vllm_shapes(spec: AttentionSpec) -> list[tuple[int, int]]:
    """Ranks and rope dims, narrowest first, for which vLLM has kernels on GPUs and which are a saving.

    At the source's own width nothing is converted to one shape: that is parity.
    """
    ropes = sorted({rope for nope, rope, value in VLLM_GPU_PREFILL if nope == value == spec.head_dim})
    return [(width - rope, rope) for width in VLLM_WIDTHS for rope in ropes if width < spec.cache_width]


def _no_shape(spec: AttentionSpec) -> str:
    if all((nope, value) != (spec.head_dim, spec.head_dim) for nope, _, value in VLLM_GPU_PREFILL):
        return f"its prefill has no heads of {spec.head_dim} no-rope and value dims"
    return f"its least width is {min(VLLM_WIDTHS)}, the source caches {spec.cache_width}"


def _budget(spec: AttentionSpec, shape: tuple[int, int]) -> float:
    """The least --kv-budget of three digits that has room for a shape."""
    return math.ceil(1000 * sum(shape) / spec.cache_width) / 1000


def _widths(spec: AttentionSpec) -> str:
    """The budgets that give vLLM's widths, or that there are none."""
    shapes = _vllm_shapes(spec)
    if not shapes:
        return f"no ({_no_shape(spec)})"
    budgets = (f"{rank} + {rope} (--kv-budget {_budget(spec, (rank, rope))})" for rank, rope in shapes)
    return "yes, format deepseek with --for vllm, rank + rope of " + " or ".join(budgets)


def vllm_shape(spec: AttentionSpec, kv_budget: float) -> tuple[int, int]:
    """The widest rank and rope dims within the budget that stock vLLM has kernels for.

    Raises InvalidRecipe with the remedy where there are none.
    """
    shapes = _vllm_shapes(spec)
    if not shapes:
        raise InvalidRecipe(f"vLLM on GPUs cannot take a conversion: {_no_shape(spec)}; --for vllm-cpu has any width")
    fitting = [shape for shape in shapes if sum(shape) <= kv_budget * spec.cache_width]
    if not fitting:
        raise InvalidRecipe(
            f"--kv-budget {kv_budget} is {kv_budget * spec.cache_width:.0f} values a layer, vLLM has kernels for "
            f"{sum(shapes[0])} and more; raise --kv-budget to {_budget(spec, shapes[0])} or take --for vllm-cpu"
        )
    return fitting[-1]


def plugin_refusal(model_type: str, source_config: Mapping[str, Any]) -> str | None:
    """Why care's plugin for vLLM cannot run an absorbed conversion of a source; None where it can."""
    native = {"model_type": MODEL_TYPE_PREFIX + model_type, "latent_attention": {"mode": "absorbed"}}
    return _vllm_plugin({**source_config, **native})


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))
