"""Which decode steps of native layers are for our kernel, and which for torch's attention."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .shape import LatentShape


@cache
def has_triton() -> bool:
    """Whether the decode kernel can be imported; torch for CUDA brings Triton along."""
    return find_spec("triton") is not None


FUSED_WIDTH, FUSED_MULTIPLE = 256, 8
"""Widest entry at which torch was as fast as the kernel (H200), and what its widths must be multiples of.

Of other widths torch forms all scores.
"""

LARGE_CACHE = 2**27
"""Bytes of a layer's cache from which on reading them takes longer than starting kernels from Python (H200)."""


def kernel_fits(shape: LatentShape, entry_B1UC: Tensor, mask: Tensor | None) -> bool:
    """Whether a decode step of an absorbed layer is one for the kernel in care.kernels.decode.

    On a GPU that has room for such entries, in 16 bits, where keys and values are the same latent, scores are not
    capped, nothing is masked, differentiated or compiled, and the kernel is faster.
    """
    joint = shape.key_rank == shape.value_rank == shape.kv_lora_rank
    plain = mask is None and shape.softcap is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    sixteen_bits = entry_B1UC.dtype in (torch.bfloat16, torch.float16)
    if not (joint and plain and sixteen_bits and kernel_is_faster(shape, entry_B1UC)):
        return False
    return gpu_can_decode(shape, entry_B1UC.device)


def kernel_is_faster(shape: LatentShape, entry_B1UC: Tensor) -> bool:
    """Than torch's attention: where torch has no fused one for such widths, and for large caches."""
    width = entry_B1UC.shape[-1]
    fused = width <= FUSED_WIDTH and width % FUSED_MULTIPLE == shape.value_rank % FUSED_MULTIPLE == 0
    return not fused or entry_B1UC.nbytes >= LARGE_CACHE


def gpu_can_decode(shape: LatentShape, device: torch.device) -> bool:
    """Whether the kernel runs on a device, and Triton is there."""
    if device.type != "cuda" or not has_triton():
        return False
    from ..kernels.decode import can_decode  # noqa: PLC0415 - needs Triton

    return can_decode(shape.kv_lora_rank, shape.rope_dim, device)
