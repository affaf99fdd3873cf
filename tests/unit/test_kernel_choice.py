"""When a decode step is one for our kernel: where torch has no fused attention for the width, and for large caches."""

import torch

from care.modeling.attention import LARGE_CACHE, kernel_is_faster


def entries(tokens: int, width: int) -> torch.Tensor:
    """Bf16 entries without memory of their own."""
    return torch.zeros(1, dtype=torch.bfloat16).expand(1, 1, tokens, width)


def test_torch_has_fused_attention_for_narrow_even_rows() -> None:
    assert not kernel_is_faster(entries(1000, 192))
    assert not kernel_is_faster(entries(1000, 256))
    assert kernel_is_faster(entries(1000, 264))
    assert kernel_is_faster(entries(1000, 187))


def test_large_caches_are_worth_starting_it() -> None:
    tokens = LARGE_CACHE // (2 * 192)
    assert not kernel_is_faster(entries(tokens, 192))
    assert kernel_is_faster(entries(tokens + 1, 192))
