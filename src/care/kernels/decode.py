# pyright: basic
"""Flash decoding over latents: one query token of each sequence attends to its cache, at any widths, paged or not.

Triton is an optional dependency: only who calls `decode` imports this module.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from . import portable
from .cached import Cached

try:
    from . import hopper
except (ImportError, AttributeError):  # Gluon's names are not those of every version of Triton
    hopper = None


def decode(q_latent_BHR: Tensor, q_rope_BHP: Tensor, cached: Cached, scale: float) -> Tensor:
    """What `reference_decode` gives, in the dtype of the queries, which products are made in too (fp32 sums).

    Any rank and rope dim; entries in the dtype of the queries, int8 or float8_e4m3fn.
    """
    check(q_latent_BHR, q_rope_BHP, cached)
    # Triton starts kernels on the current device, whatever device the tensors are on.
    with torch.cuda.device(q_latent_BHR.device) if q_latent_BHR.is_cuda else nullcontext():
        plan = hopper and hopper.plan(q_latent_BHR, cached)
        if hopper and plan:
            parts = hopper.attend(q_latent_BHR, q_rope_BHP, cached, scale, plan)
        else:
            parts = portable.attend(q_latent_BHR, q_rope_BHP, cached, scale)
        return parts.joined(q_latent_BHR.dtype)


def can_decode(rank: int, rope_dim: int, device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU with room for entries of 16 bits that are so wide. AMD's were never tried."""
    return device.type == "cuda" and torch.version.hip is None and portable.can_hold(rank, rope_dim, device)


def check(q_latent_BHR: Tensor, q_rope_BHP: Tensor, cached: Cached) -> None:
    """Refuse what the kernel would misread; ValueError, as no user can cause it."""
    found = (q_latent_BHR.shape[2], q_rope_BHP.shape[2])
    if found != (cached.rank, cached.rope_dim) or cached.rank < 1:
        raise ValueError(f"queries of {found} do not fit entries of {(cached.rank, cached.rope_dim)}")
    if q_latent_BHR.shape[:2] != q_rope_BHP.shape[:2] or len(cached.lengths_B) != len(q_latent_BHR):
        shapes = (tuple(q_latent_BHR.shape), tuple(q_rope_BHP.shape), len(cached.lengths_B))
        raise ValueError(f"queries and lengths do not fit each other: {shapes}")
    quantized = cached.entries.dtype in (torch.int8, torch.float8_e4m3fn)
    if quantized != (cached.scales is not None) or not (quantized or cached.entries.dtype == q_latent_BHR.dtype):
        raise ValueError(f"entries of {cached.entries.dtype} need scales if quantized, else the dtype of the queries")
    tensors = (q_latent_BHR, q_rope_BHP, cached.entries, cached.scales, cached.table_BN)
    if any(t is not None and t.shape[-1] and t.stride(-1) != 1 for t in tensors):
        raise ValueError("the last dim of queries, entries, scales and table must be contiguous")
