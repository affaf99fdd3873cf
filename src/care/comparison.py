"""All methods at equal cache: many variants of one source, measured on the same windows of every text.

Variants live in memory as attention modules of the source model, a few at a time, so a comparison writes no checkpoints
and its memory does not grow with their number. A reference's logits are not stored: the source is run again with each
group of variants. Every row is on the disk when it is finished; a comparison that was stopped goes on from those.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration
from .conversion import convert_layers
from .errors import Interrupted, InvalidRecipe
from .evaluation import CacheUse, Quality, live_cache, measure
from .evaluation.quality import Logits, Positions
from .folding import FoldingSearch
from .modeling.lazy_logits import lazy_logits
from .modeling.native import attention_swapped, build_attention
from .output import Say, unsaid
from .plan import at_budget, check_request, plan_conversion
from .progress import Track, silent
from .recipe import Recipe
from .rope_split import RopeSplit
from .source import Source
from .statistics import CalibrationRequest, describe_request, describe_source
from .sweep import Made, Row, SweepDirectory

SOURCE = "source"

GROUP = 4
"""Variants in memory at a time. The source is run once more for each group."""


@dataclass(frozen=True)
class Variant:
    """One recipe at one budget on one calibration; `label` tells variants apart that differ in nothing else."""

    recipe: Recipe
    kv_budget: float
    request: CalibrationRequest
    label: str = ""

    @property
    def name(self) -> str:
        """Recipe, budget and label."""
        return f"{self.recipe.name} {self.kv_budget:g}" + (f" {self.label}" if self.label else "")

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that it takes."""
        return at_budget(self.recipe, self.kv_budget).needs


@dataclass(frozen=True)
class Comparison:
    """Rows by text and name, the source's too, and why variants without rows cannot be had."""

    variants: list[Variant]
    refused: dict[str, str]
    rows: dict[str, dict[str, Row]]


@dataclass(frozen=True)
class _Built:
    """A variant in memory."""

    modules: Sequence[nn.Module]
    cache: CacheUse
    made: Made


def variants_of(recipes: Sequence[Recipe], kv_budgets: Sequence[float], request: CalibrationRequest) -> list[Variant]:
    """Every recipe at every budget, on one calibration."""
    return [Variant(recipe, budget, request) for budget in kv_budgets for recipe in recipes]


def compare(
    source: Source,
    variants: Sequence[Variant],
    texts: Mapping[str, Tensor],
    *,
    skip: int = 0,
    directory: Path | None = None,
    say: Say = unsaid,
    track: Track = silent,
) -> Comparison:
    """Convert and measure all variants on the same windows (B, T) of each text.

    The first `skip` predictions of a window are not counted. What is finished is kept in `directory`, and what is there
    is not done again; without one nothing is left. InvalidRecipe if two variants have the same name.
    """
    for name, count in Counter(variant.name for variant in variants).items():
        if count > 1:
            raise InvalidRecipe(f"{count} variants are called {name!r}; name a recipe and a budget once")
    with _kept_in(directory, say) as kept:
        return _Sweep(source, variants, texts, skip, kept, track).run(say)


@contextmanager
def _kept_in(directory: Path | None, say: Say) -> Generator[SweepDirectory]:
    """The directory that was named, or one that is gone afterwards."""
    if directory is None:
        with TemporaryDirectory(prefix="care-") as temporary:
            yield SweepDirectory(Path(temporary), lasting=False)
        return
    try:
        yield SweepDirectory(directory, lasting=True, say=say)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; the same command continues from {directory}") from error


