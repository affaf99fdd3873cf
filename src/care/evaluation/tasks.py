"""Multiple-choice tasks: which continuation of a context a model finds likeliest.

`acc` compares the log-probabilities of whole continuations, `acc_norm` divides them by the length of the choice in
characters: the two figures of the lm-evaluation-harness, which are never mixed. A row has one context and several
choices, or (WinoGrande's partial scoring) several contexts and one continuation, which has no acc_norm.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.text import read_text
from ..errors import BadInput
from ..progress import Track, silent
from .pairs import encode_pair
from .quality import Logits

BATCH_TOKENS = 4096
"""Tokens, padding included, that go through the model at a time."""


@dataclass(frozen=True)
class Row:
    """A question: pairs of context and continuation, and the index of the right one."""

    options: tuple[tuple[str, str], ...]
    gold: int
    normalized: bool


@dataclass(frozen=True)
class TaskScore:
    """Shares of right answers with their standard errors; acc_norm is None where lengths do not matter."""

    rows: int
    acc: float
    acc_error: float
    acc_norm: float | None
    acc_norm_error: float | None


@dataclass(frozen=True)
class _Request:
    row: int
    option: int
    tokens: list[int]
    num_context: int


def load_task(path: Path, limit: int | None = None) -> list[Row]:
    """Rows of a .jsonl or .jsonl.gz file, the first `limit` of them; BadInput names the row that is of no such kind."""
    lines = [line for line in read_text(path).splitlines() if line.strip()][:limit]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise BadInput(
                f"{path}, row {number}: expected ctx, choices and gold, or contexts, continuation and gold"
            ) from error
    if not rows:
        raise BadInput(f"task {path} has no rows")
    return rows


def _row(record: dict[str, Any]) -> Row:
    if "contexts" in record:
        options = tuple((context, f" {record['continuation']}") for context in record["contexts"])
    else:
        options = tuple((record["ctx"], f" {choice}") for choice in record["choices"])
    options[record["gold"]]  # an answer that is not among them is an IndexError
    return Row(options, record["gold"], normalized="contexts" not in record)


def score(logits: Logits, tokenizer: Any, rows: Sequence[Row], *, track: Track = silent, label: str = "") -> TaskScore:  # noqa: ANN401
    """Accuracy of a model on rows; options are run in batches of like length."""
    requests = sorted(_requests(tokenizer, rows), key=lambda r: len(r.tokens))
    logp: dict[tuple[int, int], float] = {}
    with torch.inference_mode():
        batches = _batches(requests)
        for batch in track(batches, label=label or "answering", total=len(batches)):
            for request, value in zip(batch, _log_probabilities(logits, batch), strict=True):
                logp[request.row, request.option] = value
    plain = [_answer(logp, n, row, normalized=False) == row.gold for n, row in enumerate(rows)]
    if not all(row.normalized for row in rows):
        return TaskScore(len(rows), *_share(plain), None, None)
    return TaskScore(
        len(rows), *_share(plain), *_share([_answer(logp, n, r, normalized=True) == r.gold for n, r in enumerate(rows)])
    )


def _requests(tokenizer: Any, rows: Sequence[Row]) -> list[_Request]:  # noqa: ANN401
    """Context and continuation are tokenized as one text and cut where the context alone would end."""
    return [
        _Request(n, option, *encode_pair(tokenizer, context, continuation))
        for n, row in enumerate(rows)
        for option, (context, continuation) in enumerate(row.options)
    ]


def _batches(requests: Sequence[_Request]) -> list[list[_Request]]:
    batches: list[list[_Request]] = [[]]
    for request in requests:
        if batches[-1] and (len(batches[-1]) + 1) * len(request.tokens) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(request)
    return batches


def _log_probabilities(logits: Logits, batch: Sequence[_Request]) -> list[float]:
    """Sums over each continuation; padding stands behind, where causal attention does not see it."""
    longest = max(len(r.tokens) for r in batch)
    padded_BT = torch.tensor([r.tokens + [r.tokens[-1]] * (longest - len(r.tokens)) for r in batch])
    logits_BTV = logits(padded_BT)
    return [_continuation(logits_TV, r) for logits_TV, r in zip(logits_BTV, batch, strict=True)]


def _continuation(logits_TV: Tensor, request: _Request) -> float:
    first, last = max(request.num_context, 1), len(request.tokens)
    labels_T = torch.tensor(request.tokens[first:last], device=logits_TV.device)
    logp_TV = logits_TV[first - 1 : last - 1].float().log_softmax(-1)
    return float(logp_TV.gather(1, labels_T[:, None]).double().sum())


def _answer(logp: dict[tuple[int, int], float], n: int, row: Row, *, normalized: bool) -> int:
    # The space before a choice does not count as part of it.
    lengths = [len(continuation) - 1 if normalized else 1 for _, continuation in row.options]
    scores = [logp[n, option] / max(length, 1) for option, length in enumerate(lengths)]
    return scores.index(max(scores))


def _share(right: Sequence[bool]) -> tuple[float, float]:
    """Mean and its standard error."""
    n, mean = len(right), sum(right) / len(right)
    return mean, (mean * (1 - mean) / max(n - 1, 1)) ** 0.5
