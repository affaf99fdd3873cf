"""Cache entries in fewer bits: symmetric, with a scale for each token, or for groups of a token's values.

An entry has parts of unlike size, a rotary key and a latent; no scale spans two parts. What is stored of an entry is
one row of bytes, its values and then its scales, so that caches can cut, join and reorder rows as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SCALE_DTYPE = torch.bfloat16
"""What scales are stored in. Values are divided by the stored scale, so its rounding costs no accuracy."""

FP8_MAX = 448.0
"""Largest number of float8_e4m3fn."""


@dataclass(frozen=True)
class Quantizer:
    """`largest` is what a group's largest value becomes; `group` values share a scale, 0 means all of a part.

    `packed` puts two values into a byte.
    """

    dtype: torch.dtype
    largest: float
    group: int = 0
    packed: bool = False

    def groups(self, parts: Sequence[int]) -> list[int]:
        """Widths of the groups of an entry with these parts."""
        found: list[int] = []
        for part in filter(None, parts):
            whole, rest = divmod(part, self.group or part)
            found += [self.group or part] * whole + [rest] * (rest > 0)
        return found

    def encode(self, values: Tensor, parts: Sequence[int]) -> Tensor:
        """Values (..., sum of parts) as bytes (..., row)."""
        if not sum(parts):
            return torch.empty(values.shape, dtype=torch.uint8, device=values.device)
        groups = values.float().split(self.groups(parts), dim=-1)
        scales = torch.stack([group.abs().amax(-1) for group in groups], -1).div(self.largest)
        # A scale rounded down would push the largest value out of range; one of zero would divide by it.
        scales = scales.mul(1 + torch.finfo(SCALE_DTYPE).eps).clamp(min=torch.finfo(SCALE_DTYPE).tiny).to(SCALE_DTYPE)
        scaled = torch.cat([group / scales[..., i : i + 1].float() for i, group in enumerate(groups)], -1)
        data = (scaled if self.dtype.is_floating_point else scaled.round()).to(self.dtype)
        data = _packed(data) if self.packed else data
        return torch.cat((data.view(torch.uint8), scales.view(torch.uint8)), -1)

    def decode(self, rows: Tensor, parts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The values (..., sum of parts) that are left of what was encoded."""
        if not sum(parts):
            return rows.to(dtype)
        data, scales = self.views(rows, parts)
        data = _unpacked(data, sum(parts)) if self.packed else data
        groups = data.float().split(self.groups(parts), dim=-1)
        return torch.cat([group * scales[..., i : i + 1].float() for i, group in enumerate(groups)], -1).to(dtype)

    def views(self, rows: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The stored values and the scales (..., groups) in bytes; nothing is copied where the row is even."""
        width = rows.shape[-1] - len(self.groups(parts)) * SCALE_DTYPE.itemsize
        scales = rows[..., width:]
        if any(n % SCALE_DTYPE.itemsize for n in (scales.storage_offset(), *scales.stride()[:-1])):
            scales = scales.clone(memory_format=torch.contiguous_format)
        return rows[..., :width].view(self.dtype), scales.view(SCALE_DTYPE)


def _packed(data: Tensor) -> Tensor:
    """Numbers from -8 to 7, two to a byte; an odd one out is followed by a zero."""
    pairs = functional.pad(data, (0, data.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return pairs[..., 0] & 15 | pairs[..., 1] << 4


def _unpacked(packed: Tensor, width: int) -> Tensor:
    return torch.stack((packed << 4 >> 4, packed >> 4), -1).flatten(-2)[..., :width]


QUANTIZERS = {
    "int8": Quantizer(torch.int8, 127.0),
    "fp8": Quantizer(torch.float8_e4m3fn, FP8_MAX),
    "int4": Quantizer(torch.int8, 7.0, group=32, packed=True),
}
"""By name. int8 and fp8 are what the decode kernel reads."""
