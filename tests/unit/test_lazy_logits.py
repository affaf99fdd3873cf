"""Logits by positions: those of the model's own forward, and never more of them than asked for."""

import pytest
import torch

from care.evaluation import measure
from care.evaluation.quality import CHUNK
from care.modeling.lazy_logits import LazyLogits, lazy_logits
from tiny import TINY, Case, TinyModels, random_tokens
from tolerances import assert_close, assert_numbers


def check(model: torch.nn.Module) -> None:
    tokens = random_tokens(20)[:1]
    with torch.inference_mode():
        whole_TV = model(input_ids=tokens, use_cache=False).logits[0]
        lazy = lazy_logits(model, tokens)
        assert isinstance(lazy, LazyLogits)
        for part in (slice(3, 9), slice(0, 20), slice(19, 20), slice(15, 400)):
            assert_close(lazy[0, part], whole_TV[part], "fp32 logits")
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits[0], whole_TV)


@pytest.mark.parametrize("name", list(TINY))
def test_they_are_those_of_every_source(tiny: TinyModels, name: str) -> None:
    check(tiny.source_model(name))


@pytest.mark.parametrize("format_", ["native", "deepseek"])
def test_they_are_those_of_converted_models(tiny: TinyModels, format_: str) -> None:
    check(tiny.model(Case("llama-gqa", "transmla", 0.5, "absorbed", format_)))


def test_a_forward_that_a_hook_has_set_stays(tiny: TinyModels) -> None:
    """As accelerate sets one where layers lie on several devices."""
    model = tiny.source_model("llama-gqa")
    body, calls = model.base_model, []
    own = body.forward

    def hooked(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return own(*args, **kwargs)

    body.forward = hooked
    try:
        check(model)
        assert body.forward is hooked
        assert len(calls) == 3
    finally:
        del body.forward


def test_measuring_holds_few_positions_at_a_time(tiny: TinyModels) -> None:
    model = tiny.source_model("llama-gqa")
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.shape[1]))
    windows = random_tokens(CHUNK + 45, batch=2)
    try:
        found = measure({"a": lambda x: lazy_logits(model, x)}, windows)["a"]
    finally:
        hook.remove()
    assert seen == [CHUNK, 44] * 2
    assert found.predictions == 2 * (CHUNK + 44)
    whole = measure({"a": lambda x: model(input_ids=x, use_cache=False).logits}, windows)["a"]
    assert_numbers(found.nll, whole.nll, "fp32 nats")
