"""Gradient moments and attention distances, against autograd and transformers' own attention."""

import pytest
import torch
import transformers

from care.calibration import collect_distances, collect_gradients
from care.errors import BadInput
from tiny import TinyModels, random_tokens
from tolerances import assert_close

SEED = 11


def test_gradient_moments_are_autograds(tiny: TinyModels) -> None:
    """The same draw of labels, and gradients by torch.autograd.grad at the projections' outputs."""
    source, tokens = tiny.source("llama-gqa"), random_tokens(20, batch=3)
    model = source.model
    found = collect_gradients(model, source.key_value_paths, tokens, seed=SEED)
    outputs: dict[str, torch.Tensor] = {}
    paths = [path for pair in source.key_value_paths for path in pair]
    hooks = [
        model.get_submodule(p).register_forward_hook(lambda _m, _a, out, p=p: outputs.__setitem__(p, out))
        for p in paths
    ]
    logp_NV = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    for hook in hooks:
        hook.remove()
    labels = torch.multinomial(logp_NV.detach().exp(), 1, generator=torch.Generator().manual_seed(SEED))
    gradients = torch.autograd.grad(logp_NV.gather(1, labels).sum(), [outputs[p] for p in paths])
    for layer, moment_EE in enumerate(found):
        g_TE = torch.cat([g.flatten(0, 1) for g in gradients[2 * layer : 2 * layer + 2]], 1).double()
        assert_close(moment_EE, g_TE.T @ g_TE / tokens.numel(), "fp32 gradients")


def test_weights_get_no_gradients_and_stay_trainable(tiny: TinyModels) -> None:
    source = tiny.source("llama-gqa")
    collect_gradients(source.model, source.key_value_paths, random_tokens(8), seed=SEED)
    assert all(p.grad is None and p.requires_grad for p in source.model.parameters())


def test_gradients_that_are_not_finite_are_refused(tiny: TinyModels) -> None:
    source = tiny.source("llama-mha")
    scale = source.model.model.layers[1].self_attn.v_proj.weight
    kept = scale.detach().clone()
    try:
        scale.data.fill_(float("nan"))
        with pytest.raises((BadInput, RuntimeError)):
            collect_gradients(source.model, source.key_value_paths, random_tokens(8), seed=SEED)
    finally:
        scale.data.copy_(kept)


@pytest.mark.parametrize("name", ["llama-gqa", "llama3-rope", "mistral"])
def test_distances_are_those_of_transformers_attention(tiny: TinyModels, name: str) -> None:
    source, tokens = tiny.source(name), random_tokens(24, batch=2)
    found = collect_distances(source.model, source.attention_paths, source.attention, tokens)
    eager = transformers.AutoModelForCausalLM.from_pretrained(tiny.directory(name), attn_implementation="eager").eval()
    with torch.inference_mode():
        attentions = eager(input_ids=tokens, output_attentions=True).attentions
    for share_HT, attention_BHTU in zip(found, attentions, strict=True):
        expected_HT = torch.zeros(4, 24, dtype=torch.float64)
        for query in range(24):
            for key in range(1, query + 1):
                expected_HT[:, query - key] += attention_BHTU[:, :, query, key].double().sum(0)
        assert_close(share_HT, expected_HT / expected_HT.sum(1, keepdim=True), "fp32 attention")
