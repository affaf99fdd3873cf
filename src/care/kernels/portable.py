# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false
"""Attention of one query token to a cache of latents in Triton: every entry is read once, as key and as value.

A latent of any width is up to three tiles whose widths are powers of two, the last one masked: 400 values are 256, 128
and 16, not 512, and no layer is padded to the width of another.

Scores and sums are held transposed, tokens or latents by heads. Tensor cores multiply tiles of 16 or 64 rows: tokens
and latents fill them, the few query heads of a model would not.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .cached import Cached
from .gpu import capability, shared_memory
from .splits import LOG2_E, Parts, num_splits

SMALLEST = 16
"""Least width of a tile that tensor cores multiply."""

HEADS = 32
"""Most heads of one program."""


@triton.jit
def _rows(at, column, is_row, width, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile of the rows at these addresses; columns behind the width, a multiple of ALIGNED, are 0."""
    if MASKED:
        is_column = column // ALIGNED < width // ALIGNED  # so the compiler sees that it may load ALIGNED at once
        return tl.load(at[:, None] + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
    return tl.load(at[:, None] + column[None, :], mask=is_row[:, None], other=0.0)


@triton.jit
def _columns(
    entries, view, page, slot, row, start, is_token, width,
    WIDTH: tl.constexpr, BULK: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of a tile of entries, from `start` on: as one bulk copy out of a view, or row by row."""
    if BULK:
        # Columns behind the width are others of the entry, or 0: their queries are 0, their sums are not stored.
        return view.load([page, slot, start]).reshape(is_token.shape[0], WIDTH)
    at = entries + tl.multiple_of(row + start, ALIGNED)
    return _rows(at, tl.arange(0, WIDTH), is_token, width, MASKED, ALIGNED)


@triton.jit
def _queries(at, column, is_head, width):
    """Queries (columns, heads)."""
    return tl.load(at[None, :] + column[:, None], mask=is_head[None, :] & (column < width)[:, None], other=0.0)


@triton.jit
def _store(at, column, is_head, width, tile):
    """Sums (columns, heads) to one row a head."""
    tl.store(
        at[None, :] + column[:, None], tile.to(at.dtype.element_ty), mask=is_head[None, :] & (column < width)[:, None]
    )


# Triton compiles anew where an integer is 1 or a multiple of 16; of these it would gain nothing.
@triton.jit(do_not_specialize=["num_heads", "num_splits", "split_tokens", "scale_b", "table_b"])
def _attend(
    q_latent, q_rope, entries, view_a, view_b, view_c, view_r, scales, table, lengths, sums, logs,
    score_scale, num_heads, num_splits, rank, rope_dim, latent_start, rope_start,
    latent_b, latent_h, rope_b, rope_h, entry_b, entry_t, scale_b, scale_t, table_b, split_tokens,
    PAGE: tl.constexpr, BULK: tl.constexpr, SCALED: tl.constexpr, LATENT_SCALE: tl.constexpr,
    PADDED: tl.constexpr, PADDED_ROPE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    ROPE: tl.constexpr, ALIGNED: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One sequence, HEADS heads and `split_tokens` tokens: sums of values over the softmax's own sum, and its log."""
    b, split = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = head < num_heads
    # Offsets in a large cache leave 32 bits.
    query = q_latent + b.to(tl.int64) * latent_b + head * latent_h
    column_a = tl.arange(0, A)
    q_a = _queries(query, column_a, is_head, rank)
    sum_a = tl.zeros((A, HEADS), tl.float32)
    if B:
        column_b = A + tl.arange(0, B)
        q_b = _queries(query, column_b, is_head, rank)
        sum_b = tl.zeros((B, HEADS), tl.float32)
    if C:
        column_c = A + B + tl.arange(0, C)
        q_c = _queries(query, column_c, is_head, rank)
        sum_c = tl.zeros((C, HEADS), tl.float32)
    if ROPE:
        column_r = tl.arange(0, ROPE)
        q_r = _queries(q_rope + b.to(tl.int64) * rope_b + head * rope_h, column_r, is_head, rope_dim)
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    parts = tl.zeros((TOKENS, HEADS), tl.float32)
    start = split * split_tokens
    end = tl.minimum(start + split_tokens, tl.load(lengths + b))
    for tile in range(start, end, TOKENS):
        token = tile + tl.arange(0, TOKENS)
        is_token = token < end
        if PAGE and BULK:
            page = tl.load(table + b * table_b + tile // PAGE)  # that holds the whole tile
            slot = tile % PAGE
        elif PAGE:
            page = tl.load(table + b * table_b + token // PAGE, mask=is_token, other=0)
            slot = token % PAGE
        else:
            page = b
            slot = tile if BULK else token
        row = page.to(tl.int64) * entry_b + slot.to(tl.int64) * entry_t
        x_a = _columns(
            entries, view_a, page, slot, row, latent_start, is_token, rank, A, BULK, PADDED and not B, ALIGNED
        ).to(q_a.dtype)  # fmt: skip
        score = tl.dot(x_a, q_a, input_precision="ieee")
        if B:
            x_b = _columns(
                entries, view_b, page, slot, row, latent_start + A, is_token, rank - A, B, BULK, PADDED and not C,
                ALIGNED,
            ).to(q_a.dtype)  # fmt: skip
            score = tl.dot(x_b, q_b, score, input_precision="ieee")
        if C:
            x_c = _columns(
                entries, view_c, page, slot, row, latent_start + A + B, is_token, rank - A - B, C, BULK, PADDED, ALIGNED
            ).to(q_a.dtype)  # fmt: skip
            score = tl.dot(x_c, q_c, score, input_precision="ieee")
        if SCALED:
            # One scale a token and part: it goes to scores and weights, values are never de-quantized.
            slots = slot + tl.arange(0, TOKENS) if BULK else slot
            row_scale = scales + (page.to(tl.int64) * scale_b + slots.to(tl.int64) * scale_t)
            latent_scale = tl.load(row_scale + LATENT_SCALE, mask=is_token, other=0.0).to(tl.float32)
            score *= latent_scale[:, None]
        if ROPE:
            x_r = _columns(
                entries, view_r, page, slot, row, rope_start, is_token, rope_dim, ROPE, BULK, PADDED_ROPE, ALIGNED
            ).to(q_a.dtype)  # fmt: skip
            if SCALED:
                rope_scale = tl.load(row_scale + (1 - LATENT_SCALE), mask=is_token, other=0.0).to(tl.float32)
                score += tl.dot(x_r, q_r, input_precision="ieee") * rope_scale[:, None]
            else:
                score = tl.dot(x_r, q_r, score, input_precision="ieee")
        score = tl.where(is_token[:, None], score * score_scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 0))
        weight = tl.exp2(score - higher[None, :])
        kept = tl.exp2(highest - higher)
        # Summed over tokens at the end: one exchange between warps less a tile.
        parts = parts * kept[None, :] + weight
        if SCALED:
            weight *= latent_scale[:, None]
        weight = weight.to(q_a.dtype)
        sum_a = tl.dot(tl.trans(x_a), weight, sum_a * kept[None, :], input_precision="ieee")
        if B:
            sum_b = tl.dot(tl.trans(x_b), weight, sum_b * kept[None, :], input_precision="ieee")
        if C:
            sum_c = tl.dot(tl.trans(x_c), weight, sum_c * kept[None, :], input_precision="ieee")
        highest = higher
    # A split behind the end of its sequence has no tokens: it weighs nothing.
    total = tl.sum(parts, 0)
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    place = (b.to(tl.int64) * num_heads + head) * num_splits + split
    _store(sums + place * rank, column_a, is_head, rank, sum_a / divisor[None, :])
    if B:
        _store(sums + place * rank, column_b, is_head, rank, sum_b / divisor[None, :])
    if C:
        _store(sums + place * rank, column_c, is_head, rank, sum_c / divisor[None, :])
    tl.store(logs + place, tl.where(some, highest + tl.log2(divisor), float("-inf")), mask=is_head)


@dataclass(frozen=True)
class Launch:
    """How one program works: tokens of a tile, warps, tiles in flight, bulk copies, and how many a core should find."""

    tokens: int
    warps: int
    stages: int
    bulk: bool
    per_core: int

    def shared_bytes(self, heads: int, width: int, entry_size: int, size: int) -> int:
        """Queries, tiles in flight and weights, for entries of such a padded width; entries are `entry_size` bytes a
        value, what is multiplied `size` bytes.
        """
        converted = 0 if entry_size == size else self.tokens * width * size
        in_flight = self.stages * self.tokens * width * entry_size
        return in_flight + converted + size * heads * (width + self.tokens)


LAUNCHES = [
    Launch(64, 4, 3, bulk=True, per_core=2), Launch(64, 4, 2, bulk=True, per_core=2),
    Launch(64, 4, 2, bulk=False, per_core=1), Launch(32, 4, 3, bulk=False, per_core=2),
    Launch(32, 4, 2, bulk=False, per_core=2), Launch(16, 4, 2, bulk=False, per_core=2),
]  # fmt: skip
"""In order of preference, fastest on an H200 first; the first one that fits into shared memory.

One stage is none of them: Triton 3.6 then lets a bulk copy overwrite what is still multiplied.
"""

LEAST_BYTES = 98
"""Shared memory that the last of them takes for each column, of 16-bit values (compiled by Triton 3.6)."""


def attend(q_latent_BHR: Tensor, q_rope_BHP: Tensor, cached: Cached, scale: float) -> Parts:
    """The splits of `decode`, on any GPU and in Triton's interpreter."""
    B, H, R = q_latent_BHR.shape
    P, device = cached.rope_dim, q_latent_BHR.device
    widths, rope = tiles(R), tile(P)
    heads = min(max(triton.next_power_of_2(H), SMALLEST), HEADS)
    how = launch(heads, padded(R, P), q_latent_BHR.element_size(), cached)
    scales, table = cached.scales, cached.table_BN
    num_tiles = triton.cdiv(cached.capacity, how.tokens)
    parts = Parts.empty(q_latent_BHR, num_splits(B * triton.cdiv(H, heads), num_tiles, how.per_core, device))
    views = [view(cached.entries, how.tokens, width) if how.bulk and width else None for width in (*widths, rope)]
    _attend[(B, triton.cdiv(H, heads), parts.num_splits)](
        q_latent_BHR, q_rope_BHP if P else q_latent_BHR, cached.entries, *views,
        parts.logs_BHS if scales is None else scales, cached.lengths_B if table is None else table, cached.lengths_B,
        parts.sums_BHSR, parts.logs_BHS,
        scale * LOG2_E, H, parts.num_splits, R, P, cached.latent_start, cached.rope_start,
        *q_latent_BHR.stride()[:2], *q_rope_BHP.stride()[:2], *cached.entries.stride()[:2],
        *((0, 0) if scales is None else scales.stride()[:2]), 0 if table is None else table.stride(0),
        how.tokens * triton.cdiv(num_tiles, parts.num_splits),
        PAGE=cached.page_size, BULK=how.bulk, SCALED=scales is not None,
        LATENT_SCALE=len(cached.parts) - 1 if cached.rope_first else 0, PADDED=sum(widths) > R, PADDED_ROPE=rope > P,
        A=widths[0], B=widths[1], C=widths[2], ROPE=rope, ALIGNED=aligned(cached), HEADS=heads, TOKENS=how.tokens,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return parts


def view(entries: Tensor, tokens: int, width: int) -> TensorDescriptor:
    """Entries as bulk copies see them: tiles of one sequence or page."""
    return TensorDescriptor.from_tensor(entries, [1, tokens, width])


def bulk(cached: Cached, tokens: int) -> bool:
    """Whether tiles can be copied in bulk, as Hopper and later GPUs do: of aligned entries, in pages of whole tiles."""
    return cached.is_aligned and cached.page_size % tokens == 0 and can_copy_in_bulk(cached.entries.device)


def can_copy_in_bulk(device: torch.device) -> bool:
    """Whether a GPU has a copy engine, or is none but Triton's interpreter."""
    return device.type == "cpu" or capability(device) >= 9


def aligned(cached: Cached) -> int:
    """What all places and widths in the cache are multiples of, at most 16: 8 values of 16 bits are loaded at once."""
    return gcd(*cached.entries.stride()[:2], cached.rank, cached.rope_dim, cached.latent_start, cached.rope_start, 16)


def can_hold(rank: int, rope_dim: int, device: torch.device) -> bool:
    """Whether entries of 16 bits and so wide fit into the shared memory of a GPU, in the smallest tiles."""
    return LEAST_BYTES * padded(rank, rope_dim) <= shared_memory(device)


def padded(rank: int, rope_dim: int) -> int:
    """Columns of all tiles of an entry."""
    return sum(tiles(rank)) + tile(rope_dim)


def tile(width: int) -> int:
    """The least tile that holds so many columns; 0 for none."""
    return max(triton.next_power_of_2(width), SMALLEST) if width else 0


def tiles(width: int) -> tuple[int, int, int]:
    """Three tiles that hold so many columns, the later ones 0 where they are not needed; only the last is not full."""
    first = max(1 << (width.bit_length() - 1), SMALLEST)
    rest = max(width - first, 0)
    second = tile(rest) if rest <= SMALLEST else 1 << (rest.bit_length() - 1)
    return first, second, tile(max(rest - second, 0))


def launch(heads: int, width: int, size: int, cached: Cached) -> Launch:
    """How programs work on entries of such a padded width."""
    entry_size, memory = cached.entries.element_size(), shared_memory(cached.entries.device)
    for how in LAUNCHES:
        if how.shared_bytes(heads, width, entry_size, size) <= memory and (not how.bulk or bulk(cached, how.tokens)):
            return how
    return LAUNCHES[-1]
