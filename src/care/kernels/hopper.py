# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""The same attention for Hopper, in Gluon, Triton's lower language: a ring of chunks that is always being filled.

An entry is cut into chunks of 64 columns, which Hopper's copy engine brings in bulk. Triton's own pipelining starts to
copy the next tile after the last product of a tile and so needs three tiles of shared memory for one on its way; here a
slot of the ring is filled anew as soon as its tile is done with, and what is free beyond one tile is on its way.

Gluon is young and changes between versions of Triton; where this module cannot be imported, `portable` does the work.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .cached import Cached
from .gpu import capability, shared_memory
from .splits import LOG2_E, Parts, num_splits

# Their names since Triton 3.7, and in 3.6.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
block = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

CHUNK = 64
"""Columns of a chunk, 128 bytes of 16-bit values, which shared memory is swizzled over.

As many tokens are a tile: the rows that Hopper's tensor cores multiply at once.
"""

SLOT_BYTES = CHUNK * CHUNK * 2

RESERVED = 2048
"""Bytes of shared memory for barriers and for sums over warps."""

FEW_SUMS, MOST_SUMS = 8 * 32, 16 * 32
"""Chunks of latents times heads that four warps hold in registers, and eight."""


@gluon.jit
def _row_of(tile, table, b, end, sequence_rows, table_b, PAGE: gl.constexpr):
    """Where a tile begins, in rows of the whole cache; behind the end of a sequence, anywhere."""
    if PAGE:
        page = gl.load(table + b * table_b + gl.minimum(tile, end - 1) // PAGE)
        return page * sequence_rows + tile % PAGE
    else:  # noqa: RET505 - compiled where there are pages, it would have a second type
        return b * sequence_rows + tile


@gluon.jit
def _slot(place, SLOTS: gl.constexpr):
    """A place in the ring, which is gone round at most once."""
    return gl.where(place >= SLOTS, place - SLOTS, place)


@gluon.jit
def _fetch(
    view, ready, ring, first, tile, wanted, page_row, latent_start, rope_start,
    J: gl.constexpr, LATENTS: gl.constexpr, ROPES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Start to copy chunk J of a tile of entries into slot `first` of the ring, if it is wanted.

    A tile's barrier is told of all its bytes at once, with its first chunk.
    """
    slot = _slot(first, SLOTS)
    column = latent_start + J * 64 if J < LATENTS else rope_start + (J - LATENTS) * 64
    if J == 0:
        mbarrier.expect(ready, 64 * 64 * 2 * (LATENTS + ROPES), pred=wanted)
    copy_in(view, [page_row, column], ready, ring.index(slot), pred=wanted)


@gluon.jit(do_not_specialize=["num_heads", "num_splits", "split_tokens", "table_b", "sequence_rows"])
def _attend(
    q_latent, q_rope, view, table, lengths, sums, logs,
    score_scale, num_heads, num_splits, rank, rope_dim, latent_start, rope_start,
    latent_b, latent_h, rope_b, rope_h, sequence_rows, table_b, split_tokens,
    PAGE: gl.constexpr, LATENTS: gl.constexpr, ROPES: gl.constexpr, SLOTS: gl.constexpr, HEADS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """One sequence, HEADS heads and `split_tokens` tokens: sums of values over the softmax's own sum, and its log."""
    CHUNKS: gl.constexpr = LATENTS + ROPES
    # Tiles of which some chunks may be in the ring.
    BARRIERS: gl.constexpr = SLOTS // CHUNKS + 2
    GROUPS: gl.constexpr = num_warps // 4
    dtype: gl.constexpr = view.dtype
    # Products are [64 tokens or latents, HEADS].
    tile_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, GROUPS], instr_shape=[16, HEADS // GROUPS, 16]
    )
    row_layout: gl.constexpr = gl.SliceLayout(1, tile_layout)
    head_layout: gl.constexpr = gl.SliceLayout(0, tile_layout)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    query_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    weight_layout: gl.constexpr = gl.NVMMASharedLayout(min(HEADS * 2, 128), 16)

    b, split = gl.program_id(0), gl.program_id(2)
    first_head = gl.program_id(1) * HEADS
    start = split * split_tokens
    end = gl.minimum(start + split_tokens, gl.load(lengths + b))
    num_tiles = gl.maximum((end - start + 63) // 64, 0)

    ring = gl.allocate_shared_memory(dtype, [SLOTS, 64, 64], view.layout)
    ready = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(BARRIERS):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    block()
    for s in gl.static_range(SLOTS):
        tile = start + s // CHUNKS * 64
        page_row = _row_of(tile, table, b, end, sequence_rows, table_b, PAGE)
        _fetch(
            view, ready.index(s // CHUNKS), ring, s, tile, tile < end, page_row, latent_start, rope_start,
            s % CHUNKS, LATENTS, ROPES, SLOTS
        )  # fmt: skip

    queries = gl.allocate_shared_memory(dtype, [CHUNKS, HEADS, 64], query_layout)
    load_head = first_head + gl.arange(0, HEADS, gl.SliceLayout(1, load_layout))
    load_column = gl.arange(0, 64, gl.SliceLayout(0, load_layout))
    for j in gl.static_range(CHUNKS):
        if j < LATENTS:
            at = q_latent + b.to(gl.int64) * latent_b + load_head[:, None] * latent_h
            column = load_column[None, :] + j * 64
            width = rank
        else:
            at = q_rope + b.to(gl.int64) * rope_b + load_head[:, None] * rope_h
            column = load_column[None, :] + (j - LATENTS) * 64
            width = rope_dim
        query = gl.load(at + column, mask=(load_head[:, None] < num_heads) & (column < width), other=0.0)
        queries.index(j).store(query)
    weights = gl.allocate_shared_memory(dtype, [64, HEADS], weight_layout)

    parts = gl.zeros([64, HEADS], gl.float32, tile_layout)
    highest = gl.full([HEADS], float("-inf"), gl.float32, head_layout)
    sums_j = ()
    for _ in gl.static_range(LATENTS):
        sums_j = sums_j + (gl.zeros([64, HEADS], gl.float32, tile_layout),)  # noqa: RUF005 - no * in Triton
    token = gl.arange(0, 64, row_layout)
    first = 0
    fence_async_shared()
    block()
    for i in range(num_tiles):
        tile = start + i * 64
        score = gl.zeros([64, HEADS], gl.float32, tile_layout)
        mbarrier.wait(ready.index(i % BARRIERS), i // BARRIERS & 1)
        for j in gl.static_range(CHUNKS):
            slot = _slot(first + j, SLOTS)
            score = warpgroup_mma(ring.index(slot), queries.index(j).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma_wait(0, deps=(score,))
        score = gl.where((tile + token < end)[:, None], score * score_scale, float("-inf"))
        higher = gl.maximum(highest, gl.max(score, 0))
        kept = gl.exp2(highest - higher)
        highest = higher
        weight = gl.exp2(score - higher[None, :])
        # Summed over tokens at the end: one exchange between warps less a tile.
        parts = parts * kept[None, :] + weight
        weights.store(weight.to(dtype))
        fence_async_shared()
        block()
        next_sums = ()
        for j in gl.static_range(LATENTS):
            slot = _slot(first + j, SLOTS)
            one = warpgroup_mma(ring.index(slot).permute((1, 0)), weights, sums_j[j] * kept[None, :], is_async=True)
            next_sums = next_sums + (one,)  # noqa: RUF005 - no * in Triton
        if LATENTS == 1:  # noqa: SIM108 - a choice of types
            sums_j = (warpgroup_mma_wait(0, deps=next_sums),)
        else:
            sums_j = warpgroup_mma_wait(0, deps=next_sums)
        # Every warp is done with this tile: its slots are free.
        block()
        for k in gl.static_range(CHUNKS):
            later = tile + (SLOTS + k) // CHUNKS * 64
            page_row = _row_of(later, table, b, end, sequence_rows, table_b, PAGE)
            _fetch(
                view, ready.index((i + (SLOTS + k) // CHUNKS) % BARRIERS), ring, first + k, later, later < end,
                page_row, latent_start, rope_start, (SLOTS + k) % CHUNKS, LATENTS, ROPES, SLOTS
            )  # fmt: skip
        first = _slot(first + CHUNKS, SLOTS)

    for s in gl.static_range(BARRIERS):
        mbarrier.invalidate(ready.index(s))
    total = gl.sum(parts, 0)
    some = total > 0
    divisor = gl.where(some, total, 1.0)
    head = first_head + gl.arange(0, HEADS, head_layout)
    is_head = head < num_heads
    place = (b.to(gl.int64) * num_heads + head) * num_splits + split
    for j in gl.static_range(LATENTS):
        column = gl.arange(0, 64, row_layout) + j * 64
        at = sums + (place * rank)[None, :] + column[:, None]
        gl.store(at, sums_j[j] / divisor[None, :], mask=is_head[None, :] & (column < rank)[:, None])
    gl.store(logs + place, gl.where(some, highest + gl.log2(divisor), float("-inf")), mask=is_head)


@dataclass(frozen=True)
class Plan:
    """Query heads and warps of a program, slots of its ring, and how many programs a multiprocessor should find."""

    heads: int
    warps: int
    slots: int
    per_core: int


def plan(q_latent_BHR: Tensor, cached: Cached) -> Plan | None:
    """How to attend to such a cache; None where this kernel cannot."""
    entries = cached.entries
    if not is_hopper(entries.device) or entries.dtype not in (torch.bfloat16, torch.float16):
        return None
    per_sequence, per_token = entries.stride()[:2]
    if not cached.is_aligned or per_sequence % per_token or cached.page_size % CHUNK:
        return None  # the copy engine wants rows at one distance; a tile lies in one page
    return plan_within(shared_memory(entries.device), q_latent_BHR.shape[1], *chunks_of(cached))


def plan_within(memory: int, num_heads: int, latents: int, chunks: int) -> Plan | None:
    """How to attend with so many bytes of shared memory and chunks of latents, and of entries; None if it cannot be."""
    memory -= RESERVED
    for heads in (size for size in (64, 32, 16) if size == 16 or size < 2 * num_heads):
        fixed = 2 * heads * CHUNK * (chunks + 1)  # queries, and weights of a tile
        # Sums in registers: as many as four warps hold, or eight.
        warps = 4 if latents * heads <= FEW_SUMS else 8
        # Two programs on one multiprocessor multiply in turns; where they do not fit, a longer ring helps.
        if 2 * (fixed + 2 * chunks * SLOT_BYTES + RESERVED) <= memory:
            return Plan(heads, warps, 2 * chunks, per_core=2)
        slots = min((memory - fixed) // SLOT_BYTES, 3 * chunks)
        if slots >= chunks and latents * heads <= MOST_SUMS:
            return Plan(heads, warps, slots, per_core=1)
    return None


def chunks_of(cached: Cached) -> tuple[int, int]:
    """Chunks of a latent, and of an entry."""
    latents = triton.cdiv(cached.rank, CHUNK)
    return latents, latents + triton.cdiv(cached.rope_dim, CHUNK)


def is_hopper(device: torch.device) -> bool:
    """Whether a device has the instructions of compute capability 9, which later ones have not."""
    return device.type == "cuda" and capability(device) == 9


def attend(q_latent_BHR: Tensor, q_rope_BHP: Tensor, cached: Cached, scale: float, plan: Plan) -> Parts:
    """The splits of `decode`."""
    (B, H, R), P, table = q_latent_BHR.shape, cached.rope_dim, cached.table_BN
    (latents, chunks), blocks, tiles = (
        chunks_of(cached),
        triton.cdiv(H, plan.heads),
        triton.cdiv(cached.capacity, CHUNK),
    )
    parts = Parts.empty(q_latent_BHR, num_splits(B * blocks, tiles, plan.per_core, q_latent_BHR.device))
    per_sequence, per_token = cached.entries.stride()[:2]
    sequence_rows = per_sequence // per_token
    rows = (cached.entries.shape[0] - 1) * sequence_rows + cached.entries.shape[1]
    view = TensorDescriptor(
        cached.entries, [rows, cached.entries.shape[2]], [per_token, 1], [CHUNK, CHUNK], gl.NVMMASharedLayout(128, 16)
    )
    _attend[(B, blocks, parts.num_splits)](
        q_latent_BHR, q_rope_BHP if P else q_latent_BHR, view, cached.lengths_B if table is None else table,
        cached.lengths_B, parts.sums_BHSR, parts.logs_BHS,
        scale * LOG2_E, H, parts.num_splits, R, P, cached.latent_start, cached.rope_start,
        *q_latent_BHR.stride()[:2], *q_rope_BHP.stride()[:2], sequence_rows, 0 if table is None else table.stride(0),
        CHUNK * triton.cdiv(tiles, parts.num_splits),
        PAGE=cached.page_size, LATENTS=latents, ROPES=chunks - latents, SLOTS=plan.slots, HEADS=plan.heads,
        num_warps=plan.warps,
    )  # fmt: skip
    return parts
