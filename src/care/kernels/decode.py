# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Flash decoding over latents in Triton: every entry is read once, as key and as value, for a block of heads.

The tokens of a sequence are split over programs (Tri Dao et al., Flash-Decoding, 2023), each with a softmax of its own;
a second kernel joins them. A latent of any width is two tiles whose widths are powers of two, the second one masked:
144 values are 128 and 16, not 256, and no layer is padded to the width of another.

Triton is an optional dependency: only who calls `decode` imports this module.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cached import Cached

SMALLEST = 16
"""Least width of a tile that tensor cores multiply."""

HEADS = 32
"""Most heads of one program; each holds a row of fp32 sums as wide as the latent."""

TOKENS = 32
"""Tokens of one tile."""

PROGRAMS_PER_CORE = 2
"""How many programs each multiprocessor should find, where the context is long enough to split."""

CPU_SPLITS = 3
"""Splits in Triton's interpreter, which has no multiprocessors to count: more than one, to be tested."""


@triton.jit
def _attend(
    query, entries, scales, table, lengths, sums, logs,
    score_scale, num_heads, num_splits, rank, rope_dim, latent_start, rope_start,
    query_b, query_h, entry_b, entry_t, scale_b, scale_t, table_b, split_tokens,
    PAGE: tl.constexpr, SCALED: tl.constexpr, LATENT_SCALE: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One sequence, HEADS heads and `split_tokens` tokens: sums of values over the softmax's own sum, and its log."""
    b, split = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = head < num_heads
    # Offsets in a large cache leave 32 bits.
    row_query = query + b.to(tl.int64) * query_b + head[:, None] * query_h
    first = tl.arange(0, FIRST)
    is_first = first < rank
    q_first = tl.load(row_query + latent_start + first[None, :], mask=is_head[:, None] & is_first[None, :], other=0.0)
    sum_first = tl.zeros((HEADS, FIRST), tl.float32)
    if REST:
        rest = FIRST + tl.arange(0, REST)
        is_rest = rest < rank
        q_rest = tl.load(row_query + latent_start + rest[None, :], mask=is_head[:, None] & is_rest[None, :], other=0.0)
        sum_rest = tl.zeros((HEADS, REST), tl.float32)
    if ROPE:
        rope = tl.arange(0, ROPE)
        is_rope = rope < rope_dim
        q_rope = tl.load(row_query + rope_start + rope[None, :], mask=is_head[:, None] & is_rope[None, :], other=0.0)
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    length = tl.load(lengths + b)
    start = split * split_tokens
    end = tl.minimum(start + split_tokens, length)
    for tile in range(start, end, TOKENS):
        token = tile + tl.arange(0, TOKENS)
        is_token = token < end
        if PAGE:
            page = tl.load(table + b * table_b + token // PAGE, mask=is_token, other=0)
            row = page.to(tl.int64) * entry_b + (token % PAGE) * entry_t
            row_scale = page.to(tl.int64) * scale_b + (token % PAGE) * scale_t
        else:
            row = b.to(tl.int64) * entry_b + token.to(tl.int64) * entry_t
            row_scale = b.to(tl.int64) * scale_b + token.to(tl.int64) * scale_t
        latent = entries + row[:, None] + latent_start
        x_first = tl.load(latent + first[None, :], mask=is_token[:, None] & is_first[None, :], other=0.0)
        x_first = x_first.to(q_first.dtype)
        score = tl.dot(q_first, tl.trans(x_first), input_precision="ieee")
        if REST:
            x_rest = tl.load(latent + rest[None, :], mask=is_token[:, None] & is_rest[None, :], other=0.0)
            x_rest = x_rest.to(q_first.dtype)
            score += tl.dot(q_rest, tl.trans(x_rest), input_precision="ieee")
        if SCALED:
            # One scale a token and part: it goes to scores and weights, values are never de-quantized.
            latent_scale = tl.load(scales + row_scale + LATENT_SCALE, mask=is_token, other=0.0).to(tl.float32)
            score *= latent_scale[None, :]
        if ROPE:
            key = entries + row[:, None] + rope_start
            x_rope = tl.load(key + rope[None, :], mask=is_token[:, None] & is_rope[None, :], other=0.0)
            score_rope = tl.dot(q_rope, tl.trans(x_rope.to(q_first.dtype)), input_precision="ieee")
            if SCALED:
                rope_scale = tl.load(scales + row_scale + (1 - LATENT_SCALE), mask=is_token, other=0.0)
                score_rope *= rope_scale.to(tl.float32)[None, :]
            score += score_rope
        score = tl.where(is_token[None, :], score * score_scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(weight, 1)
        if SCALED:
            weight *= latent_scale[None, :]
        weight = weight.to(q_first.dtype)
        sum_first = sum_first * kept[:, None] + tl.dot(weight, x_first, input_precision="ieee")
        if REST:
            sum_rest = sum_rest * kept[:, None] + tl.dot(weight, x_rest, input_precision="ieee")
        highest = higher
    # A split behind the end of its sequence has no tokens: it weighs nothing.
    some = total > 0
    divisor = tl.where(some, total, 1.0)[:, None]
    place = (b.to(tl.int64) * num_heads + head) * num_splits + split
    row_sum = sums + place[:, None] * rank
    tl.store(row_sum + first[None, :], sum_first / divisor, mask=is_head[:, None] & is_first[None, :])
    if REST:
        tl.store(row_sum + rest[None, :], sum_rest / divisor, mask=is_head[:, None] & is_rest[None, :])
    tl.store(logs + place, tl.where(some, highest + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=is_head)


@triton.jit
def _join(sums, logs, mixed, num_splits, rank, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One head of one sequence: the mean of its splits, weighted by their softmax sums."""
    place = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    log = tl.load(logs + place * num_splits + split, mask=split < num_splits, other=float("-inf"))
    weight = tl.exp2(log - tl.max(log, 0))
    total = tl.sum(weight, 0)
    joined = tl.zeros((WIDTH,), tl.float32)
    for s in range(num_splits):
        one = tl.sum(tl.where(split == s, weight, 0.0), 0)
        joined += one * tl.load(sums + (place * num_splits + s) * rank + column, mask=column < rank, other=0.0)
    tl.store(mixed + place * rank + column, (joined / total).to(mixed.dtype.element_ty), mask=column < rank)


LOG2_E = 1.4426950408889634
"""Softmax in powers of two, which is what the hardware has."""


def decode(query_BHC: Tensor, cached: Cached, scale: float) -> Tensor:
    """What `reference_decode` gives, in the dtype of the query, which products are made in too (fp32 sums).

    Any rank and rope dim; entries in the dtype of the query, int8 or float8_e4m3fn.
    """
    B, H, _ = query_BHC.shape
    R, P = cached.rank, cached.rope_dim
    check(query_BHC, cached)
    tokens = cached.entries.shape[1] * (1 if cached.table_BN is None else cached.table_BN.shape[1])
    heads = min(max(triton.next_power_of_2(H), SMALLEST), HEADS)
    splits = num_splits(B * triton.cdiv(H, heads), tokens, query_BHC.device)
    sums = torch.empty(B, H, splits, R, dtype=torch.float32, device=query_BHC.device)
    logs = torch.empty(B, H, splits, dtype=torch.float32, device=query_BHC.device)
    first = max(1 << (R.bit_length() - 1), SMALLEST)
    latent_scale = len(cached.parts) - 1 if cached.rope_first else 0
    scales, table = cached.scales, cached.table_BN
    _attend[(B, triton.cdiv(H, heads), splits)](
        query_BHC, cached.entries, logs if scales is None else scales, cached.lengths_B if table is None else table,
        cached.lengths_B, sums, logs,
        scale * LOG2_E, H, splits, R, P, cached.latent_start, cached.rope_start,
        *query_BHC.stride()[:2], *cached.entries.stride()[:2],
        *((0, 0) if scales is None else scales.stride()[:2]), 0 if table is None else table.stride(0),
        TOKENS * triton.cdiv(triton.cdiv(tokens, splits), TOKENS),
        PAGE=0 if table is None else cached.entries.shape[1], SCALED=scales is not None,
        LATENT_SCALE=latent_scale, FIRST=first, REST=tile(max(R - first, 0)), ROPE=tile(P), HEADS=heads, TOKENS=TOKENS,
        num_warps=4 if R <= 256 else 8, num_stages=2,
    )  # fmt: skip
    mixed_BHR = torch.empty(B, H, R, dtype=query_BHC.dtype, device=query_BHC.device)
    _join[(B * H,)](
        sums, logs, mixed_BHR, splits, R, WIDTH=triton.next_power_of_2(R), SPLITS=triton.next_power_of_2(splits)
    )
    return mixed_BHR


def tile(width: int) -> int:
    """The least tile that holds so many columns; 0 for none."""
    return max(triton.next_power_of_2(width), SMALLEST) if width else 0


def num_splits(programs: int, tokens: int, device: torch.device) -> int:
    """Into how many parts each sequence is split so that every multiprocessor has work."""
    if device.type == "cpu":
        return CPU_SPLITS
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    return max(min(PROGRAMS_PER_CORE * cores // programs, triton.cdiv(tokens, 4 * TOKENS)), 1)


def check(query_BHC: Tensor, cached: Cached) -> None:
    """Refuse what the kernel would misread; ValueError, as no user can cause it."""
    if query_BHC.shape[2] != cached.entries.shape[2] or not 1 <= cached.rank <= cached.entries.shape[2]:
        raise ValueError(f"query {tuple(query_BHC.shape)} and rank {cached.rank} do not fit {cached.entries.shape}")
    quantized = cached.entries.dtype in (torch.int8, torch.float8_e4m3fn)
    if quantized != (cached.scales is not None) or not (quantized or cached.entries.dtype == query_BHC.dtype):
        raise ValueError(f"entries of {cached.entries.dtype} need scales if quantized, else the dtype of the query")
    if any(t is not None and t.stride(-1) != 1 for t in (query_BHC, cached.entries, cached.scales, cached.table_BN)):
        raise ValueError("the last dim of queries, entries, scales and table must be contiguous")
