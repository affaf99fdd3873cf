"""Running second moments of gradients at keys (before RoPE) and values: the output side of two-sided weighting.

The gradient is that of the log-likelihood of labels drawn from the model itself, so that its second moment is the
Fisher information and no data set's labels enter (Kunstner et al., arXiv 1905.12558). One backward pass, a layer at a
time from the last; only activations get gradients, weights do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..ranks import count_over_ranks, sum_over_ranks
from .layers import DecoderLayers
from .streams import Stream, batch_size


@dataclass(frozen=True)
class Tap:
    """Where keys or values can be read off a running model: a module's output, or `width` columns of it.

    The output is (B, T, columns), or has heads apart: (B, T, heads, K), with `heads_first` (B, heads, T, K).
    """

    path: str
    first: int = 0
    width: int | None = None
    heads_first: bool = False

    def rows(self, output: Tensor) -> Tensor:
        """One row per token: (B * T, E)."""
        output = output.transpose(1, 2) if self.heads_first else output
        rows = output.flatten(2).flatten(0, 1)
        return rows if self.width is None else rows[:, self.first : self.first + self.width]


def label_gradients(layers: DecoderLayers, leaving: Stream, gradients: Stream, seed: int, batches: range) -> None:
    """Gradients at what leaves the last layer, of the negative log-likelihood of labels drawn from the model.

    The likelihood is summed over tokens. `batches` says which of all batches the stream's are. For those of other
    processes draws are made and dropped, so that labels are the same however windows are split.
    """
    generator = torch.Generator(layers.device).manual_seed(seed)
    T = leaving.shape[1]

    def made() -> Iterator[Tensor]:
        for hidden_BTD, before in zip(leaving.batches(), _gaps(batches), strict=True):
            for _ in range(before):
                uniform_NV = torch.ones(batch_size(T) * T, layers.vocabulary_size, device=layers.device)
                torch.multinomial(uniform_NV, 1, generator=generator)
            yield _label_gradient(layers, hidden_BTD, generator)

    with layers.head():
        gradients.write(made())


def _gaps(batches: range) -> list[int]:
    """How many batches of others lie before each."""
    return [index - last - 1 for last, index in zip([-1, *batches], batches, strict=False)]


def _label_gradient(layers: DecoderLayers, hidden_BTD: Tensor, generator: torch.Generator) -> Tensor:
    hidden_BTD = hidden_BTD.to(layers.device).requires_grad_()
    with torch.enable_grad():
        logp_NV = layers.logits(hidden_BTD).flatten(0, 1).float().log_softmax(-1)
        labels_N1 = torch.multinomial(logp_NV.detach().exp(), 1, generator=generator)
        loss = -logp_NV.gather(1, labels_N1).sum()
    return torch.autograd.grad(loss, hidden_BTD)[0]


def layer_gradients(
    layers: DecoderLayers, index: int, taps: tuple[Tap, Tap], entering: Stream, arriving: Stream, leaving: Stream
) -> Tensor:
    """E[g g^T] over all processes' tokens of a layer's concatenated keys and values, fp64 on the CPU.

    `taps` say where keys and values are found. The layer is run again on what entered it, and gradients go back
    from `arriving`, those at its end, to `leaving`. BadInput names a layer whose gradients are NaN or Inf.
    """
    held: dict[int, Tensor] = {}
    sums: list[Tensor] = []
    hooks = [
        layers.model.get_submodule(tap.path).register_forward_hook(_recorder(held, side))
        for side, tap in enumerate(taps)
    ]

    def back() -> Iterator[Tensor]:
        for hidden_BTD, gradient_BTD in zip(entering.batches(), arriving.batches(), strict=True):
            yield layers.pulled_back(index, hidden_BTD, gradient_BTD)
            g_TE = torch.cat([tap.rows(held[side]) for side, tap in enumerate(taps)], -1).float()
            sums[:] = [sum(sums, (g_TE.T @ g_TE).double().cpu())]

    try:
        leaving.write(back())
    finally:
        for hook in hooks:
            hook.remove()
    # A process without windows does not know the width; the others all know the same.
    E = count_over_ranks(sum(map(len, sums))) // count_over_ranks(len(sums))
    sum_EE = sum_over_ranks(sums[0] if sums else torch.zeros(E, E, dtype=torch.float64))
    if not bool(torch.isfinite(sum_EE).all()):
        raise BadInput(f"gradients of layer {index} are NaN or Inf; check the source")
    return sum_EE / count_over_ranks(entering.shape[0] * entering.shape[1])


def _recorder(held: dict[int, Tensor], side: int) -> Any:  # noqa: ANN401 - torch's hook type
    def record(_module: object, _args: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: held.__setitem__(side, gradient.detach()))

    return record
