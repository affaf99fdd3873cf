"""Windows to train on and windows held out: from texts in equal shares, or from what the teacher writes."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..progress import Track, silent

SELF = "self"
"""The name of the text that the teacher writes."""

HELD_OUT_SHARE = 0.05
"""Part of each text, from its end, that is held out, unless the number of windows asked for is less."""

WRITTEN_AT_ONCE, GPU_WRITTEN_AT_ONCE = 64, 1024
"""Windows that the teacher writes side by side: decoding reads every weight once for all of them."""


@dataclass(frozen=True)
class Windows:
    """Windows of each text (count, T), to train on and held out."""

    train: tuple[Tensor, ...]
    held_out_BT: Tensor

    def batch(self, first: int, count: int, seed: int) -> Tensor:
        """Windows number `first` and on of the endless stream (count, T).

        The texts take turns, each in an order of its own that is drawn anew when all its windows have been seen.
        """
        return torch.stack([self._window(number, seed) for number in range(first, first + count)])

    def rounds(self, count: int) -> list[float]:
        """How often each text has been read after `count` windows of the stream."""
        return [count / len(self.train) / len(windows_BT) for windows_BT in self.train]

    def _window(self, number: int, seed: int) -> Tensor:
        text, turn = number % len(self.train), number // len(self.train)
        windows_BT = self.train[text]
        epoch, place = divmod(turn, len(windows_BT))
        generator = torch.Generator().manual_seed(hash((seed, text, epoch)) % 2**63)
        return windows_BT[torch.randperm(len(windows_BT), generator=generator)[place]]


def split_windows(texts: Sequence[Tensor], length: int, held_out: int) -> Windows:
    """Cut token sequences (T,) into windows of `length`; the end of each text is held out, `held_out` windows in all.

    The held-out windows alternate between the texts, so that a part of them is of all texts too.
    """
    train, kept = list[Tensor](), list[Tensor]()
    for tokens_T in texts:
        count = len(tokens_T) // length
        out = min(math.ceil(held_out / len(texts)), math.ceil(count * HELD_OUT_SHARE))
        if count <= out:
            raise BadInput(
                f"a text has {len(tokens_T)} tokens, too few to train on {length} at a time and hold some out; "
                "use a longer text or a smaller --length"
            )
        windows_BT = tokens_T[: count * length].view(count, length)
        train.append(windows_BT[: count - out])
        kept.append(windows_BT[count - out :])
    turns = [windows_BT[turn] for turn in range(max(map(len, kept))) for windows_BT in kept if turn < len(windows_BT)]
    return Windows(tuple(train), torch.stack(turns))


def write_text(
    teacher: Any,  # noqa: ANN401 - a transformers model
    start: int,
    length: int,
    count: int,
    seed: int,
    *,
    deadline: float | None = None,
    track: Track = silent,
) -> Tensor:
    """What the teacher writes at temperature 1 from the token `start`, `count` times `length` tokens in a row: (T,).

    A batch of windows that would end after the deadline (of time.monotonic), as long as the one before took, is not
    begun, but for the first. A window goes on over ends of text, as texts do in files.
    """
    at_once = GPU_WRITTEN_AT_ONCE if teacher.device.type == "cuda" else WRITTEN_AT_ONCE
    batches = _write_windows(teacher, start, length, count, seed, at_once, deadline)
    written = list(track(batches, label="the teacher writes", total=math.ceil(count / at_once)))
    return torch.cat([tokens_BT.flatten() for tokens_BT in written])


def _write_windows(
    teacher: Any,  # noqa: ANN401
    start: int,
    length: int,
    count: int,
    seed: int,
    at_once: int,
    deadline: float | None,
) -> Iterator[Tensor]:
    """Batches of windows; of half as many where memory does not suffice."""
    left, took = count, 0.0
    while left and (left == count or deadline is None or time.monotonic() + took < deadline):
        begun = time.monotonic()
        torch.manual_seed(seed + count - left)
        first = torch.full((min(at_once, left), 1), start, device=teacher.device)
        try:
            with torch.inference_mode():
                tokens_BT = teacher.generate(
                    input_ids=first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0,
                    top_p=1.0, max_new_tokens=length, min_new_tokens=length,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once //= 2
            continue
        left -= len(first)
        yield tokens_BT[:, 1 : length + 1].cpu()
        took = time.monotonic() - begun
