"""The main job: plan a conversion, then carry it out layer by layer."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .checkpoint import check_finite
from .decisions import earlier_plan, save_plan
from .estimate import conversion_bytes
from .factorization import Factors, factorize
from .formats import FORMATS
from .licenses import CARD_NAME
from .linalg import tails
from .output import CheckpointWriter, Say, check_output_free, check_space, unsaid, writing
from .plan import Plan, plan_conversion, split_keys
from .prefix import Prefix
from .progress import Track, silent
from .ranks import from_main, is_main, on_main, own_items, wait_for_all
from .recipe import Recipe
from .report import model_card
from .source import Source
from .statistics import CalibrationRequest, calibrate, describe_run
from .types import KeySplit, LatentAttention, LayerRanks
from .version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SPECTRUM_STEPS = 32
"""How finely the report states a latent's spectrum."""

TINY = 1e-300
"""Keeps shares of nothing at zero."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer; errors are relative and in the method's input metric.

    Losses are what lost rotations and truncated keys and values cost before any refit, in nats a token to second
    order; None for methods that do not weigh in units of the loss. `left_out` has, for each latent, the share of its
    energy that a rank of 0, 1 / n, ..., n / n of all its directions leaves out, n = SPECTRUM_STEPS; `rope_left_out` the
    same of lost rotations and numbers of slots, out of `rope_slots`, where they are weighed.
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
    num_directions: tuple[int, ...] = ()
    left_out: tuple[tuple[float, ...], ...] = ()
    rope_slots: int = 0
    rope_left_out: tuple[float, ...] = ()


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
    source_num_kv_heads: int
    source_head_dim: int
    mean_cache_width: float
    folding_perplexity: dict[int, float] | None
    rounding_loss: float | None
    calibration: dict[str, Any] | None
    seconds: float
    layers: list[LayerReport]
    source_hub_id: str | None = None
    source_license: dict[str, str] | None = None


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer, done: what to write and what to report."""

    latent: LatentAttention
    report: LayerReport


