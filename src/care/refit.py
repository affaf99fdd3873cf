"""After truncation: the output projection refit by ridge regression to what the source's layer gives.

A latent layer reads z (heads mixed and expanded, width H * V) where the source read its own, and adds O z to the
residual stream. Over calibration tokens the best O for targets y has the closed form

    O' = O + E[(y - O z) z^T] (E[z z^T] + l I)^(-1),        l = ridge * mean diag E[z z^T],

a ridge towards the O of the source. Only the two moments are kept; written with the error y - O z, rounding in them
is relative to the correction, and a layer without error stays as it is.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from .errors import InvalidRecipe
from .ranks import count_over_ranks, sum_over_ranks
from .types import LatentAttention


class OutputMoments:
    """Sums over tokens of z z^T and (y - O z) z^T, fp64 on the CPU; products in fp32."""

    def __init__(self, out_DZ: Tensor, bias_D: Tensor | None) -> None:
        D, Z = out_DZ.shape
        self.num_tokens = 0
        self.out_DZ = out_DZ
        self._bias_D = bias_D
        self.inner_ZZ = torch.zeros(Z, Z, dtype=torch.float64)
        self.cross_DZ = torch.zeros(D, Z, dtype=torch.float64)

    @classmethod
    def of(cls, latent: LatentAttention) -> Self:
        """No tokens yet, for a converted layer's projection."""
        return cls(latent.out_DHV.flatten(1), latent.carried.out_bias_D)

    def add(self, z_TZ: Tensor, y_TD: Tensor) -> None:
        """Add what the projection read and what it should have given, its bias included."""
        error_TD = y_TD - z_TZ @ self.out_DZ.to(z_TZ).T
        error_TD = error_TD if self._bias_D is None else error_TD - self._bias_D.to(error_TD)
        self.num_tokens += z_TZ.shape[0]
        self.inner_ZZ += (z_TZ.T @ z_TZ).cpu()
        self.cross_DZ += (error_TD.T @ z_TZ).cpu()


@dataclass(frozen=True)
class Ridge:
    """Layer by layer from the first: moments of the converted prefix, then the output projection.

    `tokens` of the calibration windows are used; 0 means all of them.
    """

    tokens: int = 16384
    ridge: float = 0.01
    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise InvalidRecipe(f"refit.tokens is {self.tokens}; it must be positive, or 0 for all calibration tokens")
        if self.ridge <= 0:
            raise InvalidRecipe(f"refit.ridge is {self.ridge}; it must be positive")

    def fitted(self, moments: OutputMoments) -> Tensor:
        """The output projection refit to the moments of all processes, from theirs on: (D, Z) in fp64."""
        num_tokens = count_over_ranks(moments.num_tokens)
        inner_ZZ = sum_over_ranks(moments.inner_ZZ) / num_tokens
        cross_DZ = sum_over_ranks(moments.cross_DZ) / num_tokens
        damping = self.ridge * inner_ZZ.diagonal().mean()
        system_ZZ = inner_ZZ + damping * torch.eye(len(inner_ZZ), dtype=torch.float64)
        correction_DZ = torch.linalg.solve(system_ZZ, cross_DZ.T).T
        return moments.out_DZ.double().cpu() + correction_DZ

    def output(self, latent: LatentAttention, moments: OutputMoments) -> LatentAttention:
        """The layer with its output projection refit."""
        return replace(latent, out_DHV=self.fitted(moments).view(latent.out_DHV.shape))


REFITS = {"ridge": Ridge}
"""What can be done after truncation, by the name that a recipe uses."""
