"""What a factorization method is, and the one factorization that all of them share.

A method chooses the metric in which keys and values are approximated (a D x D matrix, or none for the
weights' own), whether K and V share one latent, and how they are balanced in it. Everything else is the
truncated eigendecomposition of linalg.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..linalg import Spectrum, output_moment, principal_outputs, weighted_error
from ..types import AttentionWeights, KeySplit, LatentAttention, LayerRanks, LayerStats


class Factorizer(Protocol):
    """A metric on the layer's input and a way of sharing the latent."""

    needs: ClassVar[frozenset[str]]

    @property
    def joint(self) -> bool:
        """Whether keys and values share one latent."""
        ...

    @property
    def balanced(self) -> bool:
        """Whether a joint latent first brings keys to the size of the values."""
        ...

    def metric(self, stats: LayerStats | None) -> Tensor | None:
        """The positive semidefinite D x D metric in fp64; None for the identity."""
        ...


@dataclass(frozen=True)
class Factors:
    """A factorized layer and how much of keys and values it leaves out, relative, in the method's metric."""

    latent: LatentAttention
    key_error: float
    value_error: float


@dataclass(frozen=True)
class _Targets:
    """The maps to approximate, stacked: first the keys (divided by `balance`), then the values."""

    stacked_MD: Tensor
    num_keys: int
    balance: float
    metric_DD: Tensor | None


def _targets(method: Factorizer, weights: AttentionWeights, split: KeySplit, stats: LayerStats | None) -> _Targets:
    values_ED = weights.v_GKD.flatten(0, 1).double()
    metric_DD = method.metric(stats)
    balance = _norm_ratio(split.rest_MD, values_ED, metric_DD) if method.joint and method.balanced else 1.0
    stacked_MD = torch.cat((split.rest_MD / balance, values_ED))
    return _Targets(stacked_MD, split.rest_MD.shape[0], balance, metric_DD)


def _norm_ratio(keys_MD: Tensor, values_ED: Tensor, metric_DD: Tensor | None) -> float:
    """Mean RMS of the key directions over that of the values (TransMLA, arXiv 2502.07864, Eq. 20)."""
    if not keys_MD.shape[0]:
        return 1.0
    rms = [output_moment(w, metric_DD).diagonal().clamp(min=0).sqrt().mean() for w in (keys_MD, values_ED)]
    return float(rms[0] / rms[1])


def _blocks(targets: _Targets, *, joint: bool) -> list[Tensor]:
    keys, values = targets.stacked_MD[: targets.num_keys], targets.stacked_MD[targets.num_keys :]
    return [targets.stacked_MD] if joint else [keys, values]


def layer_spectra(
    method: Factorizer, weights: AttentionWeights, split: KeySplit, stats: LayerStats | None
) -> tuple[Spectrum, ...]:
    """What an allocator sees: one spectrum of a joint latent, or those of keys and of values."""
    targets = _targets(method, weights, split, stats)
    return tuple(principal_outputs(w, targets.metric_DD) for w in _blocks(targets, joint=method.joint))


def factorize(
    method: Factorizer, weights: AttentionWeights, split: KeySplit, stats: LayerStats | None, ranks: LayerRanks
) -> Factors:
    """Replace a layer's keys and values by latents of the given ranks.

    With U the leading output directions of the stacked map W, the latent is c = U^T W x and the
    approximation U c. Raises ValueError when a rank exceeds what the map can have.
    """
    targets = _targets(method, weights, split, stats)
    wanted = (ranks.value_rank,) if method.joint else (ranks.key_rank, ranks.value_rank)
    down, up = [], []
    for block_MD, rank in zip(_blocks(targets, joint=method.joint), wanted, strict=True):
        basis_MR = principal_outputs(block_MD, targets.metric_DD).basis_MS[:, :rank]
        if basis_MR.shape[1] < rank:
            raise ValueError(f"rank {rank} asked of a map with {basis_MR.shape[1]} directions")
        down.append(basis_MR.T @ block_MD)
        up.append(basis_MR)
    M = targets.num_keys
    key_up_MR, value_up_ER = (up[0][:M], up[0][M:]) if method.joint else (up[0], up[1])
    key_down, value_down = (down[0], down[0]) if method.joint else (down[0], down[1])
    return Factors(
        latent=_assemble(weights, split, torch.cat(down), key_up_MR * targets.balance, value_up_ER),
        key_error=_relative_error(targets.stacked_MD[:M], key_up_MR @ key_down, targets.metric_DD),
        value_error=_relative_error(targets.stacked_MD[M:], value_up_ER @ value_down, targets.metric_DD),
    )


def _assemble(
    weights: AttentionWeights, split: KeySplit, kv_down_RD: Tensor, key_up_MR: Tensor, value_up_ER: Tensor
) -> LatentAttention:
    G, K, _ = weights.v_GKD.shape
    if not split.rest_MD.shape[0]:
        key_up_MR = key_up_MR[:, :0]
    return LatentAttention(
        q_HKD=weights.q_HKD,
        kv_down_RD=kv_down_RD,
        k_up_GNR=split.expand_GNM @ key_up_MR,
        v_up_GVR=value_up_ER.view(G, K, -1),
        out_DHV=weights.out_DHK,
        scale=weights.scale,
        rope=split.rope,
    )


def _relative_error(exact_MD: Tensor, approximation_MD: Tensor, metric_DD: Tensor | None) -> float:
    """Square root of the lost share of the outputs' energy; 0 for a map without rows."""
    if not exact_MD.shape[0]:
        return 0.0
    total = weighted_error(exact_MD, torch.zeros_like(exact_MD), metric_DD)
    return (max(weighted_error(exact_MD, approximation_MD, metric_DD), 0.0) / total) ** 0.5 if total else 0.0
