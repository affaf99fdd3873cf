"""The best frequency folding of RoRoPE, chosen on the calibration text as TransMLA does.

Each candidate is run with the latent at full rank, so that only the lost rotations count.
"""

from dataclasses import dataclass, replace

import torch

from .calibration import Calibration
from .evaluation.quality import measure
from .factorization import Svd, factorize
from .modeling.native import attention_swapped, build_attention
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
        latents = _full_rank(source, replace(split, folding=folding), calibration)
        target = Target(source.config, source.spec, "absorbed", None, deepseek_body=False, dtype=torch.float32)
        modules = build_attention(latents, target)
        with attention_swapped(source.model, source.architecture.model_type, modules):
            tried[folding] = measure({"": source.logits}, windows_BT)[""].perplexity
        if tried[folding] > min(tried.values()):
            break
    return FoldingSearch(tried, min(tried, key=lambda f: tried[f]))


def _full_rank(source: Source, split: RoRope, calibration: Calibration) -> list[LatentAttention]:
    latents = []
    for index in range(source.spec.num_layers):
        weights = source.attention(index)
        slots = split(weights, calibration.layers[index])
        keys = slots.split(len(slots.frequencies))
        X = source.spec.feature_width
        ranks = LayerRanks(
            2 * len(slots.frequencies), min(len(keys.rest_MX), X), min(source.spec.kv_width, X), joint=False
        )
        latents.append(factorize(Svd(), weights, keys, None, ranks).latent)
    return latents
