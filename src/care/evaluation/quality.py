"""Perplexity, and how far a model is from a reference: KL divergence and top-1 agreement.

All models see the same window before the next window is read, and its positions go by a few at a time, so that neither
logits of a whole window nor those of a reference need to be stored. Log-probabilities are fp32, sums fp64. What each
figure means is in docs/evaluate.md.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..errors import BadInput
from ..progress import Track, silent


class Positions(Protocol):
    """Logits (1, T, vocabulary), of which some positions are asked for at a time."""

    def __getitem__(self, index: tuple[int, slice], /) -> Tensor:
        """Of [0, positions]: (t, vocabulary)."""
        ...


Logits = Callable[[Tensor], Positions]
"""Token ids (1, T) to logits: a tensor, or what makes them when they are asked for."""

CHUNK = 256
"""Positions whose log-probabilities are held at a time."""

FIRST_BUCKET = 64
"""Positions in the first bucket; each further one ends at the next power of two."""

SUMS = ("nll", "nll_squared", "kl", "kl_squared", "agreed")


@dataclass
class _Sums:
    """Sums over windows, for each position apart: five rows, in the order of SUMS."""

    num_positions: int
    windows: int = 0
    seconds: float = 0.0
    sums_5T: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums_5T = torch.zeros(len(SUMS), self.num_positions, dtype=torch.float64)

    @contextmanager
    def timed(self) -> Generator[None]:
        """Count the seconds within."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def add(self, part: slice, logp_tV: Tensor, labels_t: Tensor, base_tV: Tensor | None) -> None:
        """What is found at some positions of one window; `base_tV` are the reference's log-probabilities."""
        nll_t = label_nll(logp_tV, labels_t)
        rows = [nll_t, nll_t.square()]
        if base_tV is not None:
            kl_t = (base_tV.exp() * (base_tV - logp_tV)).sum(-1).double()
            rows += [kl_t, kl_t.square(), (base_tV.argmax(-1) == logp_tV.argmax(-1)).double()]
        self.sums_5T[: len(rows), part] += torch.stack(rows).cpu()


@dataclass(frozen=True)
class Bucket:
    """Means over predictions from `first` to `last`, both counted: how many tokens came before the last one read."""

    first: int
    last: int
    predictions: int
    nll: float
    nll_error: float
    kl: float | None
    kl_error: float | None
    top1_agreement: float | None
    top1_error: float | None


@dataclass(frozen=True)
class Quality:
    """Means over all predictions; kl, top1_agreement and their errors are None without a reference.

    nll and kl are in nats per token; errors are standard errors, as if predictions were independent. `buckets` are the
    same by position in the window.
    """

    predictions: int
    nll: float
    nll_error: float
    kl: float | None
    top1_agreement: float | None
    seconds: float
    kl_error: float | None = None
    top1_error: float | None = None
    buckets: tuple[Bucket, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll)


def measure(
    models: Mapping[str, Logits],
    windows_BT: Tensor,
    *,
    reference: str | None = None,
    skip: int = 0,
    track: Track = silent,
) -> dict[str, Quality]:
    """Quality of every model on token windows (B, T), one window at a time.

    `reference` names the model against which KL(reference || model) is taken. The first `skip` predictions of each
    window are read, not counted: what is left is quality far from the start. BadInput if nothing is left.
    """
    if not 0 <= skip < windows_BT.shape[1] - 1:
        raise BadInput(f"a window of {windows_BT.shape[1]} tokens has no predictions behind the first {skip}")
    sums = {name: _Sums(windows_BT.shape[1] - 1 - skip) for name in models}
    order = sorted(models, key=lambda name: name != reference)
    with torch.inference_mode():
        for window_T in track(windows_BT, label="evaluating", total=len(windows_BT)):
            found = dict[str, Positions]()
            for name in order:
                with sums[name].timed():
                    found[name] = models[name](window_T[None])
            for part in chunks(skip, len(window_T) - 1):
                base_tV: Tensor | None = None
                for name in order:
                    with sums[name].timed():
                        logp_tV = found[name][0, part].float().log_softmax(-1)
                    if name == reference:
                        base_tV = logp_tV
                    labels_t = window_T[part.start + 1 : part.stop + 1]
                    sums[name].add(slice(part.start - skip, part.stop - skip), logp_tV, labels_t, base_tV)
            for one in sums.values():
                one.windows += 1
    return {name: _means(name, sums[name], skip, with_reference=reference is not None) for name in models}


def chunks(first: int, end: int) -> Iterator[slice]:
    """CHUNK positions at a time, from `first` up to `end`."""
    return (slice(start, min(start + CHUNK, end)) for start in range(first, end, CHUNK))


def label_nll(logp_tV: Tensor, labels_t: Tensor) -> Tensor:
    """Negative log-probabilities of labels: (t) in fp64."""
    return -logp_tV.gather(1, labels_t.to(logp_tV.device)[:, None])[:, 0].double()


def check_finite_nll(name: str, nll: float) -> None:
    """BadInput that names the model where its likelihoods are no numbers."""
    if not math.isfinite(nll):
        raise BadInput(f"model {name} gives NaN or infinite logits; its weights are damaged or its dtype too small")


def _means(name: str, sums: _Sums, skip: int, *, with_reference: bool) -> Quality:
    whole = _bucket(sums, skip, skip, skip + sums.num_positions, with_reference=with_reference)
    check_finite_nll(name, whole.nll)
    edges = [0, FIRST_BUCKET]
    while edges[-1] < skip + sums.num_positions:
        edges.append(2 * edges[-1])
    buckets = tuple(
        _bucket(sums, skip, max(first, skip), min(end, skip + sums.num_positions), with_reference=with_reference)
        for first, end in pairwise(edges)
        if end > skip
    )
    return Quality(
        predictions=whole.predictions, nll=whole.nll, nll_error=whole.nll_error, kl=whole.kl, kl_error=whole.kl_error,
        top1_agreement=whole.top1_agreement, top1_error=whole.top1_error, seconds=sums.seconds, buckets=buckets,
    )  # fmt: skip


def _bucket(sums: _Sums, skip: int, first: int, end: int, *, with_reference: bool) -> Bucket:
    """Means over positions from `first` up to `end`; sums begin at position `skip`."""
    n = sums.windows * (end - first)
    of = dict(zip(SUMS, sums.sums_5T[:, first - skip : end - skip].sum(1).tolist(), strict=True))
    nll, nll_error = mean_and_error(of["nll"], of["nll_squared"], n)
    kl, kl_error = mean_and_error(of["kl"], of["kl_squared"], n) if with_reference else (None, None)
    # Ones and zeros are their own squares.
    top1, top1_error = mean_and_error(of["agreed"], of["agreed"], n) if with_reference else (None, None)
    return Bucket(first, end - 1, n, nll, nll_error, kl, kl_error, top1, top1_error)


def mean_and_error(total: float, total_squared: float, n: int) -> tuple[float, float]:
    """Mean and its standard error from sums over n independent terms."""
    mean = total / n
    return mean, math.sqrt(max(total_squared / n - mean**2, 0.0) / n)
