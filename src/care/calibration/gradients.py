"""Running second moments of gradients at keys (before RoPE) and values: the output side of two-sided weighting.

The gradient is that of the log-likelihood of labels drawn from the model itself, so that its second moment is the
Fisher information and no data set's labels enter (Kunstner et al., arXiv 1905.12558). One backward pass; only
activations get gradients, weights do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..progress import Track, silent

BATCH_TOKENS = 1024
"""Tokens per forward and backward pass: their logits and the gradients of these are in memory."""


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


def collect_gradients(
    model: Any,  # noqa: ANN401 - any transformers causal language model
    taps: Sequence[tuple[Tap, Tap]],
    windows_BT: Tensor,
    *,
    seed: int,
    track: Track = silent,
) -> list[Tensor]:
    """E[g g^T] over tokens of each layer's concatenated keys and values, fp64 on the CPU.

    `taps` say where each layer's keys and values are found. Labels are drawn with `seed`. BadInput names a layer
    whose gradients are NaN or Inf.
    """
    sums: list[Tensor | float] = [0.0] * len(taps)
    held: dict[tuple[int, int], Tensor] = {}
    hooks = [
        model.get_submodule(tap.path).register_forward_hook(_recorder(held, (layer, side)))
        for layer, pair in enumerate(taps)
        for side, tap in enumerate(pair)
    ]
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_()))
    generator = torch.Generator(model.device).manual_seed(seed)
    batches = windows_BT.split(max(BATCH_TOKENS // windows_BT.shape[1], 1))
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad = False
        for batch in track(batches, label="reading gradients", total=len(batches)):
            held.clear()
            _backward(model, batch.to(model.device), generator)
            for layer, pair in enumerate(taps):
                g_TE = torch.cat([tap.rows(held[layer, side]) for side, tap in enumerate(pair)], -1).float()
                sums[layer] = sums[layer] + (g_TE.T @ g_TE).double().cpu()
    finally:
        for p in frozen:
            p.requires_grad = True
        for hook in hooks:
            hook.remove()
    return [_mean(layer, total, windows_BT.numel()) for layer, total in enumerate(sums)]


def _mean(layer: int, total: Tensor | float, count: int) -> Tensor:
    assert isinstance(total, Tensor)
    if not bool(torch.isfinite(total).all()):
        raise BadInput(f"gradients of layer {layer} are NaN or Inf; check the source")
    return total / count


def _recorder(held: dict[tuple[int, int], Tensor], key: tuple[int, int]) -> Any:  # noqa: ANN401 - torch's hook type
    def record(_module: object, _args: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: held.__setitem__(key, gradient.detach()))

    return record


def _backward(model: Any, batch_BT: Tensor, generator: torch.Generator) -> None:  # noqa: ANN401
    """Negative log-likelihood, summed over tokens, of labels drawn from the model's own predictions."""
    with torch.enable_grad():
        logits_NV = model(input_ids=batch_BT, use_cache=False).logits.flatten(0, 1).float()
        logp_NV = logits_NV.log_softmax(-1)
        labels_N1 = torch.multinomial(logp_NV.detach().exp(), 1, generator=generator)
        (-logp_NV.gather(1, labels_N1).sum()).backward()
