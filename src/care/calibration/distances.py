"""How far each query head looks: its attention by distance, which fixes the mean phase of a lost rotation."""

import torch
from torch import Tensor

from ..attention import attention_probabilities
from ..ranks import sum_over_ranks
from ..types import AttentionWeights
from .layers import DecoderLayers
from .streams import Stream


class DistanceAccumulator:
    """Sums of attention by distance per head; the sink token at the start of a window is left out."""

    def __init__(self, weights: AttentionWeights, T: int) -> None:
        self._weights = weights
        self._sum_HT = torch.zeros(weights.q_HKD.shape[0], T, dtype=torch.float64)

    def add(self, x_BTD: Tensor) -> None:
        """Add a batch of attention inputs."""
        for x_TD in x_BTD:
            attention_HTU = attention_probabilities(self._weights, x_TD)
            attention_HTU[:, :, 0] = 0
            T = x_TD.shape[0]
            position = torch.arange(T, device=x_TD.device)
            distance = (position[:, None] - position).clamp(min=0).flatten()
            sums = torch.zeros(attention_HTU.shape[0], T, device=x_TD.device)
            sums.index_add_(1, distance, attention_HTU.flatten(1))
            self._sum_HT += sums.double().cpu()

    def share(self) -> Tensor:
        """Attention by distance over all processes, each head's summing to one: (H, T) fp64."""
        sum_HT = sum_over_ranks(self._sum_HT)
        return sum_HT / sum_HT.sum(1, keepdim=True).clamp(min=1e-30)


def layer_distances(
    layers: DecoderLayers, index: int, path: str, weights: AttentionWeights, entering: Stream, leaving: Stream
) -> Tensor:
    """Attention by distance (H, T) of the attention at `path` in a layer, run from one stream to the next.

    The streams are of windows as long as the contexts to be served. Probabilities are computed from the layer's
    inputs, one sequence at a time, so that the model can run with any attention backend.
    """
    accumulator = DistanceAccumulator(weights.to(torch.device(layers.device), torch.float32), entering.shape[1])
    with layers.watched(path, accumulator.add):
        leaving.write(layers.run(index, hidden_BTD) for hidden_BTD in entering.batches())
    return accumulator.share()
