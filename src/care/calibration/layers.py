"""A model's decoder layers, run one at a time: layers outside, batches inside.

Between layers there are only hidden states, so that a layer can be looked at, replaced and run again before the next
one sees its output, and so that no more than one layer's weights need to be in memory.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

EMBEDDINGS = "embeddings"
HEAD = "head"
"""The parts of a model beside its layers: what makes hidden states of tokens, and logits of hidden states."""


class Weights(Protocol):
    """Brings the weights of a part of a model into memory for as long as it is used."""

    def holding(self, part: str) -> AbstractContextManager[None]:
        """A layer by its path, EMBEDDINGS or HEAD."""
        ...


class WholeModel:
    """The weights of a model that is in memory anyway."""

    def holding(self, part: str) -> AbstractContextManager[None]:
        """Nothing is to be done."""
        del part
        return nullcontext()


class _Stopped(Exception):
    """Raised from a hook when a model has run as far as was asked."""


class DecoderLayers:
    """Decoder layers by index, on hidden states (B, T, D) of windows of one length.

    Masks, positions and rotary tables are what the model itself hands to each layer.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a transformers model
        paths: Sequence[str],
        weights: Weights,
        device: str = "cpu",
    ) -> None:
        self.model = model
        self.device = device
        self._paths, self._weights = paths, weights
        self._layers = [model.get_submodule(path) for path in paths]
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states: D."""
        return self.model.config.hidden_size

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self.model.config.vocab_size

    def holding(self, index: int) -> AbstractContextManager[None]:
        """Have a layer's weights in memory; a layer is run only within."""
        return self._weights.holding(self._paths[index])

    def embed(self, batches: Sequence[Tensor]) -> Generator[Tensor]:
        """Hidden states (B, T, D) that enter the first layer, for each batch of tokens (B, T)."""
        with self._weights.holding(EMBEDDINGS):
            for tokens_BT in batches:
                yield self._entering(tokens_BT.to(self.device))

    def _entering(self, tokens_BT: Tensor) -> Tensor:
        entered: list[Tensor] = []

        def stop(hidden_BTD: Tensor, **_: Any) -> Tensor:  # noqa: ANN401
            entered.append(hidden_BTD)
            raise _Stopped

        self._run_body(stop, input_ids=tokens_BT)
        return entered[0]

    def _run_body(self, forward: Callable[..., Tensor], **inputs: Tensor) -> None:
        with _forwards_replaced(self._layers, forward), torch.no_grad(), suppress(_Stopped):
            self.model.base_model(**inputs, use_cache=False)

    def _arguments_of(self, index: int, T: int) -> dict[str, Any]:
        """What the model hands to a layer beside hidden states of length T; no layer is run for it."""
        if T not in self._arguments:
            found: list[dict[str, Any]] = []

            def record(hidden_BTD: Tensor, **arguments: Any) -> Tensor:  # noqa: ANN401
                found.append(arguments)
                if len(found) == len(self._layers):
                    raise _Stopped
                return hidden_BTD

            self._run_body(record, inputs_embeds=torch.zeros(1, T, self.hidden_size, device=self.device))
            self._arguments[T] = found
        return self._arguments[T][index]

    def _forward(self, index: int, hidden_BTD: Tensor) -> Tensor:
        return self._layers[index](hidden_BTD, **self._arguments_of(index, hidden_BTD.shape[1]))

    def run(self, index: int, hidden_BTD: Tensor) -> Tensor:
        """What leaves a layer, with the attention that it has at the moment."""
        with torch.no_grad():
            return self._forward(index, hidden_BTD.to(self.device))

    def pulled_back(self, index: int, hidden_BTD: Tensor, gradient_BTD: Tensor) -> Tensor:
        """The gradient at what enters a layer, given that at what leaves it."""
        entering_BTD = hidden_BTD.to(self.device).detach().requires_grad_()
        with torch.enable_grad():
            leaving_BTD = self._forward(index, entering_BTD)
        return torch.autograd.grad(leaving_BTD, entering_BTD, gradient_BTD.to(self.device))[0]

    def head(self) -> AbstractContextManager[None]:
        """Have what follows the last layer in memory; logits are had only within."""
        return self._weights.holding(HEAD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) of what leaves the last layer."""
        hidden_BTD = hidden_BTD.to(self.device)
        with _forwards_replaced(self._layers, lambda _hidden, **_: hidden_BTD):
            return self.model(inputs_embeds=hidden_BTD.detach(), use_cache=False).logits

    @contextmanager
    def watched(self, path: str, sink: Callable[[Tensor], None]) -> Generator[None]:
        """Hand what a module reads to `sink` whenever it runs."""

        def hand(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            sink(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        hook = self.model.get_submodule(path).register_forward_pre_hook(hand, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def input_of(self, index: int, path: str, hidden_BTD: Tensor) -> Tensor:
        """What a module within a layer reads; the layer is run that far and no farther."""
        held: list[Tensor] = []

        def stop(read_BTD: Tensor) -> None:
            held.append(read_BTD)
            raise _Stopped

        with self.watched(path, stop), suppress(_Stopped):
            self.run(index, hidden_BTD)
        return held[0]

    def run_with_attention(self, index: int, path: str, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves a layer, and what the attention at `path` in it gave."""
        held: list[Tensor] = []
        hook = self.model.get_submodule(path).register_forward_hook(lambda _m, _a, output: held.append(output[0]))
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
