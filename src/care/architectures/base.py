"""What care must know of a source architecture: a page of facts, and the one reader that uses them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint import TensorReader
from ..errors import BadInput, UnsupportedModel
from ..rope import rope_frequencies
from ..types import AttentionSpec, AttentionWeights


@dataclass(frozen=True)
class Architecture:
    """Names and flags of one family of checkpoints.

    `{i}` in a template is the layer index. `dropped` are regular expressions of tensors that a
    converted model does without. `deepseek_body` says that everything but attention is what
    DeepseekV3ForCausalLM computes: pre-norm RMSNorm, gated SiLU MLP, no biases.
    """

    model_type: str
    layer: str = "model.layers.{i}"
    attention: str = "model.layers.{i}.self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    out: str = "o_proj"
    head: str = "lm_head.weight"
    dropped: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    deepseek_body: bool = True
    no_bias_keys: tuple[str, ...] = ("attention_bias",)

    def spec(self, config: Mapping[str, Any]) -> AttentionSpec:
        """Attention facts from a config.json; UnsupportedModel for what conversion cannot carry over."""
        for key in self.no_bias_keys:
            if config.get(key):
                raise UnsupportedModel(f"{key}: biased projections are not supported yet; the config sets it")
        try:
            num_heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
            num_layers = config["num_hidden_layers"]
        except KeyError as error:
            raise BadInput(f"config.json has no {error}; is this a causal language model?") from error
        head_dim = config.get("head_dim") or hidden_size // num_heads
        return AttentionSpec(
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            rope_frequencies=rope_frequencies(config, head_dim),
        )

    def attention_shapes(self, index: int, spec: AttentionSpec) -> dict[str, tuple[int, int]]:
        """Names and shapes of the four projections that conversion replaces."""
        prefix, D = self.attention.format(i=index), spec.hidden_size
        queries, keys = spec.num_heads * spec.head_dim, spec.kv_width
        shapes = {self.q: (queries, D), self.k: (keys, D), self.v: (keys, D), self.out: (D, queries)}
        return {f"{prefix}.{part}.weight": shape for part, shape in shapes.items()}

    def check_tensors(self, reader: TensorReader, spec: AttentionSpec, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint whose tensors are not exactly those that the config promises.

        `expected` are the names and shapes of the whole model; a tied head may be stored or not.
        """
        names = set(reader.names())
        attention = [self.attention_shapes(index, spec) for index in range(spec.num_layers)]
        promised = {name: shape for layer in attention for name, shape in layer.items()} | dict(expected)
        for name, shape in promised.items():
            if name not in names:
                raise BadInput(f"tensor {name} is missing; config.json promises {spec.num_layers} layers with it")
            if reader.shape(name) != shape:
                raise BadInput(f"tensor {name} has shape {reader.shape(name)}, config.json says {shape}")
        unknown = sorted(n for n in names - promised.keys() if n != self.head and not self.drops(n))
        if unknown:
            raise UnsupportedModel(f"tensor {unknown[0]} has no place in the {self.model_type} model of config.json")

    def drops(self, name: str) -> bool:
        """Whether a converted checkpoint leaves this tensor out by name."""
        return any(re.fullmatch(pattern, name) for pattern in self.dropped)

    def read_attention(self, reader: TensorReader, index: int, spec: AttentionSpec) -> AttentionWeights:
        """One layer's projections with heads apart, in the stored dtype."""
        q, k, v, out = (reader.read(name) for name in self.attention_shapes(index, spec))
        D, K = spec.hidden_size, spec.head_dim
        return AttentionWeights(
            q_HKD=q.view(spec.num_heads, K, D),
            k_GKD=k.view(spec.num_kv_heads, K, D),
            v_GKD=v.view(spec.num_kv_heads, K, D),
            out_DHK=out.view(D, spec.num_heads, K),
            rope_frequencies=spec.rope_frequencies,
            scale=K**-0.5,
        )

    def untouched(self, reader: TensorReader, spec: AttentionSpec) -> dict[int | None, list[str]]:
        """Names of all tensors to carry over, by layer; None holds those outside the layers."""
        converted = {name for i in range(spec.num_layers) for name in self.attention_shapes(i, spec)}
        kept: dict[int | None, list[str]] = {None: [], **{i: [] for i in range(spec.num_layers)}}
        pattern = re.compile(re.escape(self.layer).replace(r"\{i\}", r"(\d+)") + r"\.")
        for name in reader.names():
            if name in converted or self.drops(name):
                continue
            match = pattern.match(name)
            kept[int(match[1]) if match else None].append(name)
        return kept
