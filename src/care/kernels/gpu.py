"""What kernels ask of a GPU, once for each."""

from functools import cache

import torch

INTERPRETED_MEMORY = 2**20
"""Shared memory in Triton's interpreter, which has no bound."""


@cache
def cores(device: torch.device) -> int:
    """Multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may share."""
    if device.type == "cpu":
        return INTERPRETED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def capability(device: torch.device) -> int:
    """The major compute capability."""
    return torch.cuda.get_device_capability(device)[0]
