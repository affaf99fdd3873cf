"""Running second moments of the features of every layer's attention input, from one pass of the source model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import features
from ..carried import Carried
from ..errors import BadInput
from ..progress import Track, silent
from ..types import LayerStats
from .inputs import feed_inputs

BATCH_TOKENS = 2048
"""Tokens per forward pass."""


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
        """Means so far; BadInput names the layer when an activation was NaN or Inf."""
        if not bool(torch.isfinite(self._outer_XX).all()):
            raise BadInput(f"activations of layer {layer} are NaN or Inf; try --dtype float32, or check the source")
        return LayerStats(self.num_tokens, self._outer_XX / self.num_tokens, self._magnitude_X / self.num_tokens)


def collect_moments(
    model: Any,  # noqa: ANN401 - any transformers causal language model
    attention_paths: Sequence[str],
    carried: Sequence[Carried],
    windows_BT: Tensor,
    *,
    track: Track = silent,
) -> list[LayerStats]:
    """Statistics of the attention modules at `attention_paths` over token windows (B, T).

    `carried` is what each layer's features are made with. Runs the model's body only: no logits are computed.
    """
    hidden_size = model.config.hidden_size
    accumulators = [MomentAccumulator(hidden_size, c.to(model.device, torch.float32)) for c in carried]
    batches = windows_BT.split(max(BATCH_TOKENS // windows_BT.shape[1], 1))
    sinks = [accumulator.add for accumulator in accumulators]
    feed_inputs(model, attention_paths, sinks, batches, label="calibrating", track=track)
    return [accumulator.stats(layer) for layer, accumulator in enumerate(accumulators)]
