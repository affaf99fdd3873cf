"""The main job: plan a conversion, then carry it out layer by layer."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .calibration import (
    Calibration,
    CalibrationInfo,
    collect_moments,
    is_calibration,
    load_calibration,
    load_text,
    sampled_windows,
)
from .checkpoint import CheckpointWriter, check_finite, check_output_free, check_space, writing
from .errors import BadInput, InvalidRecipe
from .factorization import Factors, Svd, factorize, layer_spectra
from .folding import FoldingSearch, choose_folding
from .formats import FORMATS
from .progress import Track, silent
from .recipe import Recipe
from .rope_split import KeepAll, RoRope, whole_keys
from .source import Source
from .types import AttentionWeights, KeySplit, LayerRanks, LayerStats, Target
from .version import __version__

PARITY = 1.0
"""The budget at which an absorbed layer can keep every rotation and every value."""

ROUNDING = 1e-6
"""Added before a budget is cut to whole values, so that 0.7 * 10 is 7."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on: a text by name or file and how much of it, or a directory of saved statistics."""

    text: str
    num_windows: int = 128
    window: int = 256
    seed: int = 42


@dataclass(frozen=True)
class Plan:
    """A conversion in which nothing is left to decide.

    `recipe` has its folding chosen and, at parity, its rope split replaced; `calibration` is None for a
    method that looks at weights only.
    """

    source: Source
    recipe: Recipe
    kv_budget: float
    target: Target
    ranks: tuple[LayerRanks, ...]
    calibration: Calibration | None
    folding: FoldingSearch | None

    def stats(self, index: int) -> LayerStats | None:
        """Statistics of a layer, where there are any."""
        return None if self.calibration is None else self.calibration.layers[index]

    @property
    def mean_width(self) -> float:
        """Values cached per token and layer, on average."""
        return sum(r.width for r in self.ranks) / len(self.ranks)


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer; errors are relative and in the method's own metric."""

    rope_dim: int
    key_rank: int
    value_rank: int
    joint: bool
    width: int
    key_error: float
    value_error: float


@dataclass(frozen=True)
class Report:
    """What a conversion did, as stored in conversion.json."""

    care_version: str
    source: str
    source_fingerprint: str
    recipe: dict[str, Any]
    recipe_digest: str
    kv_budget: float
    kept_share: float
    source_cache_width: int
    mean_cache_width: float
    folding_perplexity: dict[int, float] | None
    calibration: dict[str, Any] | None
    seconds: float
    layers: list[LayerReport]


def calibrate(source: Source, request: CalibrationRequest, *, track: Track = silent) -> Calibration:
    """Moments of every layer on windows sampled from the text, or saved ones, checked to fit the source."""
    if is_calibration(Path(request.text)):
        calibration = load_calibration(Path(request.text))
        if calibration.info.fingerprint != source.fingerprint:
            raise BadInput(f"{request.text} was calibrated on {calibration.info.source}, not on {source.name}")
        return calibration
    start = time.perf_counter()
    tokens_T = source.tokens(load_text(request.text))
    windows_BT = sampled_windows(tokens_T, request.window, request.num_windows, request.seed)
    layers = collect_moments(source.model, source.attention_paths, windows_BT, track=track)
    info = CalibrationInfo(
        source=source.name, fingerprint=source.fingerprint, text=request.text, num_windows=request.num_windows,
        window=request.window, seed=request.seed, num_layers=source.spec.num_layers,
        seconds=time.perf_counter() - start,
    )  # fmt: skip
    return Calibration(info, layers, windows_BT)


