"""What care must know of a source architecture: a page of facts, and the one reader that uses them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..carried import Carried, NormalizedKeys, QkNorm
from ..carried import Norm as NormWeights
from ..checkpoint import TensorReader
from ..errors import BadInput, UnsupportedModel
from ..rope import rope_frequencies
from ..types import AttentionSpec, AttentionWeights

Config = Mapping[str, Any]
Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Norms:
    """RMSNorm on queries and keys before RoPE: module names, what the gain is beside the weight, over what.

    `heads_first` says that the modules see (B, heads, T, K) and not (B, T, heads, K).
    """

    q: str = "q_norm"
    k: str = "k_norm"
    offset: float = 0.0
    over_all_heads: bool = False
    heads_first: bool = False


def no_layer(config: Config, index: int) -> bool:
    """No layer attends within a sliding window."""
    return False


def every_layer(config: Config, index: int) -> bool:
    """Every layer attends within the window, where there is one."""
    return True


def one_rope(config: Config, index: int) -> Config | None:
    """Every layer rotates by the settings of the config itself."""
    return config


@dataclass(frozen=True)
class Architecture:
    """Names and flags of one family of checkpoints.

    `{i}` in a template is the layer index. `qkv` names the one projection that some families have in place of
    q, k and v. `dropped` are regular expressions of tensors that a converted model does without.
    `deepseek_body` says that everything but attention is what DeepseekV3ForCausalLM computes: pre-norm RMSNorm,
    gated SiLU MLP, no biases. `post_norm` says that a norm stands between attention and the residual stream.

    `defaults` holds what transformers assumes for config keys that are absent. `bias_key` is the config key
    that gives all four projections biases; `qkv_bias` says that q, k and v always have them. `scale_key` and
    `softcap_key` name config keys: scores are scaled by scale^(-1/2) and capped. `refused` are keys that must not be
    set. Two facts are functions of the config and a layer's index: `sliding`, whether the layer attends within
    `sliding_window`, and `rope`, the settings by which it rotates, None for not at all.
    """

    model_type: str
    layer: str = "model.layers.{i}"
    attention: str = "model.layers.{i}.self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    qkv: str | None = None
    out: str = "o_proj"
    norms: Norms | None = None
    head: str = "lm_head.weight"
    dropped: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    deepseek_body: bool = True
    post_norm: bool = False
    defaults: Config = field(default_factory=dict)
    bias_key: str | None = "attention_bias"
    qkv_bias: bool = False
    scale_key: str = "head_dim"
    softcap_key: str | None = None
    refused: tuple[str, ...] = ()
    sliding: Callable[[Config, int], bool] = no_layer
    rope: Callable[[Config, int], Config | None] = one_rope

    def spec(self, config: Config) -> AttentionSpec:
        """Attention facts from a config.json; UnsupportedModel for what conversion cannot carry over."""
        config = {**self.defaults, **config}
        for key in self.refused:
            if config.get(key):
                raise UnsupportedModel(f"{key} is set in config.json; care does not convert such a {self.model_type}")
        try:
            num_heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
            num_layers = config["num_hidden_layers"]
        except KeyError as error:
            raise BadInput(f"config.json has no {error}; is this a causal language model?") from error
        head_dim = config.get("head_dim") or hidden_size // num_heads
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        biased = bool(self.bias_key and config.get(self.bias_key))
        return AttentionSpec(
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_frequencies=self._rope_tables(config, num_layers, head_dim),
            scale=(config.get(self.scale_key) or head_dim) ** -0.5,
            qkv_bias=self.qkv_bias or biased,
            out_bias=biased,
            qk_norm=self._qk_norm(config, num_heads, num_kv_heads, head_dim),
            softcap=config.get(self.softcap_key) if self.softcap_key else None,
            windows=self._windows(config, num_layers),
        )

    def _rope_tables(self, config: Config, num_layers: int, head_dim: int) -> tuple[tuple[float, ...], ...]:
        settings = _by_layer(self.rope, config, num_layers)
        still = (0.0,) * (head_dim // 2)
        return tuple(still if own is None else rope_frequencies(own, head_dim) for own in settings)

    def _qk_norm(self, config: Config, num_heads: int, num_kv_heads: int, head_dim: int) -> QkNorm | None:
        if self.norms is None:
            return None
        heads, kv_heads = (num_heads, num_kv_heads) if self.norms.over_all_heads else (1, 1)
        eps = float(config["rms_norm_eps"])
        return QkNorm(heads * head_dim, kv_heads * head_dim, eps, self.norms.offset)

    def _windows(self, config: Config, num_layers: int) -> tuple[int | None, ...]:
        window = config.get("sliding_window")
        sliding = _by_layer(self.sliding, config, num_layers)
        return tuple(window if here else None for here in sliding) if window and any(sliding) else ()

    def attention_shapes(self, index: int, spec: AttentionSpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a layer's tensors that conversion replaces."""
        D, queries, keys = spec.hidden_size, spec.num_heads * spec.head_dim, spec.kv_width
        rows = {self.qkv: queries + 2 * keys} if self.qkv else {self.q: queries, self.k: keys, self.v: keys}
        shapes: dict[str, tuple[int, ...]] = {f"{part}.weight": (size, D) for part, size in rows.items()}
        shapes[f"{self.out}.weight"] = (D, queries)
        if spec.qkv_bias:
            shapes |= {f"{part}.bias": (size,) for part, size in rows.items()}
        if spec.out_bias:
            shapes[f"{self.out}.bias"] = (D,)
        if self.norms and spec.qk_norm:
            shapes[f"{self.norms.q}.weight"] = (spec.qk_norm.query_size,)
            shapes[f"{self.norms.k}.weight"] = (spec.qk_norm.key_size,)
        prefix = self.attention.format(i=index)
        return {f"{prefix}.{part}": shape for part, shape in shapes.items()}

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

    def read_carried(self, reader: TensorReader, index: int, spec: AttentionSpec) -> Carried:
        """What a layer computes beside its linear maps, in the stored dtype; reads nothing where that is nothing."""
        prefix, norm, q_norm, keys = self.attention.format(i=index), spec.qk_norm, None, None
        q_bias, k_bias = (
            self._projection(reader, prefix, spec, which, "bias") if spec.qkv_bias else None for which in (0, 1)
        )
        if self.norms and norm:
            q_norm, k_norm = (
                NormWeights(reader.read(f"{prefix}.{name}.weight"), norm.eps, norm.offset)
                for name in (self.norms.q, self.norms.k)
            )
            keys = NormalizedKeys(self._projection(reader, prefix, spec, 1, "weight"), k_bias, k_norm)
        return Carried(
            keys=keys,
            constant=spec.qkv_bias,
            q_bias_HK=None if q_bias is None else q_bias.view(spec.num_heads, spec.head_dim),
            q_norm=q_norm,
            out_bias_D=reader.read(f"{prefix}.{self.out}.bias") if spec.out_bias else None,
            softcap=spec.softcap,
            window=spec.windows[index] if spec.windows else None,
        )

    def _projection(self, reader: TensorReader, prefix: str, spec: AttentionSpec, which: int, kind: str) -> Tensor:
        """Weight or bias of queries (0), keys (1) or values (2), cut out of the fused projection if there is one."""
        if self.qkv is None:
            return reader.read(f"{prefix}.{(self.q, self.k, self.v)[which]}.{kind}")
        rows = [spec.num_heads * spec.head_dim, spec.kv_width, spec.kv_width]
        return reader.read(f"{prefix}.{self.qkv}.{kind}").split(rows)[which]

    def read_attention(self, reader: TensorReader, index: int, spec: AttentionSpec) -> AttentionWeights:
        """One layer's projections with heads apart, in the stored dtype."""
        prefix, D, K = self.attention.format(i=index), spec.hidden_size, spec.head_dim
        q, k, v = (self._projection(reader, prefix, spec, which, "weight") for which in range(3))
        biases = [self._projection(reader, prefix, spec, which, "bias") for which in (1, 2) if spec.qkv_bias]
        k_EX, v_EX = _feature_maps(k, v, biases, normalized=spec.qk_norm is not None)
        return AttentionWeights(
            q_HKD=q.view(spec.num_heads, K, D),
            k_GKX=k_EX.view(spec.num_kv_heads, K, -1),
            v_GKX=v_EX.view(spec.num_kv_heads, K, -1),
            out_DHK=reader.read(f"{prefix}.{self.out}.weight").view(D, spec.num_heads, K),
            rope_frequencies=spec.rope_frequencies[index],
            scale=spec.scale,
            carried=self.read_carried(reader, index, spec),
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


def _by_layer(fact: Callable[[Config, int], Fact], config: Config, num_layers: int) -> list[Fact]:
    """A fact of every layer; BadInput where the config has a list of layers that is too short."""
    try:
        return [fact(config, index) for index in range(num_layers)]
    except IndexError as error:
        raise BadInput(f"a list in config.json has fewer layers than the {num_layers} of the model") from error


def _feature_maps(k_ED: Tensor, v_ED: Tensor, biases: Sequence[Tensor], *, normalized: bool) -> tuple[Tensor, Tensor]:
    """Keys and values as linear maps of the features [normalized keys, input, 1]: (E, X) each."""
    k_parts, v_parts = [k_ED], [v_ED]
    if normalized:
        # The features hold the keys as they are; what the input adds to them is nothing.
        E = len(k_ED)
        k_parts = [torch.eye(E, dtype=k_ED.dtype, device=k_ED.device), torch.zeros_like(k_ED)]
        v_parts.insert(0, v_ED.new_zeros(E, E))
    if biases:
        k_bias_E, v_bias_E = biases
        k_parts.append(torch.zeros_like(k_bias_E)[:, None] if normalized else k_bias_E[:, None])
        v_parts.append(v_bias_E[:, None])
    return torch.cat(k_parts, 1) if len(k_parts) > 1 else k_ED, torch.cat(v_parts, 1) if len(v_parts) > 1 else v_ED
