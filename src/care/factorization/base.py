"""What a factorization method is, and the one factorization that all of them share.

A method chooses the metric in which keys and values are approximated: on the input side an X x X matrix, on the output
side one over the stacked key and value outputs (either may be the identity), and whether K and V share one latent.
Everything else is the truncated eigendecomposition of linalg.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..linalg import Root, output_energies, output_moment, principal_outputs, symmetric_root
from ..types import AttentionWeights, KeySplit, LatentAttention, LayerRanks, LayerStats


@dataclass(frozen=True)
class Targets:
    """The maps to approximate: what is left of the keys, and the values, with the input metric."""

    keys_MX: Tensor
    values_EX: Tensor
    error_EM: Tensor
    metric_XX: Tensor | None

    @property
    def stacked(self) -> Tensor:
        """Keys above values: (M + E, X)."""
        return torch.cat((self.keys_MX, self.values_EX))


class Factorizer(Protocol):
    """A metric on the layer's features and output, and a way of sharing the latent."""

    needs: ClassVar[frozenset[str]]

    @property
    def joint(self) -> bool:
        """Whether keys and values share one latent."""
        ...

    def metric(self, stats: LayerStats | None) -> Tensor | None:
        """The positive semidefinite X x X input metric in fp64; None for the identity."""
        ...

    def output_metric(self, targets: Targets, stats: LayerStats | None) -> Tensor | None:
        """The positive definite metric over the stacked outputs, (M + E) square; None for the identity."""
        ...


@dataclass(frozen=True)
class Lost:
    """What an approximation leaves out: the root of the share of the outputs' energy, in the input metric.

    `loss` is the energy left out in the output metric too, in the method's units; None where that is the identity.
    """

    error: float
    loss: float | None


@dataclass(frozen=True)
class Factors:
    """A factorized layer, what it leaves out of keys and of values, and each latent's energies, descending."""

    latent: LatentAttention
    keys: Lost
    values: Lost
    energies: tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """One map to approximate in one latent: outputs (M, X), input metric, and output metric."""

    weight_MX: Tensor
    metric_XX: Tensor | None
    output_MM: Tensor | None

    @cached_property
    def root(self) -> Root | None:
        """Square root of the output metric."""
        return None if self.output_MM is None else symmetric_root(self.output_MM)

    @property
    def whitened(self) -> Tensor:
        """The map with its outputs in the metric's units."""
        return self.weight_MX if self.root is None else self.root.root_MM @ self.weight_MX

    def energies(self) -> Tensor:
        """Squared singular values of the whitened map, descending."""
        return output_energies(self.weight_MX, self.metric_XX, self.output_MM)

    def solve(self, rank: int) -> "Solved":
        """The best approximation of a rank; ValueError if the rank cannot be had."""
        spectrum = principal_outputs(self.whitened, self.metric_XX)
        basis_MR = spectrum.basis_MS[:, :rank]
        if basis_MR.shape[1] < rank:
            raise ValueError(f"rank {rank} asked of a map with {basis_MR.shape[1]} directions")
        up_MR = basis_MR if self.root is None else self.root.inverse_MM @ basis_MR
        return Solved(basis_MR.T @ self.whitened, up_MR, spectrum.energy_S)


@dataclass(frozen=True)
class Solved:
    """One map in one latent: down (R, X), up (M, R), and all energies that there were (S)."""

    down_RX: Tensor
    up_MR: Tensor
    energy_S: Tensor


def _targets(method: Factorizer, weights: AttentionWeights, split: KeySplit, stats: LayerStats | None) -> Targets:
    values_EX = weights.v_GKX.flatten(0, 1).double()
    return Targets(split.rest_MX, values_EX, split.error_EM, method.metric(stats))


def _parts(output_MM: Tensor | None, num_keys: int) -> tuple[Tensor | None, Tensor | None]:
    """The output metric's blocks of keys and of values."""
    return (None, None) if output_MM is None else (output_MM[:num_keys, :num_keys], output_MM[num_keys:, num_keys:])


