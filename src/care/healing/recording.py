"""Forward and backward passes, and what the optimizer does with gradients, as one CUDA graph each.

A step of a small model is ten thousand operations, and starting each from Python takes longer than most of them do. A
graph is recorded once and then started as a whole.
"""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import BadInput, first_line

WARM_UPS = 3
"""Passes before the recording, in which kernels are chosen and compiled: neither can happen while it runs."""


class RecordedPasses:
    """What `passes` does to windows (B, T) of one shape: it adds to gradients and returns a tensor, again and again.

    Gradients are zero when this is made. They keep their place in memory: zero them, do not drop them. What is returned
    is overwritten by the next call. BadInput where passes look at values, as some rope scalings and experts do.
    """

    def __init__(self, passes: Callable[[Tensor], Tensor], like_BT: Tensor, parameters: Iterable[Tensor]) -> None:
        self._tokens_BT = like_BT.clone()
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                passes(self._tokens_BT)
        current.wait_stream(aside)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                self._found = passes(self._tokens_BT)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise BadInput(
                f"--cuda-graph: this model's passes cannot be recorded ({first_line(error)}); leave it out"
            ) from error

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Make the passes on other windows of the same shape."""
        self._tokens_BT.copy_(tokens_BT)
        self._graph.replay()
        return self._found


class RecordedUpdate:
    """An optimizer's step, again and again; one that can be recorded (`capturable`), whose rates are tensors.

    The first is made as always, as moments are made in it, and kernels loaded. Weights, gradients, moments and rates
    keep their place in memory from then on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._graph: torch.cuda.CUDAGraph | None = None
        self._made = False

    def __call__(self) -> None:
        """Make the step."""
        if not self._made:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*running without CUDA graph capture")
                self._optimizer.step()
            self._made = True
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._optimizer.step()
        self._graph.replay()