def check_request(source: Source, recipe: Recipe, kv_budget: float, dtype: torch.dtype | None = None) -> Target:
    """Refuse, before any work, what the budget, the recipe and the format cannot do together."""
    if not 0 < kv_budget <= 1:
        raise InvalidRecipe(f"kv budget {kv_budget} must lie in (0, 1]: it is the kept share of the source's cache")
    spec = source.spec
    recipe = at_budget(recipe, kv_budget)
    absorbed = recipe.mode == "absorbed"
    frequencies = recipe.rope.frequencies(spec) if absorbed else spec.rope_frequencies
    target = Target(
        config=source.config, spec=spec, mode=recipe.mode, slot_frequencies=frequencies,
        deepseek_body=source.architecture.deepseek_body, dtype=dtype or source.dtype,
    )  # fmt: skip
    layout = FORMATS[recipe.format]
    layout.check(target)
    if layout.one_width and recipe.allocation.uses_spectra:
        raise InvalidRecipe(f"format {recipe.format} stores one width for all layers; use --format native")
    rope_dim = 2 * len(frequencies) if absorbed else 0
    smallest = rope_dim + (1 if recipe.factorization.joint else 2)
    if not (absorbed and kv_budget == PARITY) and int(kv_budget * spec.cache_width) < smallest:
        raise InvalidRecipe(
            f"kv budget {kv_budget} leaves {kv_budget * spec.cache_width:.1f} values a layer; recipe {recipe.name} "
            f"needs at least {smallest} ({rope_dim} rotary); raise --kv-budget above {smallest / spec.cache_width:.3f}"
        )
    return target


def at_budget(recipe: Recipe, kv_budget: float) -> Recipe:
    """The recipe as it is carried out.

    At the full budget every rotary pair fits beside the whole value latent, so nothing is given up. Then no
    metric matters, hence plain SVD: parity needs no calibration.
    """
    if recipe.mode != "absorbed" or kv_budget != PARITY:
        return recipe
    return replace(recipe, rope=KeepAll(), factorization=Svd(joint=True))


def plan_conversion(
    source: Source,
    recipe: Recipe,
    kv_budget: float,
    calibration: Calibration | None,
    *,
    dtype: torch.dtype | None = None,
    folding: FoldingSearch | None = None,
    track: Track = silent,
) -> Plan:
    """Decide everything: the folding (unless an earlier search is given), then each layer's ranks.

    Raises InvalidRecipe, BadInput or UnsupportedModel for whatever cannot be done.
    """
    target = check_request(source, recipe, kv_budget, dtype)
    recipe = at_budget(recipe, kv_budget)
    if recipe.needs and calibration is None:
        raise InvalidRecipe(
            f"recipe {recipe.name} needs calibration; give --calibration FILE, NAME or a STATS directory"
        )
    split = recipe.rope
    if recipe.mode == "absorbed" and isinstance(split, RoRope) and split.folding == "auto" and calibration:
        folding = folding or choose_folding(source, split, calibration, track=track)
        recipe = replace(recipe, rope=replace(split, folding=folding.best))
    else:
        folding = None
    plan = Plan(source, recipe, kv_budget, target, (), calibration, folding)
    return replace(plan, ranks=_allocate(plan, track))


def _split(plan: Plan, weights: AttentionWeights, stats: LayerStats | None) -> KeySplit:
    return whole_keys(weights) if plan.target.mode == "rebuild" else plan.recipe.rope(weights, stats)


def _allocate(plan: Plan, track: Track) -> tuple[LayerRanks, ...]:
    """Spread the budget over layers; separate latents get half each, as far as they can use it."""
    spec, joint = plan.target.spec, plan.recipe.factorization.joint
    L, absorbed = spec.num_layers, plan.target.mode == "absorbed"
    rope_dim = 2 * len(plan.target.slot_frequencies) if absorbed else 0
    num_keys = spec.kv_width - rope_dim
    budget = int(plan.kv_budget * spec.cache_width * L + ROUNDING) - rope_dim * L
    if FORMATS[plan.recipe.format].one_width:
        budget -= budget % L
    key_cap, value_cap = min(num_keys, spec.hidden_size), min(spec.kv_width, spec.hidden_size)
    spectra = _spectra(plan, track) if plan.recipe.allocation.uses_spectra else [()] * L
    if joint:
        cap = min(num_keys + spec.kv_width, spec.hidden_size)
        ranks = _side(plan, spectra, 0, cap, min(budget, cap * L))
        return tuple(LayerRanks(rope_dim, r if num_keys else 0, r, joint=True) for r in ranks)
    half = budget // 2 - (budget // 2) % L if FORMATS[plan.recipe.format].one_width else budget // 2
    for_keys = max(min(half, key_cap * L), budget - value_cap * L)
    key_ranks = _side(plan, spectra, 0, key_cap, min(for_keys, key_cap * L))
    value_ranks = _side(plan, spectra, 1, value_cap, min(budget - for_keys, value_cap * L))
    return tuple(LayerRanks(rope_dim, k, v, joint=False) for k, v in zip(key_ranks, value_ranks, strict=True))


