"""What a decode step attends to: the latents of one layer, as they lie in memory."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cached:
    """Entries (B, T, C) of one layer, C = R + P; or pages of them (pages, page size, C) with a table.

    `lengths_B` is the number of tokens of each sequence, at least 1. Entry t of sequence b is in page
    `table_BN[b, t // page size]`. Quantized entries (int8, float8_e4m3fn) have a scale for each part, in the order of
    the parts: (..., 2), or (..., 1) where P is 0. The last dim of every tensor is contiguous. Entries are read in whole
    tiles, beyond the end of a sequence, into the next one: what lies there weighs nothing, but must be finite.
    """

    entries: Tensor
    lengths_B: Tensor
    rank: int
    table_BN: Tensor | None = None
    scales: Tensor | None = None
    rope_first: bool = False
    """Whether an entry is [P | R], as in the native format's cache, instead of [R | P]."""

    @property
    def rope_dim(self) -> int:
        """Width of the shared rotary key: P."""
        return self.entries.shape[-1] - self.rank

    @property
    def page_size(self) -> int:
        """Tokens of a page; 0 where there are none."""
        return 0 if self.table_BN is None else self.entries.shape[1]

    @property
    def capacity(self) -> int:
        """Most tokens of a sequence."""
        return self.entries.shape[1] if self.table_BN is None else self.page_size * self.table_BN.shape[1]

    @property
    def latent_start(self) -> int:
        """First column of the latent."""
        return self.rope_dim if self.rope_first else 0

    @property
    def is_aligned(self) -> bool:
        """Whether rows and parts begin at multiples of 16 bytes, as the copy engine of Hopper wants it."""
        places = (*self.entries.stride()[:2], self.latent_start, self.rope_start)
        return self.entries.data_ptr() % 16 == 0 and all(n * self.entries.element_size() % 16 == 0 for n in places)

    @property
    def parts(self) -> tuple[int, ...]:
        """Widths of the parts, in their order."""
        order = (self.rope_dim, self.rank) if self.rope_first else (self.rank, self.rope_dim)
        return tuple(width for width in order if width)

    @property
    def rope_start(self) -> int:
        """First column of the rotary key."""
        return 0 if self.rope_first else self.rank
