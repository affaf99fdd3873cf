"""After truncation: the output projection refit by ridge regression to what the source's layer gives.

A latent layer reads z (heads mixed and expanded, width H * V) where the source read its own, and adds O z to the
residual stream. Over calibration tokens the best O for targets y has the closed form

    O' = O + E[(y - O z) z^T] (E[z z^T] + l I)^(-1),        l = ridge * mean diag E[z z^T],

a ridge towards the O of the source. Only the two moments are kept; written with the error y - O z, rounding in them
is relative to the correction, and a layer without error stays as it is.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .errors import InvalidRecipe
from .ranks import count_over_ranks, sum_over_ranks
from .types import LatentAttention


class OutputMoments:
    """Sums over tokens of z z^T and (y - O z) z^T, fp64 on the CPU; products in fp32."""

    def __init__(self, latent: LatentAttention) -> None:
        D, H, V = latent.out_DHV.shape
        self.num_tokens = 0
        self._out_DZ = latent.out_DHV.reshape(D, H * V).float()
        self._bias_D = latent.carried.out_bias_D
        self.inner_ZZ = torch.zeros(H * V, H * V, dtype=torch.float64)
        self.cross_DZ = torch.zeros(D, H * V, dtype=torch.float64)

    def add(self, z_TZ: Tensor, y_TD: Tensor) -> None:
        """Add what the projection read and what it should have given, its bias included."""
        error_TD = y_TD - z_TZ @ self._out_DZ.to(z_TZ.device).T
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

    def output(self, latent: LatentAttention, moments: OutputMoments) -> LatentAttention:
        """The layer with its output projection refit to the moments of all processes."""
        D, H, V = latent.out_DHV.shape
        start_DZ = latent.out_DHV.reshape(D, H * V).double()
        num_tokens = count_over_ranks(moments.num_tokens)
        inner_ZZ = sum_over_ranks(moments.inner_ZZ) / num_tokens
        cross_DZ = sum_over_ranks(moments.cross_DZ) / num_tokens
        damping = self.ridge * inner_ZZ.diagonal().mean()
        system_ZZ = inner_ZZ + damping * torch.eye(H * V, dtype=torch.float64)
        correction_DZ = torch.linalg.solve(system_ZZ, cross_DZ.T).T
        return replace(latent, out_DHV=(start_DZ + correction_DZ).view(D, H, V))


REFITS = {"ridge": Ridge}
"""What can be done after truncation, by the name that a recipe uses."""
