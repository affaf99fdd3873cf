"""What fixes a native attention layer besides its weights."""

from dataclasses import dataclass
from typing import Self

from ..carried import QkNorm
from ..types import LatentAttention, Mode


@dataclass(frozen=True)
class LatentShape:
    """Everything that fixes a layer's module besides its weights; letters as in care.types."""

    mode: Mode
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    nope_dim: int
    v_head_dim: int
    rope_dim: int
    kv_lora_rank: int
    key_rank: int
    value_rank: int
    frequencies: tuple[float, ...]
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None
    softcap: float | None = None

    @property
    def feature_size(self) -> int:
        """Width of the features without their constant."""
        return self.hidden_size + (self.num_kv_heads * self.head_dim if self.qk_norm else 0)

    @classmethod
    def of(cls, latent: LatentAttention, source_frequencies: tuple[float, ...]) -> Self:
        """The shape of a converted layer."""
        H, K, D = latent.q_HKD.shape
        G, N, _ = latent.k_up_GNR.shape
        rope, carried = latent.rope, latent.carried
        qk_norm = None
        if carried.keys and carried.q_norm:
            norm = carried.keys.norm
            qk_norm = QkNorm(len(carried.q_norm.weight_W), len(norm.weight_W), norm.eps, norm.offset)
        return cls(
            mode=latent.mode, hidden_size=D, num_heads=H, num_kv_heads=G, head_dim=K, nope_dim=N,
            v_head_dim=latent.v_up_GVR.shape[1], rope_dim=latent.rope_dim, kv_lora_rank=latent.kv_down_RX.shape[0],
            key_rank=latent.k_rank, value_rank=latent.v_rank,
            frequencies=source_frequencies if rope is None else rope.frequencies, scale=latent.scale,
            qkv_bias=carried.constant, out_bias=carried.out_bias_D is not None, qk_norm=qk_norm,
            softcap=carried.softcap,
        )  # fmt: skip
