"""Bits per byte: what a model needs for a text whatever its tokenizer, and texts cut alike for several tokenizers."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..calibration import whole_windows
from ..errors import BadInput
from ..progress import Track, silent
from .quality import Logits, Quality, check_finite_nll, chunks, label_nll, mean_and_error

MEND = "lower --windows or --window, or give a longer text"


@dataclass(frozen=True)
class BitsPerByte:
    """Bits that a model needs per UTF-8 byte of what it predicted, with the standard error of the mean nll."""

    value: float
    error: float
    num_bytes: int
    predictions: int


@dataclass(frozen=True)
class Span:
    """A stretch of text as one model reads it: token ids (T,), and the first token whose prediction counts.

    Counted tokens hold the same `num_bytes` bytes of text in every model.
    """

    tokens_T: Tensor
    first: int
    num_bytes: int


@dataclass(frozen=True)
class _Tokens:
    """A text in tokens, and places where one tokenizer's tokens meet: character to the number of tokens before it."""

    ids: list[int]
    meets: Mapping[int, int]


def bits_per_byte(quality: Quality, num_bytes: int) -> BitsPerByte:
    """From the mean nll of the predictions that make up `num_bytes` bytes."""
    if not num_bytes:
        raise BadInput("the predicted tokens decode to no text at all; bits per byte have no meaning for it")
    return _in_bits(quality.nll, quality.nll_error, quality.predictions, num_bytes)


def _in_bits(nll: float, nll_error: float, predictions: int, num_bytes: int) -> BitsPerByte:
    scale = predictions / num_bytes / math.log(2)
    return BitsPerByte(nll * scale, nll_error * scale, num_bytes, predictions)


def predicted_bytes(tokenizer: Any, windows_BT: Tensor, skip: int = 0) -> int:  # noqa: ANN401
    """UTF-8 bytes of the tokens that are predicted in windows (B, T) when the first `skip` predictions do not count.

    A window is decoded with and without them. Where a cut runs through a character, a replacement character of three
    bytes stands for its part: at most three bytes more or less at either end of a window.
    """

    def count(tokens: list[int]) -> int:
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8", errors="replace"))

    return sum(count(window) - count(window[: skip + 1]) for window in windows_BT.tolist())


def common_spans(
    tokenizers: Mapping[str, Any], text: str, window: int, count: int | None = None, skip: int = 0
) -> dict[str, list[Span]]:
    """`count` stretches of a text, for each model in its own tokens; without a count, as `whole_windows` says.

    Each is as much as the first tokenizer has in at most `window` tokens, up to where a token ends with a character
    that is no space. What counts begins where tokens of all models meet for the first time behind the first `skip` + 1
    of the first one. BadInput where the text is too short, or a tokenizer does not say where its tokens lie.
    """
    leader = next(iter(tokenizers))
    whole = _tokens(leader, tokenizers[leader], text)
    count = whole_windows(len(whole.ids), window) if count is None else count
    if len(whole.ids) < window * count:
        raise BadInput(f"the text has {len(whole.ids)} tokens of {leader}, not {count} windows of {window}; {MEND}")
    if not 0 <= skip < window - 1:
        raise BadInput(f"a window of {window} tokens has no predictions behind the first {skip}")
    cuts = _cuts(whole, window, count)
    spans: dict[str, list[Span]] = {name: [] for name in tokenizers}
    for begin, end in pairwise(cuts):
        for name, span in _spans(tokenizers, text[begin:end], skip).items():
            spans[name].append(span)
    return spans


def _cuts(whole: _Tokens, window: int, count: int) -> list[int]:
    """Characters at which the text is cut, each at most `window` tokens behind the one before."""
    places, counts = list(whole.meets), list(whole.meets.values())
    cuts, used = [0], 0
    for _ in range(count):
        found = bisect_right(counts, used + window)
        if not found or counts[found - 1] == used:
            raise BadInput(f"no word of this text ends within a window of {window} tokens; raise --window")
        cuts.append(places[found - 1])
        used = counts[found - 1]
    return cuts


def _spans(tokenizers: Mapping[str, Any], text: str, skip: int) -> dict[str, Span]:
    """One stretch, in every model's tokens."""
    read = {name: _tokens(name, tokenizer, text) for name, tokenizer in tokenizers.items()}
    leader = next(iter(read.values()))
    common = set(leader.meets).intersection(*(tokens.meets for tokens in read.values()))
    starts = [
        at for at in common
        if leader.meets[at] > skip and all(tokens.meets[at] < len(tokens.ids) for tokens in read.values())
    ]  # fmt: skip
    if not starts:
        raise BadInput(f"the tokens of {' and '.join(read)} never meet in a window of this text; raise --window")
    begin = min(starts)
    num_bytes = len(text[begin:].encode("utf-8", errors="replace"))
    return {name: Span(torch.tensor(t.ids), t.meets[begin], num_bytes) for name, t in read.items()}


def _tokens(name: str, tokenizer: Any, text: str) -> _Tokens:  # noqa: ANN401
    """Without special tokens.

    Tokens meet where one ends with a character that is no space and the next does not begin within it: tokenizers
    differ in whether a token's place includes the space beside it, and several tokens can share a character.
    """
    if not tokenizer.is_fast:
        raise BadInput(f"the tokenizer of {name} does not say where its tokens lie; --bits-per-byte needs a fast one")
    encoded = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    places: Sequence[tuple[int, int]] = encoded["offset_mapping"]
    meets = dict[int, int]()
    for before, (_, end) in enumerate(places, start=1):
        apart = before == len(places) or places[before][0] >= end
        if apart and end and not text[end - 1].isspace():
            meets[end] = before
    return _Tokens(encoded["input_ids"], meets)


def measure_bits(
    models: Mapping[str, Logits], spans: Mapping[str, Sequence[Span]], *, track: Track = silent
) -> dict[str, BitsPerByte]:
    """Bits per byte of every model on its own tokens of the same stretches."""
    return {name: _measured(name, run, spans[name], track) for name, run in models.items()}


def _measured(name: str, run: Logits, spans: Sequence[Span], track: Track) -> BitsPerByte:
    total = total_squared = 0.0
    predictions = 0
    with torch.inference_mode():
        for span in track(spans, label=f"evaluating {name}", total=len(spans)):
            logits = run(span.tokens_T[None])
            for part in chunks(span.first - 1, len(span.tokens_T) - 1):
                logp_tV = logits[0, part].float().log_softmax(-1)
                nll_t = label_nll(logp_tV, span.tokens_T[part.start + 1 : part.stop + 1])
                total += float(nll_t.sum())
                total_squared += float(nll_t.square().sum())
                predictions += len(nll_t)
    check_finite_nll(name, total)
    nll, error = mean_and_error(total, total_squared, predictions)
    return _in_bits(nll, error, predictions, sum(span.num_bytes for span in spans))
