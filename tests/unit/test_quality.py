"""Perplexity, KL and agreement against direct computations; the live cache against hand-made ones."""

import math
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from care.errors import BadInput
from care.evaluation import live_cache, measure
from care.evaluation.quality import CHUNK
from tiny import TinyModels
from tolerances import VISIBLE, assert_numbers

VOCABULARY = 11


def model(seed: int) -> Any:
    """Logits that depend on the token alone."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    return lambda tokens_BT: table[tokens_BT]


def windows(batch: int, length: int) -> Tensor:
    """Random tokens."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("length", [2, 17, CHUNK + 1, CHUNK + 40])
def test_perplexity_is_the_direct_one(length: int) -> None:
    tokens = windows(3, length)
    logits = model(1)(tokens)[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    found = measure({"a": model(1)}, tokens)["a"]
    assert found.predictions == 3 * (length - 1)
    assert_numbers(found.nll, float(nll.mean()), "fp32 nats")
    assert_numbers(math.log(found.perplexity), float(nll.mean()), "fp32 nats")
    assert_numbers(found.nll_error, float(nll.std(correction=0)) / math.sqrt(len(nll)), "fp32 nats")
    assert found.kl is None
    assert found.top1_agreement is None


def test_skipped_predictions_are_read_and_not_counted() -> None:
    """In a context as long as the window, of which only the end is measured."""
    tokens = windows(2, 10)
    found = measure({"a": model(1)}, tokens, skip=6)["a"]
    logits = model(1)(tokens)[:, 6:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 7:].flatten())
    assert found.predictions == 2 * 3
    assert_numbers(found.nll, float(expected), "fp32 nats")


@pytest.mark.parametrize("skip", [-1, 9, 10])
def test_something_must_be_left_to_count(skip: int) -> None:
    with pytest.raises(BadInput, match=f"no predictions behind the first {skip}"):
        measure({"a": model(1)}, windows(1, 10), skip=skip)


def test_kl_is_from_the_reference() -> None:
    """KL(reference || model), the mean over predictions."""
    tokens = windows(2, CHUNK + 20)
    p, q = (model(seed)(tokens)[:, :-1].double().log_softmax(-1).flatten(0, 1) for seed in (1, 2))
    found = measure({"q": model(2), "p": model(1)}, tokens, reference="p")
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    backward = torch.nn.functional.kl_div(p, q, log_target=True, reduction="batchmean")
    assert found["q"].kl is not None
    assert_numbers(found["q"].kl, float(expected), "fp32 nats")
    assert abs(float(expected - backward)) > VISIBLE
    assert found["q"].top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert (found["p"].kl, found["p"].top1_agreement) == (0.0, 1.0)
    kl_T = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    agreed_T = (p.argmax(-1) == q.argmax(-1)).double()
    for error, terms_T in ((found["q"].kl_error, kl_T), (found["q"].top1_error, agreed_T)):
        assert error is not None
        assert_numbers(error, float(terms_T.std(correction=0)) / math.sqrt(len(terms_T)), "fp32 nats")
    assert (found["p"].kl_error, found["p"].top1_error) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("length", "skip", "edges"),
    [
        (65, 0, [0, 64]),
        (66, 0, [0, 64, 65]),
        (CHUNK + 41, 0, [0, 64, 128, 256, CHUNK + 40]),
        (CHUNK + 41, 130, [130, 256, CHUNK + 40]),
    ],
)
def test_buckets_are_the_same_figures_by_position(length: int, skip: int, edges: list[int]) -> None:
    """Position 0 has read one token: what it predicts is the window's second."""
    tokens = windows(3, length)
    p, q = (model(seed)(tokens)[:, :-1].double().log_softmax(-1) for seed in (1, 2))
    nll_BT = -q.gather(2, tokens[:, 1:, None])[..., 0]
    kl_BT = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    agreed_BT = (p.argmax(-1) == q.argmax(-1)).double()
    whole = measure({"q": model(2), "p": model(1)}, tokens, reference="p", skip=skip)["q"]
    assert [(b.first, b.last + 1) for b in whole.buckets] == list(pairwise(edges))
    for b in whole.buckets:
        for terms_BT, mean, error in (
            (nll_BT, b.nll, b.nll_error), (kl_BT, b.kl, b.kl_error), (agreed_BT, b.top1_agreement, b.top1_error),
        ):  # fmt: skip
            part_N = terms_BT[:, b.first : b.last + 1].flatten()
            assert b.predictions == len(part_N)
            assert mean is not None
            assert error is not None
            expected = [float(part_N.mean()), float(part_N.std(correction=0)) / math.sqrt(len(part_N))]
            assert_numbers([mean, error], expected, "fp32 nats")
    assert_numbers(sum(b.nll * b.predictions for b in whole.buckets) / whole.predictions, whole.nll, "fp64 sums")


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    found = measure({"flat": lambda tokens: torch.zeros(*tokens.shape, VOCABULARY)}, windows(1, 9))["flat"]
    assert_numbers(found.perplexity, float(VOCABULARY), "fp32 nats")
    assert_numbers(found.nll_error, 0.0, "fp32 nats")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_logits_name_the_model(value: float) -> None:
    with pytest.raises(BadInput, match="model broken gives NaN or infinite logits"):
        measure({"broken": lambda tokens: torch.full((*tokens.shape, VOCABULARY), value)}, windows(1, 9))


def test_live_cache_of_a_source(tiny: TinyModels) -> None:
    """2 * G * d values in each of three layers, four bytes each."""
    used = live_cache(tiny.source_model("llama-gqa"), 10)
    assert (used.values_per_token, used.bytes_per_token) == (3 * 2 * 2 * 8, 3 * 2 * 2 * 8 * 4)
    half = live_cache(deepcopy(tiny.source_model("llama-gqa")).bfloat16(), 10)
    assert half.bytes_per_token == used.bytes_per_token / 2
