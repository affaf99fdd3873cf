"""Balanced factors are the same model, and every direction of a latent has the same scale in both factors."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from care.healing.parametrization import (
    LEAST_RMS,
    balanced,
    deepseek_layers,
    native_layers,
    native_segments,
    open_native,
    relative_rate,
    rms,
)
from care.healing.students import checkpoint_tensors, open_student, rates
from care.modeling.loading import Location, load_model
from tiny import Case, TinyModels, random_tokens
from tolerances import assert_close, assert_numbers

NATIVE = [
    Case("llama-gqa", "care-mla", 0.5, "absorbed", "native"),
    Case("llama-gqa", "palu", 0.5, "rebuild", "native"),
    Case("llama-bias", "care-mla", 0.5, "absorbed", "native"),
    Case("qwen3-norm", "care-mla", 0.5, "absorbed", "native"),
    Case("llama-gqa", "care-mla", 1.0, "absorbed", "native"),
]
"""Joint and separate latents, biases, features, and a layer whose keys are all rotary."""
DEEPSEEK = Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek")


def logits_of(model: Any) -> Tensor:
    """Of one window."""
    with torch.inference_mode():
        return model(input_ids=random_tokens(24), use_cache=False).logits


@pytest.mark.parametrize("shape", [(5, 20, 9), (8, 6, 30), (6, 30, 4)], ids=str)
def test_balanced_is_the_same_product(shape: tuple[int, int, int]) -> None:
    """Also of a latent wider than what it is made of, or than what is made of it."""
    R, X, E = shape
    down, up = torch.randn(R, X) * torch.logspace(0, -9, R)[:, None], torch.randn(E, R)
    new_down, new_up = balanced(down, up)
    assert_close(new_up @ new_down, up.double() @ down.double(), "fp64")
    assert_close(new_down @ new_down.T, new_up.T @ new_up, "fp64")


@pytest.mark.parametrize("case", NATIVE, ids=str)
def test_a_native_model_is_the_same(tiny: TinyModels, case: Case) -> None:
    model = copy.deepcopy(tiny.model(case))
    open_native(model)
    assert_close(logits_of(model), logits_of(tiny.model(case)), "fp32 logits")
    for (_, new), (_, old) in zip(native_layers(model), native_layers(tiny.model(case)), strict=True):
        R = new.shape.kv_lora_rank
        assert not torch.allclose(new.kv_a_proj_with_mqa.weight[:R], old.kv_a_proj_with_mqa.weight[:R])
        assert_close(new.kv_a_proj_with_mqa.weight[R:], old.kv_a_proj_with_mqa.weight[R:], "exact")


@pytest.mark.parametrize("case", NATIVE[:1], ids=str)
def test_the_latent_has_the_scale_of_the_rotary_key(tiny: TinyModels, case: Case) -> None:
    model = copy.deepcopy(tiny.model(case))
    open_native(model)
    for _, module in native_layers(model):
        latent, rope = module.kv_a_proj_with_mqa.weight.split([module.shape.kv_lora_rank, module.shape.rope_dim])
        assert_numbers(rms(latent), rms(rope), "fp32 table")
        (segment,) = native_segments(module)
        down = module.kv_a_proj_with_mqa.weight[segment.first : segment.last]
        up = torch.cat([linear.weight[:, columns] for linear, columns in segment.readers])
        ratio = up.norm(dim=0) / down.norm(dim=1)
        assert_close(ratio, ratio.mean().expand_as(ratio), "fp32 gradients")


@pytest.mark.parametrize("case", [*NATIVE, DEEPSEEK], ids=str)
def test_untrained_it_goes_back_into_its_format(tiny: TinyModels, case: Case, tmp_path: Any) -> None:
    """Opened, closed and written without training, a checkpoint gives what it gave, in the same names and shapes."""
    student = open_student(Location(tiny.converted(case)), "attention", 4, 0, {})
    healed = checkpoint_tensors(student, "attention")
    shards = sorted(tiny.converted(case).glob("*.safetensors"))
    stored = {name: t for shard in shards for name, t in load_file(shard).items() if ".self_attn." in name}
    assert {n: t.shape for n, t in healed.items()} == {n: t.shape for n, t in stored.items()}
    model = load_model(Location(tiny.converted(case)), dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in healed.items()}, strict=False)
    kind = "deepseek logits" if case == DEEPSEEK else "fp32 logits"
    assert_close(logits_of(model), logits_of(tiny.model(case)), kind)


def test_the_deepseek_view_has_ordinary_sizes(tiny: TinyModels) -> None:
    """In the checkpoint the latent is scaled to the size of rounding errors; what is trained is not."""
    student = open_student(Location(tiny.converted(DEEPSEEK)), "attention", 4, 0, {})
    assert_close(logits_of(student), logits_of(tiny.model(DEEPSEEK)), "deepseek logits")
    for _, module in deepseek_layers(student):
        R = module.kv_lora_rank
        latent, rope = module.kv_a_proj_with_mqa.weight[:R], module.kv_a_proj_with_mqa.weight[R:]
        assert_numbers(rms(latent), rms(rope), "fp32 table")


def test_a_rate_is_relative(tiny: TinyModels) -> None:
    student = open_student(Location(tiny.converted(NATIVE[0])), "attention", 4, 0, {})
    found = rates(student)
    assert {name for name, p in student.named_parameters() if p.requires_grad} == found.keys()
    assert all(".self_attn." in name for name in found)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert_numbers(found[name], rms(student.get_parameter(name)), "exact")
    assert relative_rate(torch.zeros(3)) == LEAST_RMS


def test_all_weights_are_trained_on_demand(tiny: TinyModels) -> None:
    student = open_student(Location(tiny.converted(NATIVE[0])), "all", 4, 0, {})
    assert all(p.requires_grad for p in student.parameters())
    assert "model.layers.0.mlp.up_proj.weight" in checkpoint_tensors(student, "all")


def test_experts_are_written_one_by_one(tiny: TinyModels) -> None:
    """In memory a mixture's experts are one tensor, in files they are not."""
    case = Case("mixtral", "care-mla", 0.5, "absorbed", "native")
    healed = checkpoint_tensors(open_student(Location(tiny.converted(case)), "all", 4, 0, {}), "all")
    shards = sorted(tiny.converted(case).glob("*.safetensors"))
    stored = {name: t for shard in shards for name, t in load_file(shard).items()}
    assert {n: t.shape for n, t in healed.items()} == {n: t.shape for n, t in stored.items()}
    changed = {name for name in stored if ".self_attn." not in name}
    for name in changed:
        assert_close(healed[name], stored[name], "exact")
