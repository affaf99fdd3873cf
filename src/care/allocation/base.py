"""What an allocator is: it spreads a budget of latent ranks over layers, seeing only spectra."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor


class Allocator(Protocol):
    """Gives each layer a rank so that the ranks add up to the budget exactly."""

    uses_spectra: ClassVar[bool]

    def __call__(self, spectra: Sequence[Tensor], caps: Sequence[int], budget: int) -> tuple[int, ...]:
        """Ranks per layer.

        spectra are squared singular values, descending, one tensor per layer (ignored, and possibly
        empty, when `uses_spectra` is false); caps are the largest ranks possible. The caller ensures
        len(caps) <= budget <= sum(caps), or a budget of 0 with caps of 0, so that no layer needs rank 0.
        """
        ...
