"""Running moments against activations that are all kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

from care.calibration.moments import BATCH_TOKENS, MomentAccumulator, collect_moments
from care.errors import BadInput
from tiny import TINY, TinyModels, random_inputs, random_tokens
from tolerances import assert_close

BATCH, LENGTH = 5, 16


def attention_inputs(model: Any, tokens_BT: Tensor) -> list[Tensor]:
    """Inputs of every attention layer: the layer's hidden states, normalized by its first norm."""
    with torch.inference_mode():
        states = model(input_ids=tokens_BT, use_cache=False, output_hidden_states=True).hidden_states
        layers = model.model.layers
        return [layer.input_layernorm(x).flatten(0, 1) for layer, x in zip(layers, states[:-1], strict=True)]


@pytest.mark.parametrize("name", list(TINY))
def test_moments_are_those_of_stacked_activations(tiny: TinyModels, name: str) -> None:
    tokens, source = random_tokens(LENGTH, BATCH), tiny.source(name)
    stats = collect_moments(source.model, source.attention_paths, tokens)
    for layer, x_TD in zip(stats, attention_inputs(tiny.source_model(name), tokens), strict=True):
        x_TD = x_TD.double()
        assert layer.num_tokens == BATCH * LENGTH
        assert_close(layer.input_moment_DD, x_TD.T @ x_TD / len(x_TD), "fp32 moments")
        assert_close(layer.input_magnitude_D, x_TD.abs().mean(0), "fp32 moments")
        assert layer.input_moment_DD.dtype == layer.input_magnitude_D.dtype == torch.float64


def test_batches_do_not_matter(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, source = random_tokens(LENGTH, BATCH), tiny.source("llama-gqa")
    whole = collect_moments(source.model, source.attention_paths, tokens)
    assert BATCH_TOKENS >= BATCH * LENGTH
    monkeypatch.setattr("care.calibration.moments.BATCH_TOKENS", 2 * LENGTH)
    parts = collect_moments(source.model, source.attention_paths, tokens)
    for one, other in zip(whole, parts, strict=True):
        assert_close(one.input_moment_DD, other.input_moment_DD, "fp32 moments")
        assert one.num_tokens == other.num_tokens


def test_no_hook_stays_behind(tiny: TinyModels) -> None:
    source = tiny.source("llama-gqa")
    collect_moments(source.model, source.attention_paths, random_tokens(4))
    with pytest.raises(IndexError):
        collect_moments(source.model, source.attention_paths, random_tokens(4) + 10_000)
    assert not any(source.model.get_submodule(path)._forward_pre_hooks for path in source.attention_paths)


def test_accumulator_adds_up() -> None:
    x_TD = random_inputs(50, 6).float()
    accumulator = MomentAccumulator(6)
    for part in x_TD.split(7):
        accumulator.add(part[None])
    stats = accumulator.stats(0)
    assert stats.num_tokens == 50
    assert_close(stats.input_moment_DD, x_TD.double().T @ x_TD.double() / 50, "fp32 moments")
    assert_close(stats.input_magnitude_D, x_TD.double().abs().mean(0), "fp32 moments")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_layer(value: float) -> None:
    accumulator = MomentAccumulator(3)
    accumulator.add(torch.tensor([[1.0, value, 0.0]]))
    with pytest.raises(BadInput, match="activations of layer 7 are NaN or Inf"):
        accumulator.stats(7)
