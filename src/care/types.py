"""The waist of the hourglass: what sources produce, what methods exchange and what formats consume.

Dimension letters, used as suffixes of tensor names everywhere:

    D hidden size            H query heads            G key/value heads
    K source head dim        V value head dim         T tokens
    P shared rotary dims     F rotary slots, P / 2    N no-rope dims of a query head
    M key maps left for the latent after the rope split
    R latent width           S directions of a singular spectrum
    X features: what keys and values are linear in    W values that are normalized together

The *features* phi(x) of a layer input x are x itself, with the normalized keys before it where the source has
a norm on its keys, and a 1 behind it where its keys or values have biases. Keys before RoPE and values are
linear in them, so that whatever is said of linear maps holds for every source; only latents are cached.

A rope *slot* is one complex direction that keeps its rotation; it costs two cached values. Slot dims
are interleaved, pair i being dims (2i, 2i + 1), as DeepSeek's checkpoints store them. Source heads keep
the source's own order (half-split: pair m is dims m and m + K/2), so that q_proj is copied untouched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from .carried import PLAIN, Carried, QkNorm, moved

Mode = Literal["absorbed", "rebuild"]
MODES: tuple[Mode, ...] = ("absorbed", "rebuild")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


@dataclass(frozen=True)
class AttentionSpec:
    """The facts of a source's attention. What differs by layer is a tuple over layers."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_frequencies: tuple[tuple[float, ...], ...]
    """Radians per position, by layer and rotary pair, `head_dim / 2` of them; all zero in a layer without RoPE."""
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""
    windows: tuple[int | None, ...] = ()
    """How many keys a query sees, itself included, by layer; empty where every layer sees all."""

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, which is also that of all value heads: G * K."""
        return self.num_kv_heads * self.head_dim

    @property
    def cache_width(self) -> int:
        """Values that the source caches per token and layer: 2 * G * K."""
        return 2 * self.kv_width

    @property
    def num_pairs(self) -> int:
        """Rotary pairs of one head."""
        return self.head_dim // 2

    @property
    def feature_width(self) -> int:
        """How many values keys and values are linear in: X."""
        return (self.kv_width if self.qk_norm else 0) + self.hidden_size + self.qkv_bias

    @property
    def shared_frequencies(self) -> tuple[float, ...] | None:
        """The one rope table of all layers; None where layers differ."""
        return self.rope_frequencies[0] if len(set(self.rope_frequencies)) == 1 else None


@dataclass(frozen=True)
class AttentionWeights:
    """One layer of the source: projections with heads apart.

    Shapes: q_HKD maps the layer input to query heads; k_GKX, v_GKX map its features to keys before RoPE, after
    any norm, and to values; out_DHK maps heads back.
    """

    q_HKD: Tensor
    k_GKX: Tensor
    v_GKX: Tensor
    out_DHK: Tensor
    rope_frequencies: tuple[float, ...]
    scale: float
    carried: Carried = PLAIN

    def __post_init__(self) -> None:
        H, K, D = self.q_HKD.shape
        G, X = self.k_GKX.shape[0], self.carried.feature_width(D)
        _check("k_GKX", self.k_GKX, (G, K, X))
        _check("v_GKX", self.v_GKX, (G, K, X))
        _check("out_DHK", self.out_DHK, (D, H, K))
        if H % G:
            raise ValueError(f"{H} query heads do not divide into {G} key/value heads")
        if 2 * len(self.rope_frequencies) != K:
            raise ValueError(f"{len(self.rope_frequencies)} rope frequencies for a head dim of {K}")

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same weights elsewhere or in another dtype."""
        return moved(self, device, dtype)


@dataclass(frozen=True)
class LayerStats:
    """What calibration keeps of one layer: running moments, never activations.

    input_moment_XX is the uncentered second moment E[phi phi^T] of the features of the attention input, fp64;
    input_magnitude_X is E[|phi|], fp64. Methods say which of the others they need:

    gradient_moment_EE ("gradients") is E[g g^T], g the gradient of the log-likelihood of labels sampled from
    the model with respect to all keys (after any norm, before RoPE), then all values: E = 2 * G * K.
    attention_HT ("distances") is the share of each head's attention by distance from query to key, 0 first,
    the first token of a window left out: that token is a sink, its attention carries no position.
    """

    num_tokens: int
    input_moment_XX: Tensor
    input_magnitude_X: Tensor
    gradient_moment_EE: Tensor | None = None
    attention_HT: Tensor | None = None

    def __post_init__(self) -> None:
        X = self.input_magnitude_X.shape[0]
        _check("input_moment_XX", self.input_moment_XX, (X, X))


@dataclass(frozen=True)
class LayerRanks:
    """What one layer may cache: `rope_dim` rotary values plus the latent.

    A separate latent has `key_rank + value_rank` values; a joint one shares all `key_rank ==
    value_rank` of them.
    """

    rope_dim: int
    key_rank: int
    value_rank: int
    joint: bool

    @property
    def latent_rank(self) -> int:
        """Width of the cached latent (DeepSeek's kv_lora_rank)."""
        return self.value_rank if self.joint else self.key_rank + self.value_rank

    @property
    def width(self) -> int:
        """Values cached per token by this layer."""
        return self.rope_dim + self.latent_rank