class _Sweep:
    """One comparison at work."""

    def __init__(
        self,
        source: Source,
        variants: Sequence[Variant],
        texts: Mapping[str, Tensor],
        skip: int,
        kept: SweepDirectory,
        track: Track,
    ) -> None:
        self._source, self._variants, self._texts = source, variants, texts
        self._skip, self._kept, self._track = skip, kept, track
        self._refused: dict[str, str] = {}
        self._statistics: dict[CalibrationRequest, Calibration] = {}
        self._foldings: dict[tuple[RopeSplit, CalibrationRequest], FoldingSearch] = {}

    @cached_property
    def _about_source(self) -> dict[str, Any]:
        return describe_source(self._source)

    @cached_property
    def _requests(self) -> dict[CalibrationRequest, dict[str, Any]]:
        """Texts are read for it, so once."""
        return {request: describe_request(request) for request in {v.request for v in self._variants if v.needs}}

    @cached_property
    def _windows(self) -> dict[str, dict[str, Any]]:
        """What is measured on, by the tokens themselves: neither the text's name nor the tokenizer matters."""
        return {
            text: {"tokens": hashlib.sha256(windows_BT.numpy().tobytes()).hexdigest(), "shape": list(windows_BT.shape)}
            for text, windows_BT in self._texts.items()
        }

    @cached_property
    def _own_cache(self) -> CacheUse:
        return live_cache(self._source.model)

    def run(self, say: Say) -> Comparison:
        """Whatever is not there yet, a group at a time."""
        self._refuse()
        possible = self._possible
        left = [v for v in possible if any(self._row(text, v) is None for text in self._texts)]
        if len(left) < len(possible):
            say(f"{len(possible) - len(left)} of {len(possible)} variants are finished already")
        for first in range(0, len(left), GROUP):
            self._measure(left[first : first + GROUP])
        self._measure([])
        return Comparison(list(self._variants), self._refused, {text: self._rows(text) for text in self._texts})

    def _rows(self, text: str) -> dict[str, Row]:
        """All rows of a text, the source's first."""
        named = {SOURCE: None, **{variant.name: variant for variant in self._possible}}
        found = {name: self._row(text, variant) for name, variant in named.items()}
        return {name: row for name, row in found.items() if row is not None}

    def _refuse(self) -> None:
        """What cannot be had is known before any work."""
        for variant in self._variants:
            try:
                check_request(self._source, variant.recipe, variant.kv_budget, torch.float32)
            except InvalidRecipe as error:
                self._refused[variant.name] = str(error)

    @property
    def _possible(self) -> list[Variant]:
        return [variant for variant in self._variants if variant.name not in self._refused]

    def _question(self, text: str, variant: Variant | None) -> dict[str, Any]:
        """Everything that decides about a row; None is the source."""
        question = {
            **self._about_source, **self._windows[text], "skip": self._skip,
            "measured": [field.name for field in fields(Quality)],
        }  # fmt: skip
        if variant is not None:
            question |= {"recipe": variant.recipe.describe(), "kv_budget": variant.kv_budget}
            question |= self._requests[variant.request] if variant.needs else {}
        return question

    def _row(self, text: str, variant: Variant | None) -> Row | None:
        return self._kept.row(_title(variant), self._question(text, variant))

    def _measure(self, group: Sequence[Variant]) -> None:
        """Convert a group, and measure on each text those that have no row of it; the source is always wanted."""
        built = {variant: made for variant in group if (made := self._build(variant)) is not None}
        for text, windows_BT in self._texts.items():
            left = [variant for variant in (None, *built) if self._row(text, variant) is None]
            if not left:
                continue
            runs: dict[str, Logits] = {SOURCE: partial(lazy_logits, self._source.model)}
            runs |= {v.name: self._logits(made.modules) for v, made in built.items() if v in left}
            found = measure(runs, windows_BT, reference=SOURCE, skip=self._skip, track=self._track)
            for variant in left:
                if variant is None:
                    row = Row(found[SOURCE], self._own_cache)
                else:
                    row = Row(found[variant.name], built[variant].cache, built[variant].made)
                self._kept.save_row(_title(variant), self._question(text, variant), row)

    def _logits(self, modules: Sequence[nn.Module]) -> Logits:
        def logits(tokens_1T: Tensor) -> Positions:
            with attention_swapped(self._source.model, self._source.architecture.model_type, modules):
                return lazy_logits(self._source.model, tokens_1T)

        return logits

    def _calibration(self, variant: Variant) -> Calibration | None:
        """Statistics for all variants on the same request, collected once."""
        request = variant.request
        if variant.needs and request not in self._statistics:
            needs = frozenset[str]().union(*(v.needs for v in self._possible if v.request == request))
            self._statistics[request] = self._kept.statistics(self._source, request, needs, self._track)
        return self._statistics[request] if variant.needs else None

    def _build(self, variant: Variant) -> _Built | None:
        """Convert in memory; None, with the reason noted, where the plan refuses."""
        source, asked = self._source, (variant.recipe.rope, variant.request)
        calibration, start = self._calibration(variant), time.perf_counter()
        try:
            plan = plan_conversion(
                source, variant.recipe, variant.kv_budget, calibration, dtype=torch.float32,
                folding=self._foldings.get(asked), track=self._track,
            )  # fmt: skip
        except InvalidRecipe as error:
            self._refused[variant.name] = str(error)
            return None
        if plan.folding is not None:
            self._foldings[asked] = plan.folding
        latents = [layer.latent for layer in convert_layers(plan, track=self._track)]
        modules = [module.to(source.device) for module in build_attention(latents, plan.target)]
        made = Made(
            plan.mean_width, plan.folding.best if plan.folding else None, time.perf_counter() - start,
            calibration.info if calibration else None,
        )  # fmt: skip
        with attention_swapped(source.model, source.architecture.model_type, modules):
            return _Built(modules, live_cache(source.model), made)


def _title(variant: Variant | None) -> str:
    """What a row's file is called before its hash; labels are not in it, so that equal rows are shared."""
    return SOURCE if variant is None else f"{variant.recipe.name}-{variant.kv_budget:g}"
