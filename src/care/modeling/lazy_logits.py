"""Logits of a window, some positions at a time: those of 32k tokens of a 128k vocabulary would be 17 GB in fp32.

The body runs once. Its output is then handed to the model's own forward in parts, so that whatever a model does to
logits, a soft cap or a scale, is done here too.
"""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


class LazyLogits:
    """Indexed as logits (1, T, vocabulary) are, by 0 and a slice of positions; only those are made."""

    def __init__(self, model: Any, output: Any) -> None:  # noqa: ANN401 - a transformers model, and what its body gave
        self._model, self._output = model, output

    def __getitem__(self, index: tuple[int, slice]) -> torch.Tensor:
        window, positions = index
        part_1tD = self._output.last_hidden_state[window : window + 1, positions]
        output = copy.copy(self._output)
        output["last_hidden_state"] = part_1tD
        with _answering(self._model.base_model, output):
            return self._model(inputs_embeds=part_1tD, use_cache=False).logits[0]


def lazy_logits(model: Any, tokens_1T: torch.Tensor) -> Any:  # noqa: ANN401
    """Logits of a window (1, T) without a cache; of a model whose body is not apart, all of them."""
    tokens_1T = tokens_1T.to(model.device)
    if model.base_model is model:
        return model(input_ids=tokens_1T, use_cache=False).logits
    return LazyLogits(model, model.base_model(input_ids=tokens_1T, use_cache=False))


@contextmanager
def _answering(body: Any, output: Any) -> Generator[None]:  # noqa: ANN401
    """The body gives this output, whatever it is asked; it may have had another forward of its own, as hooks set."""
    before = vars(body).get("forward")
    body.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before
