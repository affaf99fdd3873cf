# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Sequences split over programs, each with a softmax of its own, and joined again.

Tri Dao et al., Flash-Decoding for long-context inference (2023).
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import cores

CPU_SPLITS = 3
"""Splits in Triton's interpreter, which has no multiprocessors to count: more than one, to be tested."""

JOIN_VALUES, JOIN_ROWS = 8192, 256
"""Size of a tile of the joining kernel, and most splits in it."""

LOG2_E = 1.4426950408889634
"""Softmax in powers of two, which is what the hardware has."""


@dataclass(frozen=True)
class Parts:
    """What splits give: means of latents, and what weighs them, as logarithms to base 2; -inf where no tokens are."""

    sums_BHSR: Tensor
    logs_BHS: Tensor

    @classmethod
    def empty(cls, like_BHR: Tensor, splits: int) -> Self:
        """Room for them, fp32."""
        B, H, R = like_BHR.shape
        sums_BHSR = torch.empty(B, H, splits, R, dtype=torch.float32, device=like_BHR.device)
        return cls(sums_BHSR, torch.empty(B, H, splits, dtype=torch.float32, device=like_BHR.device))

    @property
    def num_splits(self) -> int:
        """Splits of each sequence."""
        return self.logs_BHS.shape[2]

    def joined(self, dtype: torch.dtype) -> Tensor:
        """The mean over all tokens: (B, H, R)."""
        B, H, S, R = self.sums_BHSR.shape
        mixed_BHR = torch.empty(B, H, R, dtype=dtype, device=self.sums_BHSR.device)
        rows = min(triton.next_power_of_2(S), JOIN_ROWS)
        columns = min(triton.next_power_of_2(R), JOIN_VALUES // rows)
        _join[(B * H, triton.cdiv(R, columns))](
            self.sums_BHSR, self.logs_BHS, mixed_BHR, S, R, SPLITS=triton.next_power_of_2(S), ROWS=rows, COLUMNS=columns
        )
        return mixed_BHR


@triton.jit(do_not_specialize=["num_splits"])
def _join(
    sums, logs, mixed, num_splits, rank, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Some latents of one head of one sequence: the mean of its splits, weighted by their softmax sums."""
    first = tl.program_id(0).to(tl.int64) * num_splits
    split, column = tl.arange(0, SPLITS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    log = tl.load(logs + first + split, mask=split < num_splits, other=float("-inf"))
    highest = tl.max(log, 0)
    total = tl.sum(tl.exp2(log - highest), 0)
    joined = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, num_splits, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < num_splits
        weight = tl.exp2(tl.load(logs + first + row, mask=is_row, other=float("-inf")) - highest)
        at = sums + (first + row)[:, None] * rank + column[None, :]
        tile = tl.load(at, mask=is_row[:, None] & (column < rank)[None, :], other=0.0)
        joined += tl.sum(tile * weight[:, None], 0)
    at = mixed + tl.program_id(0).to(tl.int64) * rank + column
    tl.store(at, (joined / total).to(mixed.dtype.element_ty), mask=column < rank)


def num_splits(programs: int, num_tiles: int, per_core: int, device: torch.device) -> int:
    """Into how many parts each sequence is split so that every multiprocessor finds `per_core` programs."""
    if device.type == "cpu":
        return CPU_SPLITS
    return max(min(per_core * cores(device) // programs, num_tiles), 1)
