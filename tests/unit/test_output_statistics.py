"""Gradient moments and attention distances, against autograd and transformers' own attention."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from care.calibration import DecoderLayers, WholeModel
from care.errors import BadInput
from care.rope import rotate_half_split, rotation
from tiny import TinyModels, collected, random_tokens
from tolerances import assert_close

SEED = 11


FAMILIES = [
    "llama-gqa", "llama3-rope", "mistral-window", "llama-bias", "qwen3-norm", "qwen3-moe", "gemma2-softcap",
    "gemma3-local", "phi3-fused", "olmo2-norm", "smollm3-nope",
]  # fmt: skip


def eager_model(tiny: TinyModels, name: str) -> Any:
    """The source by transformers alone, with attention written out."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(tiny.directory(name), attn_implementation="eager").eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_moments_are_autograds(tiny: TinyModels, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draw of labels, and gradients at what transformers' attention is given, rotated back.

    Over two batches, in the order of which labels are drawn.
    """
    monkeypatch.setattr("care.calibration.streams.BATCH_TOKENS", 40)
    source, tokens = tiny.source(name), random_tokens(20, batch=3)
    model = eager_model(tiny, name)
    layers = DecoderLayers(model, source.layer_paths, WholeModel())
    found = collected(replace(source.observed, layers=layers), tokens, seed=SEED)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    home: Any = sys.modules[type(model.model.layers[0].self_attn).__module__]
    eager = home.eager_attention_forward

    def watched(module: Any, query: Any, key: Any, value: Any, *arguments: Any, **options: Any) -> Any:
        given.append((key, value))
        return eager(module, query, key, value, *arguments, **options)

    monkeypatch.setattr(home, "eager_attention_forward", watched)
    logp_NV = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.multinomial(part_NV.detach().exp(), 1, generator=generator) for part_NV in logp_NV.split(40)]
    labels = torch.cat(drawn)
    flat = [tensor for pair in given for tensor in pair]
    gradients = torch.autograd.grad(logp_NV.gather(1, labels).sum(), flat)
    for layer, stats in enumerate(found):
        frequencies = torch.tensor(source.spec.rope_frequencies[layer])
        back = rotation(-torch.arange(20), frequencies)
        parts = (rotate_half_split(gradients[2 * layer], *back), gradients[2 * layer + 1])
        g_TE = torch.cat([part.transpose(1, 2).flatten(2).flatten(0, 1) for part in parts], 1).double()
        assert stats.gradient_moment_EE is not None
        assert_close(stats.gradient_moment_EE, g_TE.T @ g_TE / tokens.numel(), "fp32 gradients")


def test_gradients_on_the_first_windows_are_those_of_the_first_windows_alone(tiny: TinyModels) -> None:
    """Input moments are of all windows all the same."""
    observed, tokens = tiny.source("llama-gqa").observed, random_tokens(20, batch=4)
    few, alone, inputs = (
        collected(observed, tokens, seed=SEED, gradient_windows=2),
        collected(observed, tokens[:2], seed=SEED),
        collected(observed, tokens),
    )
    for mixed, gradients, moments in zip(few, alone, inputs, strict=True):
        assert mixed.gradient_moment_EE is not None
        assert gradients.gradient_moment_EE is not None
        assert_close(mixed.gradient_moment_EE, gradients.gradient_moment_EE, "fp32 gradients")
        assert torch.equal(mixed.input_moment_XX, moments.input_moment_XX)


def test_weights_get_no_gradients_and_stay_trainable(tiny: TinyModels) -> None:
    """Those of a model that others use too."""
    source = tiny.source("llama-gqa")
    layers = DecoderLayers(source.model, source.layer_paths, WholeModel())
    collected(replace(source.observed, layers=layers), random_tokens(8), seed=SEED)
    assert all(p.grad is None and p.requires_grad for p in source.model.parameters())


def test_gradients_that_are_not_finite_are_refused(tiny: TinyModels) -> None:
    source = tiny.source("llama-mha")
    layers = DecoderLayers(source.model, source.layer_paths, WholeModel())
    scale = source.model.model.layers[1].self_attn.v_proj.weight
    kept = scale.detach().clone()
    try:
        scale.data.fill_(float("nan"))
        with pytest.raises((BadInput, RuntimeError)):
            collected(replace(source.observed, layers=layers), random_tokens(8), seed=SEED)
    finally:
        scale.data.copy_(kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_distances_are_those_of_transformers_attention(tiny: TinyModels, name: str) -> None:
    source, tokens = tiny.source(name), random_tokens(24, batch=2)
    found = collected(source.observed, random_tokens(4), tokens)
    with torch.inference_mode():
        attentions = eager_model(tiny, name)(input_ids=tokens, output_attentions=True).attentions
    for stats, attention_BHTU in zip(found, attentions, strict=True):
        assert stats.attention_HT is not None
        expected_HT = torch.zeros(4, 24, dtype=torch.float64)
        for query in range(24):
            for key in range(1, query + 1):
                expected_HT[:, query - key] += attention_BHTU[:, :, query, key].double().sum(0)
        assert_close(stats.attention_HT, expected_HT / expected_HT.sum(1, keepdim=True), "fp32 attention")
