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
from modules import assert_spec_is_the_models
from tiny import SLIDING_WINDOW, TINY, TinyModels, attention_passes, random_tokens
from tolerances import assert_close

EVERY = pytest.mark.parametrize("name", list(TINY))
HIDDEN = 20


def test_every_architecture_has_a_tiny_model() -> None:
    assert {options["model_type"] for options in TINY.values()} == set(ARCHITECTURES)


def test_every_architecture_is_listed_under_its_model_type() -> None:
    assert all(name == architecture.model_type for name, architecture in ARCHITECTURES.items())


@EVERY
def test_spec_is_the_models(tiny: TinyModels, name: str) -> None:
    model = tiny.source_model(name)
    assert_spec_is_the_models(tiny.source(name).spec, model, model.model.rotary_emb)


def test_layers_that_differ_are_covered(tiny: TinyModels) -> None:
    """The test above would pass for models whose layers are all alike."""
    specs = {
        name: tiny.source(name).spec for name in ("gemma2-softcap", "gemma3-local", "qwen2-window", "smollm3-nope")
    }
    assert all(specs[name].windows[1] != specs[name].windows[0] for name in list(specs)[:3])
    assert specs["smollm3-nope"].rope_frequencies[1] == (0.0,) * 4
    assert len(set(specs["gemma3-local"].rope_frequencies)) == 2


@EVERY
def test_every_tensor_is_claimed_once(tiny: TinyModels, name: str) -> None:
    """Converted, carried over and dropped tensors are a partition of the checkpoint."""
    source = tiny.source(name)
    architecture, spec = source.architecture, source.spec
    converted = [n for i in range(spec.num_layers) for n in architecture.attention_shapes(i, spec)]
    carried = [n for names in architecture.untouched(source.reader, spec).values() for n in names]
    dropped = [n for n in source.reader.names() if architecture.drops(n)]
    assert Counter(converted + carried + dropped) == Counter(source.reader.names())
    parts = {n.rpartition(".")[0].partition("self_attn.")[2] for n in converted}
    model = tiny.source_model(name).model
    assert parts == {part for part, module in model.layers[0].self_attn.named_modules() if module.state_dict() and part}


@EVERY
def test_tensors_are_carried_with_their_own_layer(tiny: TinyModels, name: str) -> None:
    source = tiny.source(name)
    for index, names in source.architecture.untouched(source.reader, source.spec).items():
        prefix = "" if index is None else source.architecture.layer.format(i=index) + "."
        assert all(n.startswith(prefix) for n in names)
        assert names


@EVERY
def test_reference_attention_is_transformers_attention(tiny: TinyModels, name: str) -> None:
    """Every layer on what it sees in the model, beyond the sliding window."""
    source = tiny.source(name)
    for index, passed in enumerate(attention_passes(tiny.source_model(name), random_tokens(3 * SLIDING_WINDOW))):
        assert_close(source_attention(source.attention(index), passed.x_BTD[0]), passed.y_BTD[0], "fp32 attention")


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
        ({**state, source.architecture.attention.format(i=1) + ".sinks": torch.zeros(1)}, UnsupportedModel, "no place"),
        ({**state, source.architecture.layer.format(i=3) + ".x": torch.zeros(1)}, UnsupportedModel, "has no place"),
    ]
    for changed, error, words in changes:
        with pytest.raises(error, match=words):
            source.architecture.check_tensors(StateReader(changed), source.spec, expected)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_configs_that_cannot_be_converted_are_refused(name: str) -> None:
    architecture = ARCHITECTURES[name]
    config: dict[str, Any] = {
        "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": HIDDEN, "num_hidden_layers": 1,
        "head_dim": None, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    assert architecture.spec(config).head_dim == HIDDEN // 2
    for key in architecture.refused:
        with pytest.raises(UnsupportedModel, match=key):
            architecture.spec({**config, key: True})
    with pytest.raises(BadInput, match="num_hidden_layers"):
        architecture.spec({key: value for key, value in config.items() if key != "num_hidden_layers"})
