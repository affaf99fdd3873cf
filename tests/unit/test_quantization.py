"""Quantized cache entries: how far off they may be, what they weigh, and a cache of them in a model."""

import pytest
import torch

from care.errors import BadInput
from care.evaluation.cache import live_layers
from care.kernels import QUANTIZERS
from care.modeling.cache import quantized_cache
from tiny import CACHE_KEY, Case, TinyModels, random_tokens
from tolerances import assert_close

PARTS = [(48, 144), (0, 33), (8, 0), (16, 65)]
STEPS = {"int8": 1 / 254, "fp8": 1 / 16, "int4": 1 / 14}
"""Half a step over a group's largest value, in fp8 over each value."""


@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_values_are_off_by_half_a_step(name: str, parts: tuple[int, int]) -> None:
    """Also where parts and groups are of very unlike size, all zero, or the smallest numbers."""
    quantizer = QUANTIZERS[name]
    values = torch.randn(3, 2, 50, sum(parts)) * torch.logspace(-3, 3, 50)[:, None]
    values[..., : parts[0]] *= 1000
    values[0, 0, 0] = 0
    values[0, 0, 1] = 1e-40
    found = quantizer.decode(quantizer.encode(values, parts), parts, torch.float32)
    start = 0
    for width in quantizer.groups(parts):
        group, error = values[..., start : start + width], (found - values)[..., start : start + width].abs()
        largest = group.abs().amax(-1, keepdim=True)
        # The scale is rounded up by at most 2^-7; fp8 numbers near zero are a fixed step apart.
        bound = largest * STEPS[name] if name != "fp8" else group.abs() * STEPS[name] + largest / 448 / 512
        assert (error <= 1.02 * bound + 1e-37).all()
        start += width


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_rows_are_as_long_as_counted(name: str) -> None:
    """Values, then a scale of two bytes for each group."""
    quantizer, parts = QUANTIZERS[name], (16, 65)
    rows = quantizer.encode(torch.randn(2, 7, 81), parts)
    groups = {"int8": [16, 65], "fp8": [16, 65], "int4": [16, 32, 32, 1]}[name]
    assert quantizer.groups(parts) == groups
    assert rows.shape == (2, 7, (41 if name == "int4" else 81) + 2 * len(groups))
    assert rows.dtype == torch.uint8
    again = quantizer.decode(rows[:, 2:5], parts, torch.float32)
    assert torch.equal(again, quantizer.decode(rows, parts, torch.float32)[:, 2:5])


CASES = [
    Case("llama-gqa", "best", 0.5),
    Case("llama-gqa", "best-rebuild", 0.5),
    Case("llama-gqa", "best-deepseek", 0.5),
]


@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_runs_on_a_quantized_cache(tiny: TinyModels, name: str, case: Case) -> None:
    """Token by token as in one go: what is cached is the same. And off by what its bits say, not more."""
    model, tokens = tiny.model(case), random_tokens(16)
    if case.recipe == "best-deepseek":
        model = tiny.source_model(case.source)
    with torch.inference_mode():
        exact = model(input_ids=tokens, use_cache=True)
        once = model(input_ids=tokens, **{CACHE_KEY: quantized_cache(model.config, QUANTIZERS[name])})
        cache = quantized_cache(model.config, QUANTIZERS[name])
        steps = [model(input_ids=tokens[:, t : t + 1], **{CACHE_KEY: cache}).logits for t in range(16)]
    assert_close(torch.cat(steps, 1), once.logits, "fp32 logits")
    difference = (once.logits - exact.logits).abs().max()
    assert 0 < difference < {"int8": 0.5, "fp8": 2.0, "int4": 6.0}[name]
    used, full = (
        sum(t.numel() * t.element_size() for layer in live_layers(output) for t in (layer.keys, layer.values))
        for output in (once, exact)
    )
    assert used < 0.6 * full
    assert cache.get_seq_length() == 16


def test_windows_are_refused(tiny: TinyModels) -> None:
    with pytest.raises(BadInput, match="no sliding windows"):
        quantized_cache(tiny.source_model("mistral-window").config, QUANTIZERS["int8"])