@dataclass(frozen=True)
class DecoupledRope:
    """The part of an absorbed layer that carries position, shared by all heads.

    q_rope_HPK and q_nope_HNK map a source query head to its rotary and its no-rope query;
    k_rope_PX maps the features to the one shared rotary key; frequencies has one entry per slot.
    """

    q_rope_HPK: Tensor
    q_nope_HNK: Tensor
    k_rope_PX: Tensor
    frequencies: tuple[float, ...]

    def __post_init__(self) -> None:
        H, P, K = self.q_rope_HPK.shape
        _check("q_nope_HNK", self.q_nope_HNK, (H, self.q_nope_HNK.shape[1], K))
        _check("k_rope_PX", self.k_rope_PX, (P, self.k_rope_PX.shape[1]))
        if 2 * len(self.frequencies) != P:
            raise ValueError(f"{len(self.frequencies)} frequencies for {P} rotary dims")


@dataclass(frozen=True)
class KeySplit:
    """A layer's keys, split into what keeps its rotation and what the latent must hold.

    rest_MX maps the features to the latent's share of the keys; expand_GNM turns that back into each key
    head's no-rope key. `rope` is None where keys are rebuilt: then the share is every key before RoPE.
    error_EM says how an error of the share acts on the concatenated keys, as far as scores feel it. rope_loss is
    what the lost rotations cost, in the method's units, and rope_losses what they would cost at 0, 1, 2, ... slots;
    None where that is not weighed.
    """

    rope: DecoupledRope | None
    rest_MX: Tensor
    expand_GNM: Tensor
    error_EM: Tensor
    rope_loss: float | None = None
    rope_losses: Tensor | None = None


@dataclass(frozen=True)
class LatentAttention:
    """One layer of multi-head latent attention, independent of any file format.

    The latent is c = kv_down_RX @ phi(x). Keys read its first k_up.shape[-1] values and values its last
    v_up.shape[-1]: all of it when the latent is joint, disjoint parts when it is separate.
    `rope` is None in rebuild mode, where the rebuilt key is rotated with the source's frequencies.
    """

    q_HKD: Tensor
    kv_down_RX: Tensor
    k_up_GNR: Tensor
    v_up_GVR: Tensor
    out_DHV: Tensor
    scale: float
    rope: DecoupledRope | None
    carried: Carried = PLAIN

    def __post_init__(self) -> None:
        H, K, D = self.q_HKD.shape
        R = self.kv_down_RX.shape[0]
        _check("kv_down_RX", self.kv_down_RX, (R, self.carried.feature_width(D)))
        _check("out_DHV", self.out_DHV, (D, H, self.v_up_GVR.shape[1]))
        if max(self.k_rank, self.v_rank) > R or self.k_rank + self.v_rank < R:
            raise ValueError(f"key rank {self.k_rank} and value rank {self.v_rank} do not cover a latent of {R}")
        N = K if self.rope is None else self.rope.q_nope_HNK.shape[1]
        _check("k_up_GNR", self.k_up_GNR, (self.v_up_GVR.shape[0], N, self.k_rank))

    @property
    def mode(self) -> Mode:
        """Whether decode rebuilds keys ("rebuild") or attends to the latent itself ("absorbed")."""
        return "rebuild" if self.rope is None else "absorbed"

    @property
    def k_rank(self) -> int:
        """How many of the latent's first values keys are read from."""
        return self.k_up_GNR.shape[-1]

    @property
    def v_rank(self) -> int:
        """How many of the latent's last values values are read from."""
        return self.v_up_GVR.shape[-1]

    @property
    def rope_dim(self) -> int:
        """Rotary values cached per token; 0 in rebuild mode."""
        return 0 if self.rope is None else self.rope.k_rope_PX.shape[0]

    @property
    def width(self) -> int:
        """Values cached per token by this layer."""
        return self.rope_dim + self.kv_down_RX.shape[0]


@dataclass(frozen=True)
class Target:
    """What an output format must express: the source's config and what the conversion makes of it.

    `slot_frequencies` are those of an absorbed layer's rope slots where they are known before any weight is
    read and alike in all layers (else None), or the source's own table in rebuild mode. `deepseek_body` says that
    all but attention is what DeepseekV3ForCausalLM computes.
    """

    config: Mapping[str, Any]
    spec: AttentionSpec
    mode: Mode
    slot_frequencies: tuple[float, ...] | None
    deepseek_body: bool
    dtype: torch.dtype


def block_identity(num_blocks: int, size: int) -> Tensor:
    """Selectors of each block of a concatenation: shape (num_blocks, size, num_blocks * size), fp64."""
    return torch.eye(num_blocks * size, dtype=torch.float64).view(num_blocks, size, -1)
