"""Low rank in the metric of the activations: pure functions on tensors, fp64 inside.

The best rank-r approximation of W (M x D) under the input second moment C minimizes
tr((W - W') C (W - W')^T). With Y = W C^(1/2) the optimum is U_r U_r^T W, where U_r are the leading left
singular vectors of Y, so the eigenvectors of the small M x M Gram matrix W C W^T suffice: neither C^(1/2)
nor its inverse is ever formed. (CARE's closed form, arXiv 2603.17946, gives the same product.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE_FLOOR = 1e-12
"""Eigenvalues of a matrix to be inverted are at least this share of the largest."""


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values, descending (S), and the matching orthonormal output directions (M, S)."""

    energy_S: Tensor
    basis_MS: Tensor

    def tail(self, rank: int) -> float:
        """Sum of the squared singular values that a rank leaves out."""
        return float(self.energy_S[rank:].sum())


def tails(energy_S: Tensor) -> Tensor:
    """What keeping 0, 1, ..., S of them leaves out: (S + 1)."""
    return torch.cat((energy_S.flip(0).cumsum(0).flip(0), energy_S.new_zeros(1)))


def shrink(moment_DD: Tensor, alpha: float) -> Tensor:
    """Pull a second moment towards a multiple of the identity: (1 - a) C + a mean(diag C) I."""
    mean = moment_DD.diagonal().mean()
    identity_DD = torch.eye(moment_DD.shape[0], dtype=moment_DD.dtype, device=moment_DD.device)
    return (1 - alpha) * moment_DD + alpha * mean * identity_DD


def output_moment(weight_MD: Tensor, metric_DD: Tensor | None) -> Tensor:
    """Gram matrix W C W^T (M x M, fp64) of a map's outputs; no metric means C = I."""
    weight_MD = weight_MD.double()
    half_MD = weight_MD if metric_DD is None else weight_MD @ metric_DD
    gram_MM = half_MD @ weight_MD.T
    return (gram_MM + gram_MM.T) / 2


@dataclass(frozen=True)
class Root:
    """Symmetric square root of a positive definite matrix, and its inverse (fp64)."""

    root_MM: Tensor
    inverse_MM: Tensor


def symmetric_root(matrix_MM: Tensor) -> Root:
    """Square root by eigendecomposition, for real symmetric and complex Hermitian matrices, or batches of them."""
    values_M, vectors_MM = torch.linalg.eigh(matrix_MM)
    root_1M = torch.maximum(values_M, values_M[..., -1:] * RELATIVE_FLOOR).sqrt()[..., None, :]
    return Root((vectors_MM * root_1M) @ vectors_MM.mH, (vectors_MM / root_1M) @ vectors_MM.mH)


def principal_outputs(weight_MD: Tensor, metric_DD: Tensor | None) -> Spectrum:
    """Spectrum of W C^(1/2): S = min(M, D) energies with their orthonormal output directions.

    A map with more outputs than inputs is first reduced to the D directions that it can reach, so that where C
    is singular no direction outside them is taken for one of them.
    """
    M, D = weight_MD.shape
    reach_MS, reduced_SD = torch.linalg.qr(weight_MD.double()) if M > D else (None, weight_MD)
    energy_S, basis_SS = torch.linalg.eigh(output_moment(reduced_SD, metric_DD))
    basis_SS = basis_SS.flip(1)
    return Spectrum(energy_S.flip(0).clamp(min=0), basis_SS if reach_MS is None else reach_MS @ basis_SS)


def output_energies(weight_MD: Tensor, metric_DD: Tensor | None, output_MM: Tensor | None) -> Tensor:
    """The energies alone of T^(1/2) W C^(1/2), T the output metric: S = min(M, D) of them, descending.

    The eigenvalues of L^T W C W^T L with T = L L^T are the same, and a Cholesky factor is cheaper than a root.
    """
    gram_MM = output_moment(weight_MD, metric_DD)
    if output_MM is not None:
        floor = RELATIVE_FLOOR * output_MM.diagonal().max()
        lower_MM = torch.linalg.cholesky(output_MM + floor * torch.eye(len(output_MM), dtype=output_MM.dtype))
        gram_MM = lower_MM.T @ gram_MM @ lower_MM
    return torch.linalg.eigvalsh(gram_MM).flip(0)[: min(weight_MD.shape)].clamp(min=0)
