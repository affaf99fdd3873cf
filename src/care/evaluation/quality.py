"""Perplexity, and how far a model is from a reference: KL divergence and top-1 agreement.

All models see the same window before the next window is read, so that a reference's logits are never stored.
Log-probabilities are fp32, sums fp64.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..progress import Track, silent

Logits = Callable[[Tensor], Tensor]
"""Token ids (1, T) to logits (1, T, vocabulary)."""

CHUNK = 256
"""Positions whose log-probabilities are held at a time."""


@dataclass
class _Sums:
    nll: float = 0.0
    nll_squared: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    predictions: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Quality:
    """Means over all predictions; kl and top1_agreement are None without a reference.

    nll is in nats per token, and nll_error its standard error.
    """

    predictions: int
    nll: float
    nll_error: float
    kl: float | None
    top1_agreement: float | None
    seconds: float

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
    sums = {name: _Sums() for name in models}
    order = sorted(models, key=lambda name: name != reference)
    with torch.inference_mode():
        for window_T in track(windows_BT, label="evaluating", total=len(windows_BT)):
            base_TV: Tensor | None = None
            for name in order:
                start = time.perf_counter()
                logits_TV = models[name](window_T[None])[0, skip:-1]
                sums[name].seconds += time.perf_counter() - start
                if name == reference:
                    base_TV = logits_TV
                _add(sums[name], logits_TV, window_T[skip + 1 :].to(logits_TV.device), base_TV)
    return {name: _means(name, sums[name], with_reference=reference is not None) for name in models}


def _add(sums: _Sums, logits_TV: Tensor, labels_T: Tensor, base_TV: Tensor | None) -> None:
    for start in range(0, len(labels_T), CHUNK):
        part = slice(start, start + CHUNK)
        logp_TV = logits_TV[part].float().log_softmax(-1)
        nll_T = -logp_TV.gather(1, labels_T[part, None])[:, 0].double()
        sums.nll += float(nll_T.sum())
        sums.nll_squared += float(nll_T.square().sum())
        sums.predictions += len(nll_T)
        if base_TV is not None:
            base_logp_TV = base_TV[part].float().log_softmax(-1)
            sums.kl += float((base_logp_TV.exp() * (base_logp_TV - logp_TV)).sum(-1).double().sum())
            sums.agreed += int((base_logp_TV.argmax(-1) == logp_TV.argmax(-1)).sum())


def _means(name: str, sums: _Sums, *, with_reference: bool) -> Quality:
    n = sums.predictions
    mean = sums.nll / n
    if not math.isfinite(mean):
        raise BadInput(f"model {name} gives NaN or infinite logits; its weights are damaged or its dtype too small")
    deviation = math.sqrt(max(sums.nll_squared / n - mean**2, 0.0))
    return Quality(
        predictions=n,
        nll=mean,
        nll_error=deviation / math.sqrt(n),
        kl=sums.kl / n if with_reference else None,
        top1_agreement=sums.agreed / n if with_reference else None,
        seconds=sums.seconds,
    )
