"""Running moments against activations that are all kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

from care.calibration import MomentAccumulator
from care.calibration.streams import BATCH_TOKENS
from care.carried import PLAIN
from care.errors import BadInput
from tiny import TINY, TinyModels, attention_passes, collected, random_inputs, random_tokens
from tolerances import assert_close

BATCH, LENGTH = 5, 16


def features_of(model: Any, tokens_BT: Tensor) -> list[Tensor]:
    """Each layer's input, after the keys that its own norm gives and before a 1 if its values have a bias: (T, X)."""
    keys: list[Tensor] = []
    attentions = [layer.self_attn for layer in model.model.layers]
    hooks = [
        attention.k_norm.register_forward_hook(lambda _m, _a, keys_of_layer: keys.append(keys_of_layer))
        for attention in attentions if hasattr(attention, "k_norm")
    ]  # fmt: skip
    inputs = [passed.x_BTD for passed in attention_passes(model, tokens_BT)]
    for hook in hooks:
        hook.remove()
    features = []
    for index, (attention, x_BTD) in enumerate(zip(attentions, inputs, strict=True)):
        parts = [x_BTD]
        if keys:
            heads = keys[index] if keys[index].shape[1] == tokens_BT.shape[1] else keys[index].transpose(1, 2)
            parts.insert(0, heads.reshape(*x_BTD.shape[:2], -1))
        if getattr(getattr(attention, "v_proj", None), "bias", None) is not None:
            parts.append(torch.ones(*x_BTD.shape[:2], 1))
        features.append(torch.cat(parts, -1).flatten(0, 1))
    return features


@pytest.mark.parametrize("name", list(TINY))
def test_moments_are_those_of_stacked_features(tiny: TinyModels, name: str) -> None:
    tokens, source = random_tokens(LENGTH, BATCH), tiny.source(name)
    stats = collected(source.observed, tokens)
    for layer, phi_TX in zip(stats, features_of(tiny.source_model(name), tokens), strict=True):
        phi_TX = phi_TX.double()
        assert layer.num_tokens == BATCH * LENGTH
        assert_close(layer.input_moment_XX, phi_TX.T @ phi_TX / len(phi_TX), "fp32 moments")
        assert_close(layer.input_magnitude_X, phi_TX.abs().mean(0), "fp32 moments")
        assert layer.input_moment_XX.dtype == layer.input_magnitude_X.dtype == torch.float64


def test_batches_do_not_matter(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, source = random_tokens(LENGTH, BATCH), tiny.source("llama-gqa")
    whole = collected(source.observed, tokens)
    assert BATCH_TOKENS >= BATCH * LENGTH
    monkeypatch.setattr("care.calibration.streams.BATCH_TOKENS", 2 * LENGTH)
    parts = collected(source.observed, tokens)
    for one, other in zip(whole, parts, strict=True):
        assert_close(one.input_moment_XX, other.input_moment_XX, "fp32 moments")
        assert one.num_tokens == other.num_tokens


def test_no_hook_stays_behind(tiny: TinyModels) -> None:
    source, model = tiny.source("llama-gqa"), tiny.source("llama-gqa").layers.model
    collected(source.observed, random_tokens(4))
    with pytest.raises(IndexError):
        collected(source.observed, random_tokens(4) + 10_000)
    assert not any(model.get_submodule(path)._forward_pre_hooks for path in source.attention_paths)


def test_accumulator_adds_up() -> None:
    x_TD = random_inputs(50, 6).float()
    accumulator = MomentAccumulator(6, PLAIN)
    for part in x_TD.split(7):
        accumulator.add(part[None])
    stats = accumulator.stats(0)
    assert stats.num_tokens == 50
    assert_close(stats.input_moment_XX, x_TD.double().T @ x_TD.double() / 50, "fp32 moments")
    assert_close(stats.input_magnitude_X, x_TD.double().abs().mean(0), "fp32 moments")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_layer(value: float) -> None:
    accumulator = MomentAccumulator(3, PLAIN)
    accumulator.add(torch.tensor([[1.0, value, 0.0]]))
    with pytest.raises(BadInput, match="activations of layer 7 are NaN or Inf"):
        accumulator.stats(7)
