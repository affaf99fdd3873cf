"""A decode step of the native module by the kernel, against the same step by torch's attention."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernel needs Triton: make test-kernels")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and Triton's interpreter is not on: make test-kernels", allow_module_level=True)

from transformers import DynamicCache

from care.modeling import attention, kernel_choice
from care.modeling.attention import LatentAttentionModule
from care.modeling.kernel_choice import kernel_fits
from care.modeling.shape import LatentShape
from tolerances import assert_close

CUDA = torch.cuda.is_available()
DEVICE, DTYPE, TOLERANCE = (
    ("cuda", torch.bfloat16, "bf16 attention") if CUDA else ("cpu", torch.float32, "fp32 attention")
)
SHAPE = LatentShape(
    mode="absorbed", hidden_size=64, num_heads=6, num_kv_heads=2, head_dim=16, nope_dim=12, v_head_dim=16, rope_dim=8,
    kv_lora_rank=40, key_rank=40, value_rank=40, frequencies=(1.0, 0.3, 0.1, 0.03), scale=0.25,
)  # fmt: skip
SHAPES = [SHAPE, replace(SHAPE, kv_lora_rank=37, key_rank=37, value_rank=37)]
"""Entries whose rows are multiples of 16 bytes, and others."""


def steps(shape: LatentShape) -> Tensor:
    """Outputs of a prompt of 70 tokens and of two tokens after it, in a batch of 2."""
    torch.manual_seed(0)
    module = LatentAttentionModule(shape, 0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    module, cache = module.to(DEVICE, DTYPE), DynamicCache()
    hidden = torch.randn(2, 72, shape.hidden_size).to(DEVICE, DTYPE)
    with torch.no_grad():
        parts = [
            module(
                x,
                cache=cache,
                position_ids=torch.tensor([[start]], device=DEVICE) + torch.arange(x.shape[1], device=DEVICE),
            )[0]
            for start, x in ((0, hidden[:, :70]), (70, hidden[:, 70:71]), (71, hidden[:, 71:]))
        ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"rank {shape.kv_lora_rank}")
def test_a_decode_step(shape: LatentShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called for decode steps and for them alone, it gives what torch gives."""
    calls: list[int] = []
    decode = LatentAttentionModule._decode

    def counted(self: LatentAttentionModule, *args: Tensor) -> Tensor:
        calls.append(args[0].shape[2])
        return decode(self, *args)

    monkeypatch.setattr(LatentAttentionModule, "_decode", counted)
    monkeypatch.setattr(attention, "kernel_fits", lambda *_: False)
    expected = steps(shape)
    assert not calls
    monkeypatch.setattr(kernel_choice, "kernel_is_faster", lambda *_: True)
    monkeypatch.setattr(attention, "kernel_fits", kernel_fits if CUDA else lambda *_: True)
    found = steps(shape)
    assert calls == [1, 1]
    assert_close(found, expected, TOLERANCE)
