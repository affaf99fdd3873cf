"""How far each query head looks: its attention by distance, which fixes the mean phase of a lost rotation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import attention_probabilities
from ..progress import Track, silent
from ..types import AttentionWeights
from .inputs import feed_inputs


class DistanceAccumulator:
    """Sums of attention by distance per head; the sink token at the start of a window is left out."""

    def __init__(self, weights: Callable[[], AttentionWeights]) -> None:
        self._weights = weights
        self._sum_HT: Tensor | None = None

    def add(self, x_BTD: Tensor) -> None:
        """Add a batch of attention inputs."""
        weights = self._weights()
        for x_TD in x_BTD:
            attention_HTU = attention_probabilities(weights, x_TD)
            attention_HTU[:, :, 0] = 0
            T = x_TD.shape[0]
            position = torch.arange(T, device=x_TD.device)
            distance = (position[:, None] - position).clamp(min=0).flatten()
            sums = torch.zeros(attention_HTU.shape[0], T, device=x_TD.device)
            sums.index_add_(1, distance, attention_HTU.flatten(1))
            self._sum_HT = sums.double().cpu() + (0.0 if self._sum_HT is None else self._sum_HT)

    def share(self) -> Tensor:
        """Attention by distance, each head's summing to one: (H, T) fp64."""
        assert self._sum_HT is not None
        return self._sum_HT / self._sum_HT.sum(1, keepdim=True).clamp(min=1e-30)


def collect_distances(
    model: Any,  # noqa: ANN401 - any transformers causal language model
    attention_paths: Sequence[str],
    layer_weights: Callable[[int], AttentionWeights],
    windows_BT: Tensor,
    *,
    track: Track = silent,
) -> list[Tensor]:
    """Attention by distance (H, T) of every layer over windows (B, T) as long as the contexts to be served.

    Probabilities are computed from the layer inputs, one sequence and layer at a time, so that the model
    can run with any attention backend.
    """
    device = model.device

    def weights_of(layer: int) -> Callable[[], AttentionWeights]:
        return lambda: layer_weights(layer).to(device, torch.float32)

    accumulators = [DistanceAccumulator(weights_of(layer)) for layer in range(len(attention_paths))]
    sinks = [accumulator.add for accumulator in accumulators]
    feed_inputs(model, attention_paths, sinks, windows_BT.split(1), label="reading attention", track=track)
    return [accumulator.share() for accumulator in accumulators]
