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
from .cache import cache_name
from .pairs import encode_pair

BATCH_TOKENS = 4096
"""Tokens, padding included, that go through the model at a time; one question may be longer."""


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
class _Continuation:
    """One option's tokens behind its context."""

    row: int
    option: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Question:
    """A context and all continuations of it: what it costs is read once."""

    context: tuple[int, ...]
    continuations: tuple[_Continuation, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest continuation."""
        return max(len(c.tokens) for c in self.continuations)


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


def score(model: Any, tokenizer: Any, rows: Sequence[Row], *, track: Track = silent, label: str = "") -> TaskScore:  # noqa: ANN401
    """Accuracy of a causal language model on rows."""
    logp = log_probabilities(model, tokenizer, rows, track=track, label=label)
    plain = [_answer(found, row, normalized=False) == row.gold for found, row in zip(logp, rows, strict=True)]
    if not all(row.normalized for row in rows):
        return TaskScore(len(rows), *_share(plain), None, None)
    normed = [_answer(found, row, normalized=True) == row.gold for found, row in zip(logp, rows, strict=True)]
    return TaskScore(len(rows), *_share(plain), *_share(normed))


def log_probabilities(
    model: Any,  # noqa: ANN401 - a transformers model
    tokenizer: Any,  # noqa: ANN401
    rows: Sequence[Row],
    *,
    track: Track = silent,
    label: str = "",
) -> list[list[float]]:
    """ln p(continuation | context) of every option of every row; a context is read once for all its continuations."""
    found = [[0.0] * len(row.options) for row in rows]
    batches = _batches(_questions(tokenizer, rows))
    with torch.inference_mode():
        for batch in track(batches, label=label or "answering", total=len(batches)):
            for continuation, logp in _answers(model, batch):
                found[continuation.row][continuation.option] = logp
    return found


def _questions(tokenizer: Any, rows: Sequence[Row]) -> list[_Question]:  # noqa: ANN401
    """Options that have their context's tokens in common, by row."""
    found: dict[tuple[int, tuple[int, ...]], list[_Continuation]] = {}
    for n, row in enumerate(rows):
        for option, (context, continuation) in enumerate(row.options):
            whole, cut = encode_pair(tokenizer, context, continuation)
            found.setdefault((n, whole[:cut]), []).append(_Continuation(n, option, whole[cut:]))
    return [_Question(context, tuple(continuations)) for (_, context), continuations in found.items()]


def _batches(questions: Sequence[_Question]) -> list[list[_Question]]:
    """Questions with contexts of one length, so that only continuations are padded."""
    batches: list[list[_Question]] = []
    cost = longest = options = 0
    for question in sorted(questions, key=lambda q: (len(q.context), q.longest)):
        same = bool(batches) and len(batches[-1][0].context) == len(question.context)
        longest, options = max(longest, question.longest), options + len(question.continuations)
        cost = ((len(batches[-1]) + 1) * len(question.context) + options * longest) if same else 0
        if not same or cost > BATCH_TOKENS:
            batches.append([])
            longest, options = question.longest, len(question.continuations)
        batches[-1].append(question)
    return batches


def _answers(model: Any, batch: Sequence[_Question]) -> list[tuple[_Continuation, float]]:  # noqa: ANN401
    """Every continuation with its sum: contexts into a cache, then all continuations from copies of it."""
    device = model.device
    context_BT = torch.tensor([q.context for q in batch], device=device)
    begun = model(input_ids=context_BT, use_cache=True, logits_to_keep=1)
    asked = [(n, c) for n, question in enumerate(batch) for c in question.continuations]
    first_NV = begun.logits[[n for n, _ in asked], -1]
    longest = max(len(c.tokens) for _, c in asked)
    if longest == 1:
        rest = [first_NV[i, None] for i in range(len(asked))]
    else:
        name = cache_name(begun)
        begun[name].batch_select_indices(torch.tensor([n for n, _ in asked], device=device))
        # Padding stands behind, where causal attention does not see it; the last token predicts nothing that counts.
        padded = [(c.tokens + c.tokens[-1:] * longest)[: longest - 1] for _, c in asked]
        padded_NT = torch.tensor(padded, device=device)
        next_NTV = model(input_ids=padded_NT, use_cache=True, **{name: begun[name]}).logits
        rest = [torch.cat((first_NV[i, None], next_NTV[i])) for i in range(len(asked))]
    sums = torch.stack([_sum(logits_TV, c.tokens) for logits_TV, (_, c) in zip(rest, asked, strict=True)])
    return [(c, value) for (_, c), value in zip(asked, sums.tolist(), strict=True)]


def _sum(logits_TV: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log-probability of tokens, the first of which the first logits predict: (), where it was made."""
    labels_T = torch.tensor(tokens, device=logits_TV.device)
    logp_TV = logits_TV[: len(tokens)].float().log_softmax(-1)
    return logp_TV.gather(1, labels_T[:, None]).double().sum()


def _answer(logp: Sequence[float], row: Row, *, normalized: bool) -> int:
    # The space before a choice does not count as part of it.
    lengths = [len(continuation) - 1 if normalized else 1 for _, continuation in row.options]
    scores = [value / max(length, 1) for value, length in zip(logp, lengths, strict=True)]
    return scores.index(max(scores))


def _share(right: Sequence[bool]) -> tuple[float, float]:
    """Mean and its standard error."""
    n, mean = len(right), sum(right) / len(right)
    return mean, (mean * (1 - mean) / max(n - 1, 1)) ** 0.5
