"""A model's decoder layers, run one at a time: layers outside, batches inside.

Between layers there are only hidden states, so that a layer can be looked at, replaced and run again before the next
one sees its output.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Stopped(Exception):
    """Raised from a hook when a layer has run as far as was asked."""


class DecoderLayers:
    """Decoder layers by index, on hidden states (B, T, D) of windows of one length.

    Masks, positions and rotary tables are what the model itself hands to each layer.
    """

    def __init__(self, model: Any, paths: Sequence[str]) -> None:  # noqa: ANN401 - a transformers model
        self._model = model
        self._layers = [model.get_submodule(path) for path in paths]
        self._arguments: list[dict[str, Any]] = []

    def embed(self, windows_BT: Tensor) -> Tensor:
        """Hidden states that enter the first layer."""
        entered: list[Tensor] = []
        with _forwards_replaced(self._layers, self._recorder(entered)), torch.inference_mode():
            for window_1T in windows_BT.split(1):
                self._arguments = []
                self._model.base_model(input_ids=window_1T.to(self._model.device), use_cache=False)
        return torch.cat(entered[:: len(self._layers)])

    def _recorder(self, entered: list[Tensor]) -> Callable[..., Tensor]:
        def record(hidden_BTD: Tensor, **arguments: Any) -> Tensor:  # noqa: ANN401
            entered.append(hidden_BTD)
            self._arguments.append(arguments)
            return hidden_BTD

        return record

    def run(self, index: int, hidden_BTD: Tensor) -> Tensor:
        """What leaves a layer, with the attention that it has at the moment."""
        with torch.inference_mode():
            return self._layers[index](hidden_BTD, **self._arguments[index])

    def input_of(self, index: int, path: str, hidden_BTD: Tensor) -> Tensor:
        """What a module within a layer reads; the layer is run that far and no farther."""
        held: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            held.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            raise _Stopped

        hook = self._model.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.run(index, hidden_BTD)
        except _Stopped:
            pass
        finally:
            hook.remove()
        return held[0]

    def run_with_attention(self, index: int, path: str, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves a layer, and what the attention at `path` in it gave."""
        held: list[Tensor] = []
        hook = self._model.get_submodule(path).register_forward_hook(lambda _m, _a, output: held.append(output[0]))
        try:
            return self.run(index, hidden_BTD), held[0]
        finally:
            hook.remove()


@contextmanager
def _forwards_replaced(layers: Sequence[nn.Module], forward: Callable[..., Tensor]) -> Generator[None]:
    """Modules keep their identity and attributes; only what calling them does is another."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
