"""The best frequency folding of RoRoPE, chosen on the calibration text as TransMLA does.

Each candidate is run with the latent at full rank, so that only the lost rotations count.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .calibration import Calibration
from .evaluation.quality import measure
from .factorization import Svd, factorize
from .modeling.native import build_layer, layer_swapped
from .progress import Track, silent
from .rope_split import RoRope
from .source import Source
from .types import LatentAttention, LayerRanks, Target

SEARCH_TOKENS = 2048
"""Calibration tokens on which candidates are compared."""


@dataclass(frozen=True)
class FoldingSearch:
    """Perplexity on calibration tokens by folding, and the winner."""

    perplexity: dict[int, float]
    best: int


def choose_folding(source: Source, split: RoRope, calibration: Calibration, *, track: Track = silent) -> FoldingSearch:
    """Try the collapse and its doublings until the perplexity rises (TransMLA, appendix C)."""
    windows_BT = calibration.windows_BT[: max(SEARCH_TOKENS // calibration.windows_BT.shape[1], 1)]
    tried: dict[int, float] = {}
    candidates = split.candidates(source.spec.num_pairs)
    for folding in track(candidates, label="choosing the frequency folding", total=len(candidates)):
        tried[folding] = _perplexity(source, replace(split, folding=folding), calibration, windows_BT)
        if tried[folding] > min(tried.values()):
            break
    return FoldingSearch(tried, min(tried, key=lambda f: tried[f]))


def _perplexity(source: Source, split: RoRope, calibration: Calibration, windows_BT: Tensor) -> float:
    """Of the model with every layer's keys split, one layer in memory at a time."""
    layers, model_type = source.layers, source.architecture.model_type
    target = Target(source.config, source.spec, "absorbed", None, deepseek_body=False, dtype=torch.float32)
    hidden = list(layers.embed(windows_BT.split(1)))
    for index in range(len(layers)):
        module = build_layer(_full_rank(source, split, calibration, index), target, index).to(source.device)
        with layers.holding(index), layer_swapped(layers.model, model_type, index, module):
            hidden = [layers.run(index, hidden_BTD) for hidden_BTD in hidden]
    left = iter(hidden)
    with layers.head():
        return measure({"": lambda _tokens_BT: layers.logits(next(left))}, windows_BT)[""].perplexity


def _full_rank(source: Source, split: RoRope, calibration: Calibration, index: int) -> LatentAttention:
    """A layer of which only rotations are lost."""
    weights = source.attention(index)
    slots = split(weights, calibration.layers[index])
    keys = slots.split(len(slots.frequencies))
    X = source.spec.feature_width
    ranks = LayerRanks(2 * len(slots.frequencies), min(len(keys.rest_MX), X), min(source.spec.kv_width, X), joint=False)
    return factorize(Svd(), weights, keys, None, ranks).latent
