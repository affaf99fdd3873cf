"""Running a model's body and handing every layer's attention input to whoever sums it up."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import Track


def feed_inputs(
    model: Any,  # noqa: ANN401 - any transformers causal language model
    attention_paths: Sequence[str],
    sinks: Sequence[Callable[[Tensor], None]],
    batches: Sequence[Tensor],
    *,
    label: str,
    track: Track,
) -> None:
    """Call the sink of each attention module with its input (B, T, D), for token batches (B, T).

    No logits are computed, and the model is left as it was.
    """
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(_handing_to(sink), with_kwargs=True)
        for path, sink in zip(attention_paths, sinks, strict=True)
    ]
    try:
        with torch.inference_mode():
            for batch in track(batches, label=label, total=len(batches)):
                model.base_model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def _handing_to(sink: Callable[[Tensor], None]) -> Any:  # noqa: ANN401 - torch's hook type
    def hand(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        sink(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    return hand
