"""What every source architecture must do: claim each tensor once, and compute what transformers computes."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from care.architectures import ARCHITECTURES
from care.attention import source_attention
from care.checkpoint import StateReader
from care.errors import BadInput, UnsupportedModel
from care.modeling.loading import expected_shapes
from tiny import TINY, TinyModels
from tolerances import assert_close

EVERY = pytest.mark.parametrize("name", list(TINY))
HIDDEN = 20


def test_every_architecture_has_a_tiny_model() -> None:
    assert {options["model_type"] for options in TINY.values()} == set(ARCHITECTURES)


def test_every_architecture_is_listed_under_its_model_type() -> None:
    assert all(name == architecture.model_type for name, architecture in ARCHITECTURES.items())


@EVERY
def test_spec_is_the_models(tiny: TinyModels, name: str) -> None:
    spec, model = tiny.source(name).spec, tiny.source_model(name)
    attention = model.model.layers[0].self_attn
    assert spec.num_layers == len(model.model.layers)
    assert spec.hidden_size == attention.q_proj.in_features
    assert spec.head_dim == attention.head_dim
    assert spec.num_heads * spec.head_dim == attention.q_proj.out_features
    assert spec.kv_width == attention.k_proj.out_features
    assert spec.num_heads // spec.num_kv_heads == attention.num_key_value_groups
    assert_close(torch.tensor(spec.rope_frequencies), model.model.rotary_emb.inv_freq, "fp32 table")


@EVERY
def test_every_tensor_is_claimed_once(tiny: TinyModels, name: str) -> None:
    """Converted, carried over and dropped tensors are a partition of the checkpoint."""
    source = tiny.source(name)
    architecture, spec = source.architecture, source.spec
    converted = [n for i in range(spec.num_layers) for n in architecture.attention_shapes(i, spec)]
    carried = [n for names in architecture.untouched(source.reader, spec).values() for n in names]
    dropped = [n for n in source.reader.names() if architecture.drops(n)]
    assert Counter(converted + carried + dropped) == Counter(source.reader.names())
    assert set(source.reader.names()) == set(tiny.source_model(name).state_dict()) - tied_names(name)


def tied_names(name: str) -> set[str]:
    """What transformers leaves out of a checkpoint with a tied head."""
    return {"lm_head.weight"} if TINY[name]["tie_word_embeddings"] else set()


@EVERY
def test_tensors_are_carried_with_their_own_layer(tiny: TinyModels, name: str) -> None:
    source = tiny.source(name)
    for index, names in source.architecture.untouched(source.reader, source.spec).items():
        prefix = "" if index is None else source.architecture.layer.format(i=index) + "."
        assert all(n.startswith(prefix) for n in names)
        assert names


@EVERY
def test_reference_attention_is_transformers_attention(tiny: TinyModels, name: str) -> None:
    """Every layer on inputs shorter than a sliding window."""
    source, model = tiny.source(name), tiny.source_model(name)
    x_TD = torch.randn(7, source.spec.hidden_size)
    for index, layer in enumerate(model.model.layers):
        theirs = transformers_attention(model, layer.self_attn, x_TD)
        assert_close(source_attention(source.attention(index), x_TD), theirs, "fp32 attention")


def transformers_attention(model: Any, attention: Any, x_TD: Tensor) -> Tensor:
    """The module of a loaded model, causal, positions from 0."""
    angles = model.model.rotary_emb(x_TD[None], torch.arange(len(x_TD))[None])
    with torch.inference_mode():
        return attention(hidden_states=x_TD[None], position_embeddings=angles, attention_mask=None)[0][0]


def _state(name: str, tiny: TinyModels) -> dict[str, Tensor]:
    source = tiny.source(name)
    return {n: source.reader.read(n) for n in source.reader.names()}


@EVERY
def test_missing_misshapen_and_unknown_tensors_are_refused(tiny: TinyModels, name: str) -> None:
    source = tiny.source(name)
    key = next(iter(source.architecture.attention_shapes(1, source.spec)))
    state = _state(name, tiny)
    expected = expected_shapes(source.location)
    source.architecture.check_tensors(StateReader(state), source.spec, expected)
    changes: list[tuple[dict[str, Tensor], type[Exception], str]] = [
        ({n: t for n, t in state.items() if n != key}, BadInput, "is missing"),
        ({**state, key: state[key][:-1]}, BadInput, "config.json says"),
        ({**state, key.replace(".weight", ".bias"): torch.zeros(1)}, UnsupportedModel, "has no place"),
        ({**state, source.architecture.layer.format(i=3) + ".x": torch.zeros(1)}, UnsupportedModel, "has no place"),
    ]
    for changed, error, words in changes:
        with pytest.raises(error, match=words):
            source.architecture.check_tensors(StateReader(changed), source.spec, expected)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_biases_promised_by_the_config_are_refused(name: str) -> None:
    architecture = ARCHITECTURES[name]
    config = {"num_attention_heads": 2, "hidden_size": HIDDEN, "num_hidden_layers": 1}
    assert architecture.spec(config).head_dim == HIDDEN // 2
    for key in architecture.no_bias_keys:
        with pytest.raises(UnsupportedModel, match=key):
            architecture.spec({**config, key: True})
    with pytest.raises(BadInput, match="num_hidden_layers"):
        architecture.spec({key: value for key, value in config.items() if key != "num_hidden_layers"})
