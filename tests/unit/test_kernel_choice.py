"""When a decode step is one for our kernel."""

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from care.modeling import kernel_choice
from care.modeling.kernel_choice import LARGE_CACHE, kernel_fits, kernel_is_faster
from care.modeling.shape import LatentShape

SHAPE = LatentShape(
    mode="absorbed", hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, nope_dim=16, v_head_dim=16, rope_dim=64,
    kv_lora_rank=512, key_rank=512, value_rank=512, frequencies=(1.0,) * 32, scale=0.25,
)  # fmt: skip


def entries(tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Entries without memory of their own."""
    return torch.zeros(1, dtype=dtype).expand(1, 1, tokens, width)


@pytest.mark.parametrize(
    ("rank", "rope_dim", "faster"),
    [(128, 64, False), (192, 64, False), (200, 64, True), (131, 56, True), (140, 52, True)],
)
def test_torch_has_fused_attention_for_narrow_even_widths(rank: int, rope_dim: int, faster: bool) -> None:
    shape = replace(SHAPE, rope_dim=rope_dim, kv_lora_rank=rank, key_rank=rank, value_rank=rank)
    assert kernel_is_faster(shape, entries(1000, rank + rope_dim)) == faster


def test_large_caches_are_worth_starting_it() -> None:
    shape = replace(SHAPE, rope_dim=64, kv_lora_rank=128, key_rank=128, value_rank=128)
    tokens = LARGE_CACHE // (2 * 192)
    assert not kernel_is_faster(shape, entries(tokens, 192))
    assert kernel_is_faster(shape, entries(tokens + 1, 192))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """As if there were a GPU that can run it, without gradients."""
    monkeypatch.setattr(kernel_choice, "gpu_can_decode", lambda *_: True)
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "changes",
    [{"softcap": 30.0}, {"key_rank": 500}, {"value_rank": 500}, {"key_rank": 300, "value_rank": 212}],
    ids=str,
)
def test_attention_of_another_kind_is_torchs(changes: dict[str, Any]) -> None:
    """The kernel caps no scores, and reads keys and values from one latent."""
    assert kernel_fits(SHAPE, entries(100, 576), None)
    assert not kernel_fits(replace(SHAPE, **changes), entries(100, 576), None)


@pytest.mark.usefixtures("gpu")
def test_masks_gradients_and_fp32_are_torchs() -> None:
    assert not kernel_fits(SHAPE, entries(100, 576), torch.ones(1, 1, 1, 100, dtype=torch.bool))
    assert not kernel_fits(SHAPE, entries(100, 576, torch.float32), None)
    with torch.enable_grad():
        assert not kernel_fits(SHAPE, entries(100, 576), None)


def test_there_is_no_kernel_on_a_cpu() -> None:
    with torch.no_grad():
        assert not kernel_fits(SHAPE, entries(100, 576), None)
