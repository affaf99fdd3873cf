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
    collect_distances,
    collect_gradients,
    collect_moments,
    first_windows,
    is_calibration,
    load_calibration,
    load_text,
    sampled_windows,
)
from .checkpoint import CheckpointWriter, check_finite, check_output_free, check_space, writing
from .errors import BadInput
from .factorization import Factors, factorize
from .formats import FORMATS
from .plan import Plan, split_keys
from .prefix import Prefix
from .progress import Track, silent
from .source import Source
from .types import KeySplit, LatentAttention, LayerRanks
from .version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

STATISTICS = frozenset({"inputs", "gradients", "distances"})
"""Everything that calibration can collect."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on: a text by name or file and how much of it, or a directory of saved statistics.

    Attention distances are taken on windows of `context` tokens from the start of the text, as long as the
    contexts that will be served: `num_contexts` of them, fewer where the text is shorter.
    """

    text: str
    num_windows: int = 128
    window: int = 256
    seed: int = 42
    context: int = 1024
    num_contexts: int = 8


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer; errors are relative and in the method's input metric.

    Losses are what lost rotations and truncated keys and values cost before any refit, in nats a token to second
    order; None for methods that do not weigh in units of the loss.
    """

    rope_dim: int
    key_rank: int
    value_rank: int
    joint: bool
    width: int
    key_error: float
    value_error: float
    rope_loss: float | None = None
    key_loss: float | None = None
    value_loss: float | None = None


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
    rounding_loss: float | None
    calibration: dict[str, Any] | None
    seconds: float
    layers: list[LayerReport]


def calibrate(
    source: Source,
    request: CalibrationRequest,
    needs: frozenset[str] = frozenset({"inputs"}),
    *,
    track: Track = silent,
) -> Calibration:
    """Statistics of every layer on windows sampled from the text, or saved ones, checked to fit the source."""
    if is_calibration(Path(request.text)):
        calibration = load_calibration(Path(request.text))
        if calibration.info.fingerprint != source.fingerprint:
            raise BadInput(f"{request.text} was calibrated on {calibration.info.source}, not on {source.name}")
        return calibration
    start = time.perf_counter()
    tokens_T = source.tokens(load_text(request.text))
    windows_BT = sampled_windows(tokens_T, request.window, request.num_windows, request.seed)
    contexts_BT = None
    if "distances" in needs:
        num_contexts = max(min(request.num_contexts, len(tokens_T) // max(request.context, 1)), 1)
        contexts_BT = first_windows(tokens_T, request.context, num_contexts)
    layers = collect_moments(source.model, source.attention_paths, source.carried, windows_BT, track=track)
    if "gradients" in needs:
        moments = collect_gradients(source.model, source.key_value_taps, windows_BT, seed=request.seed, track=track)
        layers = [replace(layer, gradient_moment_EE=m) for layer, m in zip(layers, moments, strict=True)]
    if contexts_BT is not None:
        shares = collect_distances(source.model, source.attention_paths, source.attention, contexts_BT, track=track)
        layers = [replace(layer, attention_HT=s) for layer, s in zip(layers, shares, strict=True)]
    info = CalibrationInfo(
        source=source.name, fingerprint=source.fingerprint, text=request.text, num_windows=request.num_windows,
        window=request.window, seed=request.seed, num_layers=source.spec.num_layers,
        seconds=time.perf_counter() - start, context=request.context if contexts_BT is not None else 0,
    )  # fmt: skip
    return Calibration(info, layers, windows_BT)


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer, done: what to write and what to report."""

    latent: LatentAttention
    report: LayerReport


def convert_layers(plan: Plan, *, track: Track = silent) -> Iterator[ConvertedLayer]:
    """The converted attention of each layer in turn, one in memory at a time."""
    prefix = _prefix(plan)
    for index in track(range(len(plan.ranks)), label="factorizing", total=len(plan.ranks)):
        weights, stats = plan.source.attention(index), plan.stats(index)
        if prefix is not None and stats is not None:
            stats = prefix.stats(index, weights.carried, stats)
        keys = split_keys(plan, weights, stats, plan.ranks[index].rope_dim // 2)
        factors = factorize(plan.recipe.factorization, weights, keys, stats, plan.ranks[index])
        latent = factors.latent if prefix is None else prefix.fitted(index, factors.latent)
        in_nats = "gradients" in plan.recipe.factorization.needs
        yield ConvertedLayer(latent, _layer_report(plan.ranks[index], keys, factors, in_nats=in_nats))


def _prefix(plan: Plan) -> Prefix | None:
    """The streams that a refit needs; None for a recipe without one."""
    if plan.recipe.refit is None or plan.calibration is None:
        return None
    return Prefix(plan.source, plan.target, plan.recipe.refit, plan.calibration.windows_BT)


def convert(plan: Plan, out_dir: Path, *, track: Track = silent) -> Report:
    """Write the converted checkpoint; the directory appears only when it is complete."""
    source, start = plan.source, time.perf_counter()
    check_output_free(out_dir)
    check_space(out_dir, source.reader.num_bytes())
    layout, num_layers = FORMATS[plan.recipe.format], plan.target.spec.num_layers
    carried = source.architecture.untouched(source.reader, plan.target.spec)
    reports: list[LayerReport] = []
    frequencies: list[tuple[float, ...]] = []
    with CheckpointWriter(out_dir, num_layers + 1) as writer:
        for index, layer in enumerate(convert_layers(plan, track=track)):
            prefix = source.architecture.attention.format(i=index)
            tensors = layout.attention_tensors(layer.latent, plan.target)
            named = {f"{prefix}.{name}": check_finite(name, tensor) for name, tensor in tensors.items()}
            writer.write_shard(index + 1, named | _carried(plan, carried[index]))
            reports.append(layer.report)
            rope = layer.latent.rope
            frequencies.append(plan.target.spec.rope_frequencies[index] if rope is None else rope.frequencies)
        writer.write_shard(num_layers + 1, _carried(plan, carried[None]))
        with writing(out_dir):
            source.copy_side_files(writer.partial)
        report = make_report(plan, reports, time.perf_counter() - start)
        writer.finish(layout.config(plan.target, plan.ranks, frequencies), asdict(report))
    return report


def _carried(plan: Plan, names: Sequence[str]) -> dict[str, torch.Tensor]:
    layout, tensors = FORMATS[plan.recipe.format], dict[str, torch.Tensor]()
    for name in names:
        tensors |= layout.carried_tensors(name, plan.source.reader.read(name), plan.target)
    return tensors


def _layer_report(ranks: LayerRanks, keys: KeySplit, factors: Factors, *, in_nats: bool) -> LayerReport:
    """One layer's line of the report; energies weighted by gradients are twice the nats."""

    def nats(energy: float | None) -> float | None:
        return energy / 2 if in_nats and energy is not None else None

    return LayerReport(
        **asdict(ranks), width=ranks.width, key_error=factors.keys.error, value_error=factors.values.error,
        rope_loss=nats(keys.rope_loss), key_loss=nats(factors.keys.loss), value_loss=nats(factors.values.loss),
    )  # fmt: skip


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
        rounding_loss=plan.rounding_loss,
        calibration=asdict(plan.calibration.info) if plan.calibration else None,
        seconds=seconds,
        layers=layers,
    )
