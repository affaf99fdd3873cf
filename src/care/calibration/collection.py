"""Statistics of all layers: one sweep forward and, where gradients are wanted, one back.

Layers outside, batches inside. Whatever a layer gives is on disk before the next one is begun, so that a run that was
killed goes on with the layer that it was at. Of several processes each runs its own windows; statistics are summed
over all of them, and rank 0 writes them, when the hidden states that follow are on the disk everywhere.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..carried import Carried
from ..progress import Track, silent
from ..ranks import on_main, own_batches, own_directory
from ..types import AttentionWeights
from .distances import layer_distances
from .gradients import Tap, label_gradients, layer_gradients
from .layers import DecoderLayers
from .moments import layer_moments
from .store import layer_name, read_layer, write_layer
from .streams import Stream, batches_of, num_batches, own_windows


@dataclass(frozen=True)
class Observed:
    """A model's layers and where in them statistics are taken; weights are read when a layer is at hand."""

    layers: DecoderLayers
    attention_paths: Sequence[str]
    taps: Sequence[tuple[Tap, Tap]]
    carried: Callable[[int], Carried]
    attention: Callable[[int], AttentionWeights]


@dataclass(frozen=True)
class Wanted:
    """Token windows for moments, and for what else is asked: contexts for distances, the first windows for gradients.

    `seed` draws the labels of `gradient_windows` windows; 0 windows mean no gradients.
    """

    windows_BT: Tensor
    contexts_BT: Tensor | None = None
    gradient_windows: int = 0
    seed: int = 0


class Collection:
    """Statistics in a directory, `layer-NNNNN.safetensors` each; `streams/` is in it as long as work goes on."""

    def __init__(self, model: Observed, wanted: Wanted, directory: Path) -> None:
        self._model, self._wanted, self._directory = model, wanted, directory
        self._work = directory / "streams"
        self._streams = own_directory(self._work)
        self._hidden = self._stream("hidden", wanted.windows_BT)
        self._gradient = self._stream("gradient", wanted.windows_BT[: wanted.gradient_windows])
        self._context = None if wanted.contexts_BT is None else self._stream("context", wanted.contexts_BT)

    def _stream(self, name: str, windows_BT: Tensor) -> Stream:
        windows, T = own_windows(windows_BT).shape
        return Stream(self._streams, name, (windows, T, self._model.layers.hidden_size))

    def _kept(self, index: int) -> Stream:
        """The hidden states that gradients go back through."""
        return self._hidden.at(index).first(self._gradient.shape[0])

    def _layer_file(self, index: int) -> Path:
        return self._directory / layer_name(index)

    def _forward_file(self, index: int) -> Path:
        """What the sweep forward leaves of a layer: all there is of it, unless gradients follow."""
        return self._layer_file(index) if not self._wanted.gradient_windows else self._work / layer_name(index)

    def run(self, track: Track = silent) -> None:
        """Collect what is not there yet."""
        self._forward(track)
        if self._wanted.gradient_windows:
            self._backward(track)
        on_main(lambda: shutil.rmtree(self._work))

    def _forward(self, track: Track) -> None:
        L = len(self._model.layers)
        done = [self._layer_file(i).is_file() or self._forward_file(i).is_file() for i in range(L)]
        first = next((index for index, there in enumerate(done) if not there), L)
        if first == 0:
            self._embed()
        for index in track(range(first, L), label="calibrating", total=L - first):
            self._forward_layer(index)

    def _embed(self) -> None:
        for stream, tokens_BT in ((self._hidden, self._wanted.windows_BT), (self._context, self._wanted.contexts_BT)):
            if stream is not None and tokens_BT is not None:
                stream.write(self._model.layers.embed(batches_of(own_windows(tokens_BT))))

    def _forward_layer(self, index: int) -> None:
        model, path = self._model, self._model.attention_paths[index]
        here, after = self._hidden.at(index), self._hidden.at(index + 1)
        with model.layers.holding(index):
            stats = layer_moments(model.layers, index, path, model.carried(index), here, after)
            if self._context is not None:
                entering, leaving = self._context.at(index), self._context.at(index + 1)
                share_HT = layer_distances(model.layers, index, path, model.attention(index), entering, leaving)
                stats = replace(stats, attention_HT=share_HT)
        on_main(lambda: write_layer(self._forward_file(index), stats))
        if self._context is not None:
            self._context.at(index).remove()
        here.cut(self._gradient.shape[0])

    def _backward(self, track: Track) -> None:
        L = len(self._model.layers)
        left = next((i + 1 for i in reversed(range(L)) if not self._layer_file(i).is_file()), 0)
        if left == L and not self._gradient.at(L).exists:
            batches = own_batches(num_batches(self._wanted.windows_BT[: self._wanted.gradient_windows]))
            label_gradients(self._model.layers, self._kept(L), self._gradient.at(L), self._wanted.seed, batches)
        for index in track(reversed(range(left)), label="reading gradients", total=left):
            self._backward_layer(index)

    def _backward_layer(self, index: int) -> None:
        model, here, after = self._model, self._gradient.at(index), self._gradient.at(index + 1)
        with model.layers.holding(index):
            moment_EE = layer_gradients(
                model.layers, index, model.taps[index], self._kept(index), after, here
            )  # fmt: skip
        on_main(lambda: self._complete(index, moment_EE))
        for file in (self._forward_file(index), after.path, self._hidden.at(index + 1).path):
            file.unlink(missing_ok=True)

    def _complete(self, index: int, gradient_moment_EE: Tensor) -> None:
        stats = read_layer(self._forward_file(index))
        write_layer(self._layer_file(index), replace(stats, gradient_moment_EE=gradient_moment_EE))
