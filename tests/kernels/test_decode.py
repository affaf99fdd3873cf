"""The decode kernel against plain torch: compiled where there is a GPU, else in Triton's interpreter."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernel needs Triton: make test-kernels")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads it when it is imported, which transformers has done by now.
    pytest.skip("no CUDA device, and Triton's interpreter is not on: make test-kernels", allow_module_level=True)

from care.kernels import QUANTIZERS, Cached, portable, reference_decode
from care.kernels import decode as decoding
from care.kernels.decode import decode
from tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device here: the compiled kernel is not tested")
LENGTHS = (75, 1, 40)
SMALL_PAGE, LARGE_PAGE = 16, 64
"""One that tiles span, one that holds a whole tile, which is copied in bulk."""


@dataclass(frozen=True)
class Shape:
    """Heads, latent and rope width."""

    H: int
    R: int
    P: int


SHAPES = [
    Shape(4, 512, 64), Shape(9, 144, 48), Shape(16, 128, 32), Shape(1, 16, 16), Shape(40, 100, 7), Shape(5, 8, 0),
    Shape(3, 33, 128),
]  # fmt: skip
"""Powers of two and not, one tile and two, no rope, more heads than a block holds."""

MORE_SHAPES = [
    Shape(4, 24, 16),
    Shape(4, 140, 52),
    Shape(20, 1088, 64),
    Shape(32, 640, 64),
    Shape(32, 896, 128),
    Shape(64, 512, 64),
    Shape(7, 200, 0),
    Shape(28, 72, 40),
]
"""One chunk, parts that begin at odd places, widths of real models, as many chunks as Hopper's ring holds and more."""


def queries(shape: Shape, dtype: torch.dtype = torch.float32, num: int = len(LENGTHS)) -> tuple[Tensor, Tensor]:
    """Absorbed queries (B, H, R) and (B, H, P), views of one tensor."""
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(num, shape.H, shape.R + shape.P, generator=generator).to(DEVICE, dtype)
    return both[..., : shape.R], both[..., shape.R :]


def cache(
    shape: Shape, dtype: torch.dtype = torch.float32, quantizer: str | None = None, *, rope_first: bool, page: int
) -> Cached:
    """Sequences of unlike lengths; what lies behind them is large."""
    generator = torch.Generator().manual_seed(2)
    entries = torch.randn(len(LENGTHS), max(LENGTHS), shape.R + shape.P, generator=generator)
    made = Cached(entries.to(DEVICE, dtype), torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE), shape.R)
    made = replace(made, rope_first=rope_first)
    if quantizer:
        # Latent and rotary key of unlike size, as in models: one scale for both would show.
        entries[..., made.rope_start : made.rope_start + shape.P] *= 30
        rows = QUANTIZERS[quantizer].encode(entries, made.parts)
        data, scales = QUANTIZERS[quantizer].views(rows, made.parts)
        made = replace(made, entries=data.contiguous().to(DEVICE), scales=scales.contiguous().to(DEVICE))
    else:
        for b, length in enumerate(LENGTHS):
            made.entries[b, length:] = 1e4
    return in_pages(made, page) if page else made


