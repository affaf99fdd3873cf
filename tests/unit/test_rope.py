"""Frequencies and rotations against transformers'."""

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from care.errors import UnsupportedModel
from care.rope import (
    inverse_frequencies,
    pair_dims,
    rope_frequencies,
    rope_settings,
    rotate_half_split,
    rotate_interleaved,
    rotation,
)
from tolerances import assert_close

HEAD_DIM = 64

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "other base": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3.2": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def llama_config(settings: dict[str, Any]) -> Any:
    """A config of transformers with these rope settings."""
    return transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, rope_parameters=dict(settings), max_position_embeddings=131072
    )


@pytest.mark.parametrize("name", list(SETTINGS))
def test_frequencies_are_transformers_own(name: str) -> None:
    config = llama_config(SETTINGS[name])
    ours = torch.tensor(rope_frequencies(config.to_dict(), HEAD_DIM))
    assert_close(ours, LlamaRotaryEmbedding(config).inv_freq, "fp32 table")
    kind = SETTINGS[name]["rope_type"]
    if kind in ROPE_INIT_FUNCTIONS:
        table, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        assert_close(ours, table, "fp32 table")
        assert attention_factor == 1.0


@pytest.mark.parametrize("name", ["linear", "llama3"])
def test_scaling_changes_the_table(name: str) -> None:
    """The test above has something to see."""
    plain = rope_frequencies({"rope_theta": SETTINGS[name]["rope_theta"]}, HEAD_DIM)
    assert rope_frequencies({"rope_parameters": SETTINGS[name]}, HEAD_DIM) != plain


def test_older_keys_mean_the_same() -> None:
    new = rope_frequencies({"rope_parameters": SETTINGS["llama3"]}, HEAD_DIM)
    scaling = {key: value for key, value in SETTINGS["llama3"].items() if key != "rope_theta"}
    assert rope_frequencies({"rope_theta": 500000.0, "rope_scaling": scaling}, HEAD_DIM) == new
    scaling["type"] = scaling.pop("rope_type")
    assert rope_frequencies({"rope_theta": 500000.0, "rope_scaling": scaling}, HEAD_DIM) == new


def test_absent_settings_are_the_defaults() -> None:
    absent = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    assert rope_settings({}) == absent
    assert rope_settings({"rope_scaling": None, "rope_theta": 7.0}) == {**absent, "rope_theta": 7.0}


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "made-up"])
def test_moving_tables_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"rope type '{kind}'.*supported: default, linear, llama3"):
        rope_frequencies({"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}}, HEAD_DIM)


def test_partial_rotation_is_refused() -> None:
    """In either place: Phi-4 mini has it beside the rope settings."""
    for config in ({"rope_parameters": {"partial_rotary_factor": 0.5}}, {"partial_rotary_factor": 0.5}):
        with pytest.raises(UnsupportedModel, match=r"partial_rotary_factor 0\.5: heads that rotate in part"):
            rope_frequencies(config, HEAD_DIM)


def test_half_split_rotation_is_llamas() -> None:
    x = torch.randn(1, 2, 9, HEAD_DIM)
    frequencies = inverse_frequencies(10000.0, HEAD_DIM)
    cos, sin = rotation(torch.arange(9), frequencies)
    theirs, _ = apply_rotary_pos_emb(x, x, torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None])
    assert_close(rotate_half_split(x, cos, sin), theirs, "fp32 attention")


def test_interleaved_rotation_is_deepseeks_up_to_order() -> None:
    """DeepSeek's kernel leaves the result half-split."""
    x = torch.randn(1, 2, 9, HEAD_DIM)
    cos, sin = rotation(torch.arange(9), inverse_frequencies(10000.0, HEAD_DIM))
    theirs, _ = apply_rotary_pos_emb_interleave(x, x, torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None])
    ours = rotate_interleaved(x, cos, sin)
    assert_close(torch.cat((ours[..., 0::2], ours[..., 1::2]), -1), theirs, "fp32 attention")


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    frequencies = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)
    positions, x = torch.arange(5), torch.randn(5, 6, dtype=torch.float64)
    turned = torch.view_as_complex(x.view(5, 3, 2)) * torch.exp(1j * positions[:, None] * frequencies)
    expected = torch.view_as_real(turned).flatten(1)
    assert_close(rotate_interleaved(x, *rotation(positions, frequencies)), expected, "fp64")


def test_pair_dims_take_half_split_to_interleaved() -> None:
    x, frequencies = torch.randn(5, 8, dtype=torch.float64), torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    angles = rotation(torch.arange(5), frequencies)
    order = pair_dims(torch.arange(4), 8)
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert_close(rotate_interleaved(x[:, order], *angles), rotate_half_split(x, *angles)[:, order], "fp64")
    assert pair_dims(torch.tensor([2]), 8).tolist() == [2, 6]
