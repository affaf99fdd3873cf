"""Tiny random models: real checkpoints with a real tokenizer, built on disk and never downloaded."""

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from care.calibration import Calibration, Collection, Observed, Wanted
from care.calibration.store import layer_name, read_layer
from care.conversion import convert
from care.modeling.loading import Location, load_model
from care.plan import Plan, plan_conversion
from care.recipe import load_recipe
from care.source import Source, open_source
from care.statistics import STATISTICS, CalibrationRequest, calibrate
from care.types import AttentionWeights, LayerStats, Mode

Made = TypeVar("Made")

VOCABULARY = 264
WINDOW = 32
NUM_WINDOWS = 12
SLIDING_WINDOW = 8

SHARED = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.3,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip

LLAMA3_ROPE = {
    # Wavelengths 6, 13, 28 and 59: one is kept, two are blended, one is divided.
    "rope_type": "llama3", "rope_theta": 20.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

TINY: dict[str, dict[str, Any]] = {
    "llama-gqa": {
        "model_type": "llama", "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "llama3-rope": {
        "model_type": "llama", "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": LLAMA3_ROPE,
    },
    "llama-wide": {
        # Keys and values of 48 values each from 32 inputs: no more than 32 directions exist.
        "model_type": "llama", "num_key_value_heads": 2, "head_dim": 24, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "llama-mha": {
        "model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "llama-mqa": {
        "model_type": "llama", "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "llama-mqa-tied": {
        "model_type": "llama", "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "mistral": {
        "model_type": "mistral", "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-5,
        "sliding_window": None, "tie_word_embeddings": False,
    },
    "mistral-window": {
        "model_type": "mistral", "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
        "sliding_window": SLIDING_WINDOW, "tie_word_embeddings": False,
    },
    "llama-bias": {
        "model_type": "llama", "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "qwen2-bias": {
        "model_type": "qwen2", "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "qwen2-window": {
        # The first layer sees everything.
        "model_type": "qwen2", "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 1,
    },
    "qwen3-norm": {
        "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "qwen3-norm-bias": {
        "model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-6, "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "gemma2-softcap": {
        "model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 12, "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 5.0, "sliding_window": SLIDING_WINDOW, "tie_word_embeddings": True,
    },
    "gemma3-local": {
        "model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 12, "query_pre_attn_scalar": 20,
        "sliding_window": SLIDING_WINDOW, "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
        },
    },
    "mixtral": {
        "model_type": "mixtral", "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "num_local_experts": 3, "num_experts_per_tok": 2,
    },
    "phi3-fused": {
        "model_type": "phi3", "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "sliding_window": SLIDING_WINDOW,
    },
    "olmo2-norm": {
        "model_type": "olmo2", "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "smollm3-nope": {
        "model_type": "smollm3", "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "no_rope_layer_interval": 2,
    },
}  # fmt: skip
"""Name to what differs from SHARED. At least one entry per architecture."""

CACHE_KEY = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else (
    "past_key_values"
)  # fmt: skip
"""What this version of transformers calls a model's cache."""


@dataclass(frozen=True)
class Case:
    """One conversion of a tiny source; None leaves a choice to the recipe."""

    source: str
    recipe: str
    budget: float
    mode: Mode | None = None
    format: str | None = None

    def __str__(self) -> str:
        return "-".join(str(part) for part in (self.source, self.recipe, self.budget, self.mode, self.format) if part)


class TinyModels:
    """Tiny sources, their calibrations and their conversions, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[object, Any] = {}

    def _once(self, key: object, make: Callable[[], Made]) -> Made:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def text_file(self) -> Path:
        """Random words; one byte is one token."""
        path = self.root / "text.txt"
        path.write_text(random_text(3000), encoding="utf-8")
        return path

    def directory(self, name: str) -> Path:
        """The checkpoint of a tiny source."""
        return self._once(("directory", name), lambda: build_checkpoint(self.root / name, TINY[name]))

    def source(self, name: str) -> Source:
        """The source as care opens it."""
        return self._once(("source", name), lambda: open_source(str(self.directory(name))))

    def calibration(self, name: str) -> Calibration:
        """Statistics on windows of the text."""
        request = CalibrationRequest(str(self.text_file), NUM_WINDOWS, WINDOW, seed=1, context=WINDOW)
        return self._once(("calibration", name), lambda: calibrate(self.source(name), request, STATISTICS))

    def plan(self, case: Case) -> Plan:
        """The conversion, planned."""
        recipe = load_recipe(case.recipe, mode=case.mode, format=case.format)
        source, calibration = self.source(case.source), self.calibration(case.source)
        return self._once(("plan", case), lambda: plan_conversion(source, recipe, case.budget, calibration))

    def converted(self, case: Case) -> Path:
        """The conversion's checkpoint."""
        out = self.root / "converted" / str(case)
        return self._once(("converted", case), lambda: (convert(self.plan(case), out), out)[1])

    def model(self, case: Case) -> Any:
        """The conversion, loaded from its checkpoint."""
        return self._once(("model", case), lambda: load_model(Location(self.converted(case)), dtype=torch.float32))

    def source_model(self, name: str) -> Any:
        """The source, loaded by transformers alone."""
        load = transformers.AutoModelForCausalLM.from_pretrained
        return self._once(("source model", name), lambda: load(self.directory(name), dtype=torch.float32).eval())


@dataclass(frozen=True)
class Passed:
    """What went through one attention module: its input and output, (B, T, D) each."""

    x_BTD: Tensor
    y_BTD: Tensor


def attention_passes(model: Any, tokens_BT: Tensor) -> list[Passed]:
    """Inputs and outputs of every attention layer in a forward pass of transformers."""
    seen: list[Passed] = []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append(Passed(kwargs["hidden_states"], output[0]))

    hooks = [layer.self_attn.register_forward_hook(keep, with_kwargs=True) for layer in model.model.layers]
    with torch.inference_mode():
        model(input_ids=tokens_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def collected(
    model: Observed,
    windows_BT: Tensor,
    contexts_BT: Tensor | None = None,
    *,
    seed: int | None = None,
    gradient_windows: int | None = None,
) -> list[LayerStats]:
    """Statistics of every layer, through a directory that is gone afterwards.

    With a seed, gradients too: on all windows, unless said.
    """
    windows = 0 if seed is None else gradient_windows or len(windows_BT)
    wanted = Wanted(windows_BT, contexts_BT, windows, seed or 0)
    with TemporaryDirectory() as directory:
        Collection(model, wanted, Path(directory)).run()
        return [read_layer(Path(directory) / layer_name(index)) for index in range(len(model.layers))]


def random_text(length: int, seed: int = 0) -> str:
    """Words of random letters."""
    dice = random.Random(seed)
    words = ("".join(dice.choices("abcdefghijklmnop", k=dice.randint(1, 7))) for _ in range(length))
    return " ".join(words)[:length]


def build_checkpoint(directory: Path, options: dict[str, Any]) -> Path:
    """A model with weights large enough that attention is far from uniform, and a byte-level tokenizer.

    Norms and biases are drawn too: at their initial ones and zeros nobody would miss them.
    """
    torch.manual_seed(sum(map(ord, directory.name)))
    options = {**SHARED, **options}
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
        if name.endswith(".bias"):
            parameter.data.normal_(std=0.5)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """One token per byte, in transformers' own files; two zero bytes are one, as llama.cpp wants a merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>"]
    zero = "\u0100"
    vocabulary = {token: i for i, token in enumerate([*letters, *special, zero + zero])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(zero, zero)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    ).save_pretrained(directory)


def random_tokens(num_tokens: int, batch: int = 1, seed: int = 3) -> Tensor:
    """Token ids (batch, num_tokens) without special tokens."""
    return torch.randint(0, 256, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class LayerSize:
    """Heads, key heads, head dim and hidden size of one layer without a model around it."""

    H: int = 4
    G: int = 2
    K: int = 6
    D: int = 20


def random_layer(size: LayerSize, seed: int = 0) -> AttentionWeights:
    """Attention weights in fp64 whose scores spread over several nats."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * size.D**-0.5

    return AttentionWeights(
        q_HKD=2 * draw(size.H, size.K, size.D),
        k_GKX=2 * draw(size.G, size.K, size.D),
        v_GKX=draw(size.G, size.K, size.D),
        out_DHK=draw(size.D, size.H, size.K),
        rope_frequencies=tuple(30.0 ** (-2 * m / size.K) for m in range(size.K // 2)),
        scale=size.K**-0.5,
    )


def random_inputs(num_tokens: int, size: int, seed: int = 0) -> Tensor:
    """Correlated layer inputs (T, D) in fp64: channels of unequal size, mixed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x_TD = torch.randn(num_tokens, size, generator=generator, dtype=torch.float64)
    mixing_DD = torch.randn(size, size, generator=generator, dtype=torch.float64) * size**-0.5
    return x_TD * torch.logspace(0.5, -1, size, dtype=torch.float64) @ mixing_DD + 0.1 * x_TD


def stats_of(x_TD: Tensor, size: LayerSize | None = None, seed: int = 0) -> LayerStats:
    """Statistics of inputs that are at hand, straight from their definition; with a size, random ones of outputs."""
    stats = LayerStats(len(x_TD), x_TD.T @ x_TD / len(x_TD), x_TD.abs().mean(0))
    if size is None:
        return stats
    generator = torch.Generator().manual_seed(2000 + seed)
    outputs = 2 * size.G * size.K
    gradients_TE = torch.randn(3 * outputs, outputs, generator=generator, dtype=torch.float64)
    gradients_TE = gradients_TE * torch.logspace(0, -1, outputs, dtype=torch.float64)
    attention_HT = torch.rand(size.H, 40, generator=generator, dtype=torch.float64).pow(4)
    return replace(
        stats,
        gradient_moment_EE=gradients_TE.T @ gradients_TE / len(gradients_TE),
        attention_HT=attention_HT / attention_HT.sum(1, keepdim=True),
    )
