"""Running second moments of gradients at the key and value projections: the output side of two-sided weighting.

The gradient is that of the log-likelihood of labels drawn from the model itself, so that its second moment is the
Fisher information and no data set's labels enter (Kunstner et al., arXiv 1905.12558). One backward pass; only
activations get gradients, weights do not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..progress import Track, silent

BATCH_TOKENS = 1024
"""Tokens per forward and backward pass: their logits and the gradients of these are in memory."""


def collect_gradients(
    model: Any,  # noqa: ANN401 - any transformers causal language model
    projections: Sequence[tuple[str, str]],
    windows_BT: Tensor,
    *,
    seed: int,
    track: Track = silent,
) -> list[Tensor]:
    """E[g g^T] over tokens of each layer's concatenated key and value outputs, fp64 on the CPU.

    `projections` are the module paths of each layer's key and value projection. Labels are drawn with
    `seed`. BadInput names a layer whose gradients are NaN or Inf.
    """
    sums: list[Tensor | float] = [0.0] * len(projections)
    held: dict[tuple[int, int], Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(_recorder(held, (layer, side)))
        for layer, paths in enumerate(projections)
        for side, path in enumerate(paths)
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
            for layer in range(len(projections)):
                g_TE = torch.cat([held[layer, side].flatten(0, -2) for side in (0, 1)], -1).float()
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
