"""Needle in a haystack: whether a model finds a fact, by depth and length.

Two scores. `exact`: greedy generation gives the number. `choice`: the number is likelier than each of the wrong ones of
its form, which grades models that are too small to copy it whole. The prompt is read once, into the cache that the
model itself keeps, and every answer goes on from there: what is measured is decoding over the cache. Logits are held of
one position of the prompt and of one answer at a time.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..progress import Track, silent
from .cache import cache_name
from .haystack import Question

SLACK = 4
"""Tokens that a model may write beside the number: a space, a colon, what ends the number."""


@dataclass(frozen=True)
class Answer:
    """What a model made of one question; `nats` is minus the log-probability of the right answer."""

    question: Question
    exact: bool
    choice: bool
    nats: float
    written: str


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error, which is None where there is one value."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Cell:
    """The trials at one length and depth; `tokens` is the mean size of the prompts."""

    length: int
    depth: float
    trials: int
    tokens: float
    exact: Mean
    choice: Mean
    nats: Mean


@dataclass(frozen=True)
class _Read:
    """A prompt that was read: the cache by the name that transformers has for it, and what comes next, (V)."""

    name: str
    cache: Any
    logp_V: Tensor


def find_needles(
    models: Mapping[str, Any], tokenizer: Any, questions: Sequence[Question], *, track: Track = silent  # noqa: ANN401
) -> dict[str, list[Answer]]:  # fmt: skip
    """Every model's answers to the same questions, in their order; BadInput names a model with NaN as logits."""
    answers: dict[str, list[Answer]] = {name: [] for name in models}
    with torch.inference_mode():
        for question in track(questions, label="looking for needles", total=len(questions)):
            for name, model in models.items():
                answers[name].append(_answer(name, model, tokenizer, question))
    return answers


def _answer(name: str, model: Any, tokenizer: Any, question: Question) -> Answer:  # noqa: ANN401
    read = _read(model, question.prompt)
    logp = [_log_probability(model, read, tokens) for tokens in question.answers]
    if not all(map(math.isfinite, logp)):
        raise BadInput(f"model {name} gives NaN or infinite logits; its weights are damaged or its dtype too small")
    written = tokenizer.decode(_greedy(model, read, max(map(len, question.answers)) + SLACK))
    number = re.search(r"\d+", written)
    found = number is not None and number.group() == question.answer
    # Strictly: of a model that finds all numbers alike none is right.
    return Answer(question, found, logp[0] > max(logp[1:]), -logp[0], written)


def _read(model: Any, prompt: Sequence[int]) -> _Read:  # noqa: ANN401
    output = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=True, logits_to_keep=1)
    name = cache_name(output)
    return _Read(name, output[name], output.logits[0, -1].float().log_softmax(-1))


def _more(model: Any, read: _Read, cache: Any, tokens: Sequence[int]) -> Tensor:  # noqa: ANN401
    """Log-probabilities (T, V) of what follows each token; the cache takes them in."""
    ids_BT = torch.tensor([tokens], device=model.device)
    output = model(input_ids=ids_BT, use_cache=True, **{read.name: cache})
    return output.logits[0].float().log_softmax(-1)


def _log_probability(model: Any, read: _Read, tokens: Sequence[int]) -> float:  # noqa: ANN401
    """Of an answer behind the prompt, in nats. Works on a copy of the cache: not every kind can be cut back."""
    logp_TV = read.logp_V[None]
    if len(tokens) > 1:
        logp_TV = torch.cat((logp_TV, _more(model, read, deepcopy(read.cache), tokens[:-1])))
    labels_T = torch.tensor(tokens, device=logp_TV.device)
    return float(logp_TV.gather(1, labels_T[:, None]).double().sum())


def _greedy(model: Any, read: _Read, count: int) -> list[int]:  # noqa: ANN401
    """The likeliest tokens, one after the other; the prompt's cache is used up."""
    tokens = [int(read.logp_V.argmax())]
    while len(tokens) < count:
        tokens.append(int(_more(model, read, read.cache, tokens[-1:])[-1].argmax()))
    return tokens


def mean(values: Sequence[float]) -> Mean:
    """Of independent values."""
    return Mean(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)


def cells(answers: Sequence[Answer]) -> list[Cell]:
    """Answers by length and depth, in their order."""
    places = dict.fromkeys((a.question.length, a.question.depth) for a in answers)
    return [_cell([a for a in answers if (a.question.length, a.question.depth) == place]) for place in places]


def _cell(answers: Sequence[Answer]) -> Cell:
    asked = answers[0].question
    return Cell(
        asked.length, asked.depth, len(answers), fmean(len(a.question.prompt) for a in answers),
        mean([float(a.exact) for a in answers]), mean([float(a.choice) for a in answers]),
        mean([a.nats for a in answers]),
    )  # fmt: skip


def overall(answers: Sequence[Answer], value: Callable[[Answer], float]) -> Mean:
    """The mean over all answers. Those of one trial share a haystack and count as one draw in the error."""
    return mean(list(_by_trial(answers, value).values()))


def difference(answers: Sequence[Answer], base: Sequence[Answer], value: Callable[[Answer], float]) -> Mean:
    """How much more the answers have than those of another model to the same questions, trial by trial."""
    own, other = _by_trial(answers, value), _by_trial(base, value)
    return mean([own[trial] - other[trial] for trial in own])


def _by_trial(answers: Sequence[Answer], value: Callable[[Answer], float]) -> dict[tuple[int, int], float]:
    trials: dict[tuple[int, int], list[float]] = {}
    for answer in answers:
        trials.setdefault((answer.question.length, answer.question.trial), []).append(value(answer))
    return {trial: fmean(values) for trial, values in trials.items()}
