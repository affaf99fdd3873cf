"""All methods at equal cache: one calibration, one pass over the text for every variant.

Variants live in memory as attention modules of the source model, so a comparison writes no checkpoints.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calibration import Calibration
from .conversion import convert_layers
from .errors import InvalidRecipe
from .evaluation import CacheUse, Quality, live_cache, measure
from .evaluation.quality import Logits
from .folding import FoldingSearch
from .modeling.native import attention_swapped, build_attention
from .plan import Plan, plan_conversion
from .progress import Track, silent
from .recipe import Recipe
from .rope_split import RopeSplit
from .source import Source

SOURCE = "source"


@dataclass(frozen=True)
class Variant:
    """One recipe at one budget; `refused` says why it cannot be had."""

    recipe: Recipe
    kv_budget: float
    plan: Plan | None
    modules: Sequence[nn.Module]
    seconds: float
    refused: str | None

    @property
    def name(self) -> str:
        """Recipe and budget."""
        return f"{self.recipe.name} {self.kv_budget:g}"


@dataclass(frozen=True)
class Comparison:
    """Quality on each text, and live cache, of the source and of every variant that could be had."""

    variants: list[Variant]
    quality: dict[str, dict[str, Quality]]
    cache: dict[str, CacheUse]


def compare(
    source: Source,
    recipes: Sequence[Recipe],
    kv_budgets: Sequence[float],
    calibration: Calibration,
    texts: Mapping[str, Tensor],
    *,
    skip: int = 0,
    track: Track = silent,
) -> Comparison:
    """Convert by every recipe at every budget and measure all of them on the same windows (B, T) of each text.

    The first `skip` predictions of a window are not counted.
    """
    foldings: dict[RopeSplit, FoldingSearch] = {}
    variants = [_variant(source, r, budget, calibration, foldings, track) for budget in kv_budgets for r in recipes]
    runs: dict[str, Logits] = {SOURCE: source.logits}
    cache = {SOURCE: live_cache(source.model)}
    for variant in variants:
        if variant.refused is None:
            runs[variant.name] = _run(source, variant)
            with attention_swapped(source.model, source.architecture.model_type, variant.modules):
                cache[variant.name] = live_cache(source.model)
    quality = {
        text: measure(runs, windows_BT, reference=SOURCE, skip=skip, track=track)
        for text, windows_BT in texts.items()
    }  # fmt: skip
    return Comparison(variants, quality, cache)


def _run(source: Source, variant: Variant) -> Logits:
    def logits(tokens_BT: Tensor) -> Tensor:
        with attention_swapped(source.model, source.architecture.model_type, variant.modules):
            return source.logits(tokens_BT)

    return logits


def _variant(
    source: Source,
    recipe: Recipe,
    kv_budget: float,
    calibration: Calibration,
    foldings: dict[RopeSplit, FoldingSearch],
    track: Track,
) -> Variant:
    """Convert in memory; the folding of one rope split is searched once."""
    start = time.perf_counter()
    try:
        plan = plan_conversion(
            source, recipe, kv_budget, calibration, dtype=torch.float32, folding=foldings.get(recipe.rope), track=track
        )
    except InvalidRecipe as error:
        return Variant(recipe, kv_budget, None, [], 0.0, str(error))
    if plan.folding is not None:
        foldings[recipe.rope] = plan.folding
    latents = [layer.latent for layer in convert_layers(plan, track=track)]
    modules = [module.to(source.device) for module in build_attention(latents, plan.target)]
    return Variant(recipe, kv_budget, plan, modules, time.perf_counter() - start, None)
