"""Multiple choice: scores against a model whose every log-probability is known."""

import gzip
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.generic import ModelOutput

from care.errors import BadInput
from care.evaluation import load_task, log_probabilities, score
from care.evaluation.tasks import BATCH_TOKENS, Row
from tiny import Case, TinyModels
from tolerances import assert_numbers

VOCABULARY = 128
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(4))
"""Logits of the next character given the one before."""

CONVERTED = {
    "native": Case("gemma3-local", "care-mla", 0.75, "absorbed", "native"),
    "rebuild": Case("llama-gqa", "care-e", 0.5),
    "deepseek": Case("llama-gqa", "transmla", 0.5),
}


class Characters:
    """A tokenizer with one token a character and no special ones."""

    bos_token = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


class Bigram:
    """A model that looks at the last character only."""

    device = torch.device("cpu")

    def __call__(self, input_ids: Tensor, **_: object) -> ModelOutput:
        return ModelOutput(logits=TABLE[input_ids], past_key_values=DynamicCache())


def likelihood(context: str, continuation: str) -> float:
    """What the table says of a continuation, character by character."""
    text = context + continuation
    logp = TABLE.double().log_softmax(-1)
    return sum(float(logp[ord(text[i - 1]), ord(text[i])]) for i in range(len(context), len(text)))


def random_rows(count: int) -> list[Row]:
    """Four choices of different lengths each."""
    generator = torch.Generator().manual_seed(8)

    def word(length: int) -> str:
        return "".join(chr(c) for c in torch.randint(97, 123, (length,), generator=generator).tolist())

    return [
        Row(tuple((context, " " + word(2 + n)) for n in range(4)), i % 4, normalized=True)
        for i in range(count)
        for context in [word(3 + i % 5)]
    ]


def test_scores_are_those_of_the_table() -> None:
    rows = random_rows(40)
    plain = [max(range(4), key=lambda n, r=row: likelihood(*r.options[n])) == row.gold for row in rows]
    normed = [
        max(range(4), key=lambda n, r=row: likelihood(*r.options[n]) / (len(r.options[n][1]) - 1)) == row.gold
        for row in rows
    ]
    assert plain != normed
    found = score(Bigram(), Characters(), rows)
    assert found.rows == 40
    assert found.acc_norm is not None
    assert_numbers([found.acc, found.acc_norm], [sum(plain) / 40, sum(normed) / 40], "fp64")
    assert_numbers(found.acc_error, (found.acc * (1 - found.acc) / 39) ** 0.5, "fp64")


def alone(model: Any, context: str, continuation: str) -> float:
    """What a real model says of one option by itself, whole and without a cache."""
    ids_BT = torch.tensor([[ord(c) for c in context + continuation]])
    with torch.inference_mode():
        logp_TV = model(input_ids=ids_BT, use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logp_TV[i - 1, ids_BT[0, i]]) for i in range(len(context), ids_BT.shape[1]))


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3-local", "mistral-window", "native", "rebuild", "deepseek"])
def test_shared_contexts_change_no_probability(tiny: TinyModels, name: str) -> None:
    """Contexts of one length and of others, some longer than a sliding window; continuations of 1 to 6 tokens."""
    model = tiny.model(CONVERTED[name]) if name in CONVERTED else tiny.source_model(name)
    twice = Row((("same", " x"), ("other", " x"), ("same", " yz")), 0, normalized=True)
    short = Row((("one", "a"), ("one", "b")), 0, normalized=True)
    long = Row((("longer than the window", " abc"), ("longer than the window", " defghi")), 0, normalized=True)
    rows = [*random_rows(12), twice, short, long]
    found = log_probabilities(model, Characters(), rows)
    expected = [[alone(model, *option) for option in row.options] for row in rows]
    assert [len(row) for row in found] == [len(row) for row in expected]
    assert_numbers([*chain(*found)], [*chain(*expected)], "fp32 logits")


def test_padding_and_batches_change_nothing() -> None:
    """A batch too large for one pass, among it one option as long as the limit."""
    rows = [*random_rows(20), Row((("a" * BATCH_TOKENS, " b"), ("a", " c")), 0, normalized=True)]
    apart = [score(Bigram(), Characters(), [row]).acc for row in rows]
    assert_numbers(score(Bigram(), Characters(), rows).acc, sum(apart) / len(rows), "fp64")


def test_rows_with_two_contexts_have_no_acc_norm(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"contexts": ["ab", "ax"], "continuation": "c.", "gold": 1}) + "\n")
    (row,) = load_task(path)
    assert row.options == (("ab", " c."), ("ax", " c."))
    found = score(Bigram(), Characters(), [row])
    assert found.acc == float(likelihood("ax", " c.") > likelihood("ab", " c."))
    assert found.acc_norm is None


def test_gzip_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"ctx": "q", "choices": ["a", "b"], "gold": 1}\n' * 5))
    assert load_task(path, 3) == [Row((("q", " a"), ("q", " b")), 1, normalized=True)] * 3


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"ctx": "q"}', '{"ctx": "q", "choices": ["a"], "gold": 1}', '{"contexts": ["a"], "gold": 0}']
)
def test_rows_of_another_kind_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"ctx": "q", "choices": ["a", "b"], "gold": 1}\n' + line)
    with pytest.raises(BadInput, match="row 2"):
        load_task(path)


def test_files_that_are_no_task_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="has no rows"):
        load_task(tmp_path / "empty.jsonl")
    with pytest.raises(BadInput, match="cannot read"):
        load_task(tmp_path / "absent.jsonl")
