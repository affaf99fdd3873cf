"""Running second moments of the features of a layer's attention input."""

import torch
from torch import Tensor

from ..attention import features
from ..carried import Carried
from ..errors import BadInput
from ..ranks import count_over_ranks, sum_over_ranks
from ..types import LayerStats
from .layers import DecoderLayers
from .streams import Stream


class MomentAccumulator:
    """Sums of phi phi^T and |phi| over tokens: products in fp32, sums in fp64."""

    def __init__(self, hidden_size: int, carried: Carried) -> None:
        self.num_tokens = 0
        self._carried = carried
        X = carried.feature_width(hidden_size)
        self._outer_XX = torch.zeros(X, X, dtype=torch.float64)
        self._magnitude_X = torch.zeros(X, dtype=torch.float64)

    def add(self, x_BTD: Tensor) -> None:
        """Add a batch of inputs."""
        phi_TX = features(self._carried, x_BTD.detach().flatten(0, -2).float())
        self.num_tokens += phi_TX.shape[0]
        self._outer_XX += (phi_TX.T @ phi_TX).cpu()
        self._magnitude_X += phi_TX.abs().sum(0).cpu()

    def stats(self, layer: int) -> LayerStats:
        """Means so far, over all processes; BadInput names the layer when an activation was NaN or Inf."""
        num_tokens = count_over_ranks(self.num_tokens)
        outer_XX, magnitude_X = sum_over_ranks(self._outer_XX), sum_over_ranks(self._magnitude_X)
        if not bool(torch.isfinite(outer_XX).all()):
            raise BadInput(f"activations of layer {layer} are NaN or Inf; try --dtype float32, or check the source")
        return LayerStats(num_tokens, outer_XX / num_tokens, magnitude_X / num_tokens)


def layer_moments(
    layers: DecoderLayers, index: int, path: str, carried: Carried, entering: Stream, leaving: Stream
) -> LayerStats:
    """Statistics of the attention at `path` in a layer, which is run from one stream to the next.

    `carried` is what the layer's features are made with.
    """
    accumulator = MomentAccumulator(layers.hidden_size, carried.to(torch.device(layers.device), torch.float32))
    with layers.watched(path, accumulator.add):
        leaving.write(layers.run(index, hidden_BTD) for hidden_BTD in entering.batches())
    return accumulator.stats(index)
