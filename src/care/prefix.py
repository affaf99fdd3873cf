"""Converting in order: each layer is fitted to what the layers converted before it really hand to it.

Two streams of hidden states go through the decoder layers side by side, the source's and that of the converted prefix.
A layer's input moment is taken on the converted stream, and its output projection is refit so that the residual
stream after attention comes out as the source's: to the source's attention output plus whatever the two streams have
drifted apart. Where a norm stands between attention and the residual stream, to the attention output alone.

Both streams are files: the streams that enter a layer are there until the layer after it is begun, so that a
conversion that was killed goes on from them. Several processes go through the layers together, each with windows of
its own; moments are over those of all, so that all make the same layers.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .calibration import DecoderLayers, MomentAccumulator, Stream, batches_of, own_windows
from .carried import Carried
from .modeling.native import build_layer, layer_swapped
from .ranks import own_directory
from .refit import OutputMoments, Ridge
from .source import Source
from .types import LatentAttention, LayerStats, Target


class Prefix:
    """The source's hidden states and the converted prefix's at the entry of the next layer to convert."""

    def __init__(self, source: Source, target: Target, refit: Ridge, windows_BT: Tensor, directory: Path) -> None:
        self._source, self._target, self._refit = source, target, refit
        self._layers = source.layers
        window = windows_BT.shape[1]
        self._windows_BT = own_windows(windows_BT[: max(refit.tokens // window, 1)] if refit.tokens else windows_BT)
        streams = own_directory(directory)
        shape = (len(self._windows_BT), window, self._layers.hidden_size)
        self._own, self._converted = (Stream(streams, name, shape) for name in ("own", "converted"))

    def stats(self, index: int, carried: Carried, stats: LayerStats) -> LayerStats:
        """A layer's statistics with the input moments of the converted prefix."""
        self._enter(index)
        carried = carried.to(torch.device(self._source.device), torch.float32)
        accumulator = MomentAccumulator(self._layers.hidden_size, carried)
        with self._layers.holding(index):
            for hidden_BTD in self._converted.at(index).batches():
                accumulator.add(self._layers.input_of(index, self._source.attention_paths[index], hidden_BTD))
        moments = accumulator.stats(index)
        return replace(
            stats, num_tokens=moments.num_tokens, input_moment_XX=moments.input_moment_XX,
            input_magnitude_X=moments.input_magnitude_X,
        )  # fmt: skip

    def _enter(self, index: int) -> None:
        """Make the streams at the first layer, or drop those of the layer before: its successors are there."""
        for stream in (self._own, self._converted):
            if index:
                stream.at(index - 1).remove()
            elif not stream.exists:
                stream.write(self._layers.embed(batches_of(self._windows_BT)))

    def fitted(self, index: int, latent: LatentAttention) -> LatentAttention:
        """The layer with its output projection refit; both streams are then past it."""
        self._enter(index)
        moments = OutputMoments.of(latent)
        with self._layers.holding(index):
            module, path = self._module(index, latent), self._source.attention_paths[index]

            def read(converted_BTD: Tensor) -> Tensor:
                with self._swapped(index, module):
                    return self._layers.input_of(index, f"{path}.o_proj", converted_BTD)

            entering = (self._own.at(index), self._converted.at(index))
            post_norm = self._source.architecture.post_norm
            left = compared(self._layers, index, path, entering, read, moments, post_norm=post_norm)
            self._own.at(index + 1).write(left)
            latent = self._refit.output(latent, moments)
            with self._swapped(index, self._module(index, latent)):
                batches = self._converted.at(index).batches()
                self._converted.at(index + 1).write(self._layers.run(index, hidden_BTD) for hidden_BTD in batches)
        return latent

    def _module(self, index: int, latent: LatentAttention) -> nn.Module:
        return build_layer(latent, self._target, index).to(self._source.device)

    def _swapped(self, index: int, module: nn.Module) -> AbstractContextManager[None]:
        return layer_swapped(self._layers.model, self._source.architecture.model_type, index, module)


def compared(
    source: DecoderLayers,
    index: int,
    path: str,
    entering: tuple[Stream, Stream],
    read: Callable[[Tensor], Tensor],
    moments: OutputMoments,
    *,
    post_norm: bool,
    scale: float = 1.0,
) -> Iterator[Tensor]:
    """What leaves a layer of the source (B, T, D), batch by batch; moments are taken on the way.

    `entering` are the source's stream and the converted model's, `read` says what the latter's output projection
    reads of its own. It should give the source's attention output and, without a norm behind it, what the two streams
    have drifted apart. The converted residual stream is `scale` times the source's.
    """
    for own_BTD, converted_BTD in zip(*(stream.batches() for stream in entering), strict=True):
        read_BTZ = read(converted_BTD)
        left_BTD, added_BTD = source.run_with_attention(index, path, own_BTD)
        wanted_BTD = added_BTD * scale
        if not post_norm:
            wanted_BTD = wanted_BTD + (own_BTD * scale - converted_BTD).to(added_BTD.device)
        moments.add(read_BTZ.flatten(0, 1), wanted_BTD.flatten(0, 1))
        yield left_BTD
