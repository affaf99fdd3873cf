"""Converting in order: each layer is fitted to what the layers converted before it really hand to it.

Two streams of hidden states go through the decoder layers side by side, the source's and that of the converted prefix.
A layer's input moment is taken on the converted stream, and its output projection is refit so that the residual
stream after attention comes out as the source's: to the source's attention output plus whatever the two streams have
drifted apart. Where a norm stands between attention and the residual stream, to the attention output alone.
"""

from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from .calibration import DecoderLayers, MomentAccumulator
from .carried import Carried
from .modeling.native import build_layer, layer_swapped
from .refit import OutputMoments, Ridge
from .source import Source
from .types import LatentAttention, LayerStats, Target

BATCH_TOKENS = 2048
"""Tokens that go through a layer at a time."""


class Prefix:
    """The source's hidden states and the converted prefix's at the entry of the next layer to convert."""

    def __init__(self, source: Source, target: Target, refit: Ridge, windows_BT: Tensor) -> None:
        self._source, self._target, self._refit = source, target, refit
        self._layers = DecoderLayers(source.model, source.layer_paths)
        window = windows_BT.shape[1]
        entering = self._layers.embed(_spread(windows_BT, refit.tokens // window if refit.tokens else len(windows_BT)))
        self._own = list(entering.split(max(BATCH_TOKENS // window, 1)))
        self._converted = list(self._own)

    def stats(self, index: int, carried: Carried, stats: LayerStats) -> LayerStats:
        """A layer's statistics with the input moments of the converted prefix."""
        carried = carried.to(self._source.model.device, torch.float32)
        accumulator = MomentAccumulator(self._source.spec.hidden_size, carried)
        for hidden_BTD in self._converted:
            accumulator.add(self._layers.input_of(index, self._source.attention_paths[index], hidden_BTD))
        moments = accumulator.stats(index)
        return replace(
            stats, num_tokens=moments.num_tokens, input_moment_XX=moments.input_moment_XX,
            input_magnitude_X=moments.input_magnitude_X,
        )  # fmt: skip

    def fitted(self, index: int, latent: LatentAttention) -> LatentAttention:
        """The layer with its output projection refit; both streams are then past it."""
        path, moments = self._source.attention_paths[index], OutputMoments(latent)
        with self._converted_layer(index, latent):
            reads = [self._layers.input_of(index, f"{path}.o_proj", hidden_BTD) for hidden_BTD in self._converted]
        for batch, (own_BTD, converted_BTD) in enumerate(zip(self._own, self._converted, strict=True)):
            self._own[batch], added_BTD = self._layers.run_with_attention(index, path, own_BTD)
            wanted_BTD = added_BTD if self._source.architecture.post_norm else added_BTD + own_BTD - converted_BTD
            moments.add(reads[batch].flatten(0, 1), wanted_BTD.flatten(0, 1))
        latent = self._refit.output(latent, moments)
        with self._converted_layer(index, latent):
            self._converted = [self._layers.run(index, hidden_BTD) for hidden_BTD in self._converted]
        return latent

    def _converted_layer(self, index: int, latent: LatentAttention) -> AbstractContextManager[None]:
        module = build_layer(latent, self._target, index).to(self._source.device)
        return layer_swapped(self._source.model, self._source.architecture.model_type, index, module)


def _spread(windows_BT: Tensor, count: int) -> Tensor:
    """`count` windows, evenly spaced over all of them."""
    count = min(max(count, 1), len(windows_BT))
    return windows_BT[[i * len(windows_BT) // count for i in range(count)]]
