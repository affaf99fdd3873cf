"""Hidden states between two layers, in files: what a model of any size needs while its layers run one at a time.

A file gets its name when it is complete, so that a run that was killed can start again from it.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..output import writing
from ..ranks import own_batches

BATCH_TOKENS = 1024
"""Tokens that go through a layer at a time: their activations, gradients and logits are in memory."""


@dataclass(frozen=True)
class Stream:
    """Hidden states or their gradients (windows, T, D) in fp32 at the entry of layer `layer`."""

    directory: Path
    name: str
    shape: tuple[int, int, int]
    layer: int = 0

    @property
    def path(self) -> Path:
        """The file, once it is complete."""
        return self.directory / f"{self.name}-{self.layer:05d}.fp32"

    @property
    def exists(self) -> bool:
        """Whether all of it is there."""
        return self.path.is_file() and self.path.stat().st_size == 4 * math.prod(self.shape)

    def at(self, layer: int) -> "Stream":
        """The same windows at the entry of another layer."""
        return Stream(self.directory, self.name, self.shape, layer)

    def batches(self) -> Iterator[Tensor]:
        """Batches (B, T, D) in order."""
        windows, T, D = self.shape
        size = batch_size(T)
        for first in range(0, windows, size):
            count = min(size, windows - first)
            values = np.fromfile(self.path, dtype=np.float32, count=count * T * D, offset=4 * first * T * D)
            yield torch.from_numpy(values).view(count, T, D)

    def write(self, batches: Iterable[Tensor]) -> None:
        """All batches in order; the file appears when the last one is written."""
        part = self.path.with_suffix(".part")
        with writing(self.path):
            file = part.open("wb")
        with file:
            for batch_BTD in batches:
                values = batch_BTD.detach().to("cpu", torch.float32).contiguous().numpy()
                with writing(self.path):
                    file.write(values.data)
        part.replace(self.path)

    def first(self, windows: int) -> "Stream":
        """The first windows alone, in the same file."""
        return Stream(self.directory, self.name, (windows, *self.shape[1:]), self.layer)

    def cut(self, windows: int) -> None:
        """Free the disk of all but the first windows."""
        if not windows:
            self.remove()
        elif self.path.is_file():
            os.truncate(self.path, 4 * math.prod(self.first(windows).shape))

    def remove(self) -> None:
        """Free the disk."""
        self.path.unlink(missing_ok=True)


def own_windows(windows_BT: Tensor) -> Tensor:
    """The windows that go through this process: whole batches, the same ones as in a single process."""
    batches = batches_of(windows_BT)
    own = [batches[index] for index in own_batches(len(batches))]
    return torch.cat(own) if own else windows_BT[:0]


def num_batches(windows_BT: Tensor) -> int:
    """How many batches windows are, the last one perhaps smaller."""
    return -(-len(windows_BT) // batch_size(windows_BT.shape[1]))


def batches_of(tokens_BT: Tensor) -> list[Tensor]:
    """Windows as they go through a layer; none where there are none."""
    return [] if not len(tokens_BT) else list(tokens_BT.split(batch_size(tokens_BT.shape[1])))


def batch_size(window: int) -> int:
    """How many windows go through a layer at a time."""
    return max(BATCH_TOKENS // window, 1)