def in_pages(made: Cached, size: int) -> Cached:
    """The same entries in pages that lie anywhere."""
    pages = -(-max(LENGTHS) // size)
    order = torch.randperm(len(LENGTHS) * pages + 3, generator=torch.Generator().manual_seed(3))
    table = order[: len(LENGTHS) * pages].view(len(LENGTHS), pages)

    def spread(tensor: Tensor) -> Tensor:
        padded = tensor.new_zeros(len(LENGTHS), pages * size, tensor.shape[-1])
        padded[:, : tensor.shape[1]] = tensor
        out = tensor.new_zeros(len(order), size, tensor.shape[-1])
        out[table.to(DEVICE)] = padded.view(*table.shape, size, -1)
        return out

    scales = None if made.scales is None else spread(made.scales)
    return replace(made, entries=spread(made.entries), scales=scales, table_BN=table.int().to(DEVICE))


@pytest.mark.parametrize("page", [0, SMALL_PAGE, LARGE_PAGE])
@pytest.mark.parametrize("rope_first", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(shape: Shape, rope_first: bool, page: int) -> None:
    query, cached = queries(shape), cache(shape, rope_first=rope_first, page=page)
    assert_close(decode(*query, cached, 0.1), reference_decode(*query, cached, 0.1), "fp32 attention")


@pytest.mark.parametrize("page", [0, SMALL_PAGE, LARGE_PAGE])
@pytest.mark.parametrize("quantizer", ["int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized(shape: Shape, quantizer: str, page: int) -> None:
    """Scales of latent and rotary key go to scores and weights; the result is that of de-quantized entries."""
    for rope_first in (False, True):
        cached = cache(shape, quantizer=quantizer, rope_first=rope_first, page=page)
        query = queries(shape)
        assert_close(decode(*query, cached, 0.02), reference_decode(*query, cached, 0.02), "fp32 attention")


@pytest.mark.parametrize("page", [0, SMALL_PAGE, LARGE_PAGE])
@pytest.mark.parametrize("rope_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)])
@pytest.mark.parametrize("shape", [*SHAPES[:3], *MORE_SHAPES], ids=str)
def test_sixteen_bits(shape: Shape, dtype: torch.dtype, rope_first: bool, page: int) -> None:
    """Products of 16 bits, sums of 32. Triton's interpreter multiplies bf16 as if it were integers (3.9.0)."""
    query, cached = queries(shape, dtype), cache(shape, dtype, rope_first=rope_first, page=page)
    scale = shape.R**-0.5
    assert_close(decode(*query, cached, scale), reference_decode(*query, cached, scale), "bf16 attention")


@NEEDS_GPU
@pytest.mark.parametrize("quantizer", [None, "int8", "fp8"])
@pytest.mark.parametrize("shape", [Shape(32, 512, 64), Shape(32, 336, 80)], ids=str)
def test_compiled_for_a_long_context(shape: Shape, quantizer: str | None) -> None:
    """A context that is split over all multiprocessors."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    entries = torch.randn(2, 20_000, shape.R + shape.P, generator=generator, device=DEVICE)
    lengths = torch.tensor([20_000, 777], dtype=torch.int32, device=DEVICE)
    cached = Cached(entries.bfloat16(), lengths, shape.R, rope_first=True)
    if quantizer:
        data, scales = QUANTIZERS[quantizer].views(QUANTIZERS[quantizer].encode(entries, cached.parts), cached.parts)
        cached = replace(cached, entries=data.contiguous(), scales=scales.contiguous())
    q_latent, q_rope = queries(shape, torch.bfloat16, 2)
    assert_close(
        decode(q_latent, q_rope, cached, 0.05), reference_decode(q_latent, q_rope, cached, 0.05), "bf16 attention"
    )


def test_width_is_bounded_by_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for 512 + 64 and 896 + 128, the smallest launch took 56,448 and 99,456 bytes."""
    monkeypatch.setattr(portable, "shared_memory", lambda _device: 99_456 + 1024)
    device = torch.device("cuda")
    assert portable.can_hold(512, 64, device)
    assert portable.can_hold(896, 128, device)
    assert not portable.can_hold(1024, 128, device)


@NEEDS_GPU
def test_hopper_has_its_own_kernel() -> None:
    """Nothing would be wrong without it, but slow."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    q_latent, _ = queries(SHAPES[0], torch.bfloat16)
    assert decoding.hopper is not None
    assert decoding.hopper.plan(q_latent, cache(SHAPES[0], torch.bfloat16, rope_first=True, page=LARGE_PAGE))


def test_a_mismatch_is_refused() -> None:
    shape = Shape(2, 32, 16)
    cached = cache(shape, rope_first=False, page=0)
    with pytest.raises(ValueError, match="do not fit"):
        decode(*queries(Shape(2, 32, 8)), cached, 1.0)
    q_latent, q_rope = queries(shape)
    with pytest.raises(ValueError, match="do not fit each other"):
        decode(q_latent, q_rope[:, :1], cached, 1.0)
    with pytest.raises(ValueError, match="do not fit each other"):
        decode(q_latent[:1], q_rope[:1], cached, 1.0)
    with pytest.raises(ValueError, match="need scales if quantized"):
        decode(*queries(shape), replace(cached, entries=cached.entries.to(torch.int8)), 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        decode(q_latent.mT.contiguous().mT, q_rope, cached, 1.0)