def _side(plan: Plan, spectra: Sequence[Sequence[torch.Tensor]], side: int, cap: int, budget: int) -> tuple[int, ...]:
    energies = [layer[side] for layer in spectra if layer]
    return plan.recipe.allocation(energies, [cap] * plan.target.spec.num_layers, budget)


def _spectra(plan: Plan, track: Track) -> list[tuple[torch.Tensor, ...]]:
    spectra = []
    layers = range(plan.target.spec.num_layers)
    for index in track(layers, label="reading spectra", total=len(layers)):
        weights, stats = plan.source.attention(index), plan.stats(index)
        sides = layer_spectra(plan.recipe.factorization, weights, _split(plan, weights, stats), stats)
        spectra.append(tuple(side.energy_S for side in sides))
    return spectra


def convert_layers(plan: Plan, *, track: Track = silent) -> Iterator[Factors]:
    """The converted attention of each layer in turn, one in memory at a time."""
    for index in track(range(len(plan.ranks)), label="factorizing", total=len(plan.ranks)):
        weights, stats = plan.source.attention(index), plan.stats(index)
        keys = _split(plan, weights, stats)
        yield factorize(plan.recipe.factorization, weights, keys, stats, plan.ranks[index])


def convert(plan: Plan, out_dir: Path, *, track: Track = silent) -> Report:
    """Write the converted checkpoint; the directory appears only when it is complete."""
    source, start = plan.source, time.perf_counter()
    check_output_free(out_dir)
    check_space(out_dir, source.reader.num_bytes())
    layout, num_layers = FORMATS[plan.recipe.format], plan.target.spec.num_layers
    carried = source.architecture.untouched(source.reader, plan.target.spec)
    reports: list[LayerReport] = []
    with CheckpointWriter(out_dir, num_layers + 1) as writer:
        for index, factors in enumerate(convert_layers(plan, track=track)):
            prefix = source.architecture.attention.format(i=index)
            tensors = layout.attention_tensors(factors.latent, plan.target)
            named = {f"{prefix}.{name}": check_finite(name, tensor) for name, tensor in tensors.items()}
            writer.write_shard(index + 1, named | _carried(plan, carried[index]))
            reports.append(layer_report(plan.ranks[index], factors))
        writer.write_shard(num_layers + 1, _carried(plan, carried[None]))
        with writing(out_dir):
            source.copy_side_files(writer.partial)
        report = make_report(plan, reports, time.perf_counter() - start)
        writer.finish(layout.config(plan.target, plan.ranks), asdict(report))
    return report


def _carried(plan: Plan, names: Sequence[str]) -> dict[str, torch.Tensor]:
    layout, tensors = FORMATS[plan.recipe.format], dict[str, torch.Tensor]()
    for name in names:
        tensors |= layout.carried_tensors(name, plan.source.reader.read(name), plan.target)
    return tensors


def layer_report(ranks: LayerRanks, factors: Factors) -> LayerReport:
    """One layer's line of the report."""
    return LayerReport(**asdict(ranks), width=ranks.width, key_error=factors.key_error, value_error=factors.value_error)


def make_report(plan: Plan, layers: list[LayerReport], seconds: float) -> Report:
    """Provenance of a conversion."""
    return Report(
        care_version=__version__,
        source=plan.source.name,
        source_fingerprint=plan.source.fingerprint,
        recipe=plan.recipe.describe(),
        recipe_digest=plan.recipe.digest(),
        kv_budget=plan.kv_budget,
        kept_share=plan.mean_width / plan.target.spec.cache_width,
        source_cache_width=plan.target.spec.cache_width,
        mean_cache_width=plan.mean_width,
        folding_perplexity=plan.folding.perplexity if plan.folding else None,
        calibration=asdict(plan.calibration.info) if plan.calibration else None,
        seconds=seconds,
        layers=layers,
    )
