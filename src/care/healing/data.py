"""Windows to train on and windows held out: from texts in equal shares, or from what the teacher writes."""

import math
from collections.abc import Callable, Sequence
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

WRITTEN_AT_ONCE = 64
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
    enough: Callable[[], bool] = lambda: False,
    track: Track = silent,
) -> Tensor:
    """Up to `count` windows (B, length) that the teacher writes at temperature 1 from the token `start`.

    Stops early, after whole batches, when `enough` says so. A window goes on over ends of text, as texts do in files.
    """
    sizes = [min(WRITTEN_AT_ONCE, count - first) for first in range(0, count, WRITTEN_AT_ONCE)]
    written = list[Tensor]()
    for number, size in enumerate(track(sizes, label="the teacher writes", total=len(sizes))):
        if written and enough():
            break
        torch.manual_seed(seed + number)
        first = torch.full((size, 1), start, device=teacher.device)
        with torch.inference_mode():
            tokens_BT = teacher.generate(
                input_ids=first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, max_new_tokens=length, min_new_tokens=length,
            )  # fmt: skip
        written.append(tokens_BT[:, 1 : length + 1].cpu())
    return torch.cat(written).clone()
