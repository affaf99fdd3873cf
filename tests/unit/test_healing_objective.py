"""The chunked objective against the formula written out on all logits at once."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from care.healing import objective
from care.healing.objective import Distiller, Head, Objective, state_distance
from tiny import Case, TinyModels, random_tokens
from tolerances import assert_close

OBJECTIVES = [
    Objective(),
    Objective(beta=3.0, temperature=2.0),
    Objective(beta=0.0),
    Objective(temperature=0.5, ce=False),
]


def written_out(student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, asked: Objective) -> Tensor:
    """CE + beta tau^2 KL, means over positions, from the definitions."""
    p = (teacher_NV / asked.temperature).softmax(-1)
    q = (student_NV / asked.temperature).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    ce = -student_NV.softmax(-1)[torch.arange(len(labels_N)), labels_N].log().mean()
    return torch.stack(((ce if asked.ce else 0 * ce) + asked.beta * asked.temperature**2 * kl, ce, kl))


def perturbed(teacher: Any) -> Any:
    """The same model with noise on its weights."""
    student = type(teacher)(teacher.config)
    student.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in teacher.state_dict().items()})
    student.tie_weights()
    return student


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha", "gemma2-softcap"])
@pytest.mark.parametrize("asked", OBJECTIVES, ids=str)
def test_terms_and_gradients(tiny: TinyModels, name: str, asked: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied head, one of its own, and one with a soft cap; chunks that do not divide the positions."""
    monkeypatch.setattr(objective, "CHUNK", 7)
    teacher, tokens = tiny.source_model(name), random_tokens(12, batch=2)
    student = perturbed(teacher)
    terms = Distiller(student, teacher, asked)(tokens)
    terms[0].backward()
    found = {key: p.grad.clone() for key, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    logits, wanted = (model(input_ids=tokens).logits[:, :-1].flatten(0, 1) for model in (student, teacher))
    expected = written_out(logits, wanted.detach(), tokens[:, 1:].flatten(), asked)
    expected[0].backward()
    assert_close(terms, expected, "fp32 logits")
    assert found.keys() == dict(student.named_parameters()).keys()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None
        assert_close(found[key], parameter.grad, "fp32 gradients")


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-softcap"])
def test_hidden_states_are_compared(tiny: TinyModels, name: str) -> None:
    """What each layer but the last passes on, token by token; the other terms are what they are without."""
    teacher, tokens = tiny.source_model(name), random_tokens(12, batch=2)
    student = perturbed(teacher)
    plain = Distiller(student, teacher, Objective())(tokens)
    terms = Distiller(student, teacher, Objective(hidden=3.0))(tokens)
    (terms - plain)[0].backward()
    found = {key: p.grad.clone() for key, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    of_student, of_teacher = (
        model(input_ids=tokens, output_hidden_states=True).hidden_states for model in (student, teacher)
    )
    layers = teacher.config.num_hidden_layers
    far = [
        ((of_student[n][b, t] - of_teacher[n][b, t].detach()).norm() / of_teacher[n][b, t].norm().detach()) ** 2
        for n in range(1, layers) for b in range(2) for t in range(12)
    ]  # fmt: skip
    expected = 3.0 * torch.stack(far).mean()
    expected.backward()
    assert_close((terms - plain)[0], expected, "fp32 logits")
    assert torch.equal(terms[1:], plain[1:])
    for key, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert_close(found[key], parameter.grad, "fp32 gradients")


def test_a_vocabulary_that_the_teacher_pads() -> None:
    """Rows beyond the smaller vocabulary are padding and count for nothing."""
    head = Head(torch.randn(12, 4), None)
    assert head.logits(torch.randn(3, 4), head.weight_VD, 10).shape == (3, 10)


@pytest.mark.parametrize(
    "case",
    [
        Case("llama-gqa", "care-mla", 0.5, "absorbed", "native"),
        Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek"),
        Case("llama-gqa", "palu", 0.5, "rebuild", "native"),
        Case("gemma2-softcap", "care-mla", 0.5, "absorbed", "native"),
    ],
    ids=str,
)
def test_an_empty_cache_changes_nothing(tiny: TinyModels, case: Case) -> None:
    """Passes that are recorded have one, beyond a sliding window too: values and gradients are those without."""
    student, teacher, tokens = tiny.model(case), tiny.source_model(case.source), random_tokens(24, batch=2)
    found = list[Tensor]()
    for cached in (False, True):
        models = copy.deepcopy(student), copy.deepcopy(teacher)
        distiller = Distiller(*models, Objective(hidden=1.0), cached=cached)
        terms = distiller(tokens)
        terms[0].backward()
        found.append(
            torch.cat([terms.detach(), *(p.grad.flatten() for p in distiller.parameters() if p.grad is not None)])
        )
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own imports
def test_what_is_fused(tiny: TinyModels) -> None:
    """All that a layer has beside attention, of both models, and the terms."""
    student, teacher, asked = (tiny.source_model("llama-gqa"), tiny.source_model("llama-mha"), Objective())
    distiller = Distiller(copy.deepcopy(student), copy.deepcopy(teacher), asked)
    distiller.fuse()
    for model in (distiller.student, distiller.teacher):
        for layer in model.get_submodule("model.layers").children():
            fused = {name for name, child in layer.named_children() if child._compiled_call_impl is not None}  # pyright: ignore[reportPrivateUsage]
            assert fused == {"mlp", "input_layernorm", "post_attention_layernorm"}
    assert distiller.terms != asked.terms
    assert distiller.distance is not state_distance


def test_the_teacher_is_frozen() -> None:
    distiller = Distiller(nn.Linear(2, 2), nn.Linear(2, 2), Objective())
    assert {name for name, p in distiller.named_parameters() if p.requires_grad} == {"student.weight", "student.bias"}
