"""Running second moments of every layer's attention input, from one pass of the source model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..progress import Track, silent
from ..types import LayerStats
from .inputs import feed_inputs

BATCH_TOKENS = 2048
"""Tokens per forward pass."""


class MomentAccumulator:
    """Sums of x x^T and |x| over tokens: products in fp32, sums in fp64."""

    def __init__(self, hidden_size: int) -> None:
        self.num_tokens = 0
        self._outer_DD = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        self._magnitude_D = torch.zeros(hidden_size, dtype=torch.float64)

    def add(self, x_BTD: Tensor) -> None:
        """Add a batch of inputs."""
        x_TD = x_BTD.detach().flatten(0, -2).float()
        self.num_tokens += x_TD.shape[0]
        self._outer_DD += (x_TD.T @ x_TD).cpu()
        self._magnitude_D += x_TD.abs().sum(0).cpu()

    def stats(self, layer: int) -> LayerStats:
        """Means so far; BadInput names the layer when an activation was NaN or Inf."""
        if not bool(torch.isfinite(self._outer_DD).all()):
            raise BadInput(f"activations of layer {layer} are NaN or Inf; try --dtype float32, or check the source")
        return LayerStats(self.num_tokens, self._outer_DD / self.num_tokens, self._magnitude_D / self.num_tokens)


def collect_moments(
    model: Any,  # noqa: ANN401 - any transformers causal language model
    attention_paths: Sequence[str],
    windows_BT: Tensor,
    *,
    track: Track = silent,
) -> list[LayerStats]:
    """Statistics of the attention modules at `attention_paths` over token windows (B, T).

    Runs the model's body only: no logits are computed.
    """
    accumulators = [MomentAccumulator(model.config.hidden_size) for _ in attention_paths]
    batches = windows_BT.split(max(BATCH_TOKENS // windows_BT.shape[1], 1))
    sinks = [accumulator.add for accumulator in accumulators]
    feed_inputs(model, attention_paths, sinks, batches, label="calibrating", track=track)
    return [accumulator.stats(layer) for layer, accumulator in enumerate(accumulators)]