def _problems(method: Factorizer, targets: Targets, output_MM: Tensor | None) -> list[Problem]:
    """One problem for a joint latent, else one for keys and one for values."""
    if method.joint:
        return [Problem(targets.stacked, targets.metric_XX, output_MM)]
    maps, parts = (targets.keys_MX, targets.values_EX), _parts(output_MM, len(targets.keys_MX))
    # Keys that are all in slots leave a map without rows, and nothing to weigh it by.
    return [Problem(w, targets.metric_XX, part if len(w) else None) for w, part in zip(maps, parts, strict=True)]


def layer_energies(
    method: Factorizer, weights: AttentionWeights, split: KeySplit, stats: LayerStats | None
) -> tuple[Tensor, ...]:
    """What an allocator sees: squared singular values of a joint latent, or those of keys and of values."""
    targets = _targets(method, weights, split, stats)
    problems = _problems(method, targets, method.output_metric(targets, stats))
    return tuple(problem.energies() for problem in problems)


def factorize(
    method: Factorizer, weights: AttentionWeights, split: KeySplit, stats: LayerStats | None, ranks: LayerRanks
) -> Factors:
    """Replace a layer's keys and values by latents of the given ranks.

    With T the output metric and U the leading directions of T^(1/2) W C^(1/2), the latent is
    c = U^T T^(1/2) W phi(x) and the approximation T^(-1/2) U c.
    Raises ValueError when a rank exceeds what the map can have.
    """
    targets = _targets(method, weights, split, stats)
    wanted = (ranks.value_rank,) if method.joint else (ranks.key_rank, ranks.value_rank)
    output_MM = method.output_metric(targets, stats)
    problems = _problems(method, targets, output_MM)
    solved = [problem.solve(rank) for problem, rank in zip(problems, wanted, strict=True)]
    M = len(targets.keys_MX)
    key_down, value_down = solved[0].down_RX, solved[-1].down_RX
    if method.joint:
        key_up, value_up = solved[0].up_MR[:M], solved[0].up_MR[M:]
    else:
        key_up, value_up = (s.up_MR for s in solved)
    key_part, value_part = _parts(output_MM, M)
    return Factors(
        latent=_assemble(weights, split, torch.cat([s.down_RX for s in solved]), key_up, value_up),
        keys=_lost(targets.keys_MX, key_up @ key_down, targets.metric_XX, key_part),
        values=_lost(targets.values_EX, value_up @ value_down, targets.metric_XX, value_part),
        energies=tuple(s.energy_S for s in solved),
    )


def _assemble(
    weights: AttentionWeights, split: KeySplit, kv_down_RX: Tensor, key_up_MR: Tensor, value_up_ER: Tensor
) -> LatentAttention:
    G, K, _ = weights.v_GKX.shape
    if not split.rest_MX.shape[0]:
        key_up_MR = key_up_MR[:, :0]
    return LatentAttention(
        q_HKD=weights.q_HKD,
        kv_down_RX=kv_down_RX,
        k_up_GNR=split.expand_GNM @ key_up_MR,
        v_up_GVR=value_up_ER.view(G, K, -1),
        out_DHV=weights.out_DHK,
        scale=weights.scale,
        rope=split.rope,
        carried=weights.carried,
    )


def _lost(exact_MX: Tensor, approximation_MX: Tensor, metric_XX: Tensor | None, part_MM: Tensor | None) -> Lost:
    """Measured from the matrices themselves; nothing for a map without rows."""
    if not exact_MX.shape[0]:
        return Lost(0.0, None if part_MM is None else 0.0)
    left_out_MM = output_moment(exact_MX - approximation_MX, metric_XX)
    total = float(output_moment(exact_MX, metric_XX).trace())
    error = (max(float(left_out_MM.trace()), 0.0) / total) ** 0.5 if total else 0.0
    return Lost(error, None if part_MM is None else max(float((part_MM * left_out_MM).sum()), 0.0))