def convert_layers(
    plan: Plan, layers: Sequence[int] | None = None, *, streams: Path | None = None, track: Track = silent
) -> Iterator[ConvertedLayer]:
    """The converted attention of each layer in turn, of some or of all, one in memory at a time.

    With a refit layers must follow one another to the last one. Its hidden states are files in `streams`; they are
    there for the first layer asked for if the one before it was made.
    """
    layers = range(len(plan.ranks)) if layers is None else layers
    with _directory(streams) as directory:
        prefix = _prefix(plan, directory)
        for index in track(layers, label="factorizing", total=len(layers)):
            weights, stats = plan.source.attention(index), plan.stats(index)
            if prefix is not None and stats is not None:
                stats = prefix.stats(index, weights.carried, stats)
            keys = split_keys(plan, weights, stats, plan.ranks[index].rope_dim // 2)
            factors = factorize(plan.recipe.factorization, weights, keys, stats, plan.ranks[index])
            latent = factors.latent if prefix is None else prefix.fitted(index, factors.latent)
            in_nats = "gradients" in plan.recipe.factorization.needs
            yield ConvertedLayer(latent, _layer_report(plan.ranks[index], keys, factors, in_nats=in_nats))


@contextmanager
def _directory(given: Path | None) -> Generator[Path]:
    if given is not None:
        yield given
        return
    with TemporaryDirectory(prefix="care-") as temporary:
        yield Path(temporary)


def _prefix(plan: Plan, streams: Path) -> Prefix | None:
    """The streams that a refit needs; None for a recipe without one."""
    if plan.recipe.refit is None or plan.calibration is None:
        return None
    return Prefix(plan.source, plan.target, plan.recipe.refit, plan.calibration.windows_BT, streams)


def convert(plan: Plan, out_dir: Path, *, track: Track = silent) -> Report:
    """Write the converted checkpoint; the directory appears only when it is complete."""
    check_output_free(out_dir)
    check_space(out_dir, plan.source.reader.num_bytes())
    with CheckpointWriter(out_dir, plan.target.spec.num_layers + 1) as writer:
        return _write(plan, writer, track)


def run_conversion(
    source: Source,
    recipe: Recipe,
    kv_budget: float,
    request: CalibrationRequest,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    track: Track = silent,
    say: Say = unsaid,
) -> Report:
    """Calibrate, plan and convert; what a killed run of the same description has done is not done again."""
    check_output_free(out_dir)
    check_space(out_dir, conversion_bytes(source, recipe, request, dtype or source.dtype))
    run = {
        **describe_run(source, request),
        "recipe": recipe.digest(), "kv_budget": kv_budget, "dtype": str(dtype or source.dtype),
    }  # fmt: skip
    with CheckpointWriter(out_dir, source.spec.num_layers + 1, run, say) as writer:
        stats = writer.work / "calibration"
        calibration = calibrate(source, request, recipe.needs, directory=stats, track=track) if recipe.needs else None
        plan = earlier_plan(source, recipe, kv_budget, calibration, dtype, writer.work)
        plan = plan or plan_conversion(source, recipe, kv_budget, calibration, dtype=dtype, track=track)
        on_main(partial(save_plan, plan, writer.work))
        return _write(plan, writer, track)


def _write(plan: Plan, writer: CheckpointWriter, track: Track) -> Report:
    """Every shard that is not there yet, then what makes them a checkpoint.

    Processes take turns at layers; where a refit ties each layer to the one before, all go through all of them.
    """
    source, start = plan.source, time.perf_counter()
    num_layers = plan.target.spec.num_layers
    carried = source.architecture.untouched(source.reader, plan.target.spec)
    left = from_main(lambda: [index for index in range(num_layers) if not writer.has_shard(index + 1)])
    together = plan.recipe.refit is not None
    own = left if together else own_items(left)
    for index, layer in zip(own, convert_layers(plan, own, streams=writer.work, track=track), strict=True):
        write = partial(_write_layer, plan, writer, index, layer, carried[index])
        if together:
            on_main(write)
        else:
            write()
    wait_for_all()
    notes = writer.notes()[:num_layers]
    report = make_report(plan, [LayerReport(**note["report"]) for note in notes], time.perf_counter() - start)
    if is_main():
        if not writer.has_shard(num_layers + 1):
            writer.write_shard(num_layers + 1, _carried(plan, carried[None]))
        with writing(writer.out_dir):
            source.copy_side_files(writer.result)
        tables = [tuple(note["rope"]) for note in notes]
        config = FORMATS[plan.recipe.format].config(plan.target, plan.ranks, tables)
        writer.write_text(CARD_NAME, model_card(asdict(report), config))
        writer.finish(config, asdict(report))
    return report


def _write_layer(
    plan: Plan, writer: CheckpointWriter, index: int, layer: ConvertedLayer, carried: Sequence[str]
) -> None:
    tensors = _attention(plan, index, layer) | _carried(plan, carried)
    writer.write_shard(index + 1, tensors, _note(plan, index, layer))


def _note(plan: Plan, index: int, layer: ConvertedLayer) -> dict[str, Any]:
    """What report and config must know of a layer when its tensors are on the disk."""
    rope = layer.latent.rope
    frequencies = plan.target.spec.rope_frequencies[index] if rope is None else rope.frequencies
    return {"report": asdict(layer.report), "rope": frequencies}


def _attention(plan: Plan, index: int, layer: ConvertedLayer) -> dict[str, torch.Tensor]:
    prefix = plan.source.architecture.attention.format(i=index)
    tensors = FORMATS[plan.recipe.format].attention_tensors(layer.latent, plan.target)
    return {f"{prefix}.{name}": check_finite(name, tensor) for name, tensor in tensors.items()}


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
        num_directions=tuple(len(energy_S) for energy_S in factors.energies),
        left_out=tuple(_shares(tails(energy_S)) for energy_S in factors.energies),
        rope_slots=0 if keys.rope_losses is None else len(keys.rope_losses) - 1,
        rope_left_out=() if keys.rope_losses is None else _shares(keys.rope_losses),
    )  # fmt: skip


def _shares(left_S: torch.Tensor) -> tuple[float, ...]:
    """Shares of the first of falling losses at evenly spaced places, four digits of each."""
    steps = torch.arange(SPECTRUM_STEPS + 1, dtype=torch.float64)
    shares_N = left_S[(steps * (len(left_S) - 1) / SPECTRUM_STEPS).round().long()] / left_S[0].clamp(min=TINY)
    return tuple(float(f"{share:.4g}") for share in shares_N.tolist())


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
        source_num_kv_heads=plan.target.spec.num_kv_heads,
        source_head_dim=plan.target.spec.head_dim,
        mean_cache_width=plan.mean_width,
        folding_perplexity=plan.folding.perplexity if plan.folding else None,
        rounding_loss=plan.rounding_loss,
        calibration=asdict(plan.calibration.info) if plan.calibration else None,
        seconds=seconds,
        layers=layers,
        source_hub_id=plan.source.hub_id,
        source_license=plan.source.license,
    )
