"""The main job: plan a conversion, then carry it out layer by layer."""

import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .calibration import (
    EXPLANATION,
    Calibration,
    CalibrationInfo,
    Collection,
    Wanted,
    finish_calibration,
    first_windows,
    is_calibration,
    load_calibration,
    load_text,
    sampled_windows,
)
from .checkpoint import check_finite, read_json
from .errors import BadInput
from .factorization import Factors, factorize
from .folding import FoldingSearch
from .formats import FORMATS
from .output import CheckpointWriter, Say, check_output_free, check_space, save_json, unsaid, writing
from .plan import Plan, plan_conversion, split_keys
from .prefix import Prefix
from .progress import Track, silent
from .recipe import Recipe
from .source import Source
from .types import LayerRanks
from .version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

STATISTICS = frozenset({"inputs", "gradients", "distances"})
"""Everything that calibration can collect."""

DECIDED = "plan.json"
"""The decisions of a plan, in the work that a stopped run leaves."""


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
    """What became of one layer; errors are relative and in the method's input metric."""

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


def calibrate(
    source: Source,
    request: CalibrationRequest,
    needs: frozenset[str] = frozenset({"inputs"}),
    *,
    directory: Path | None = None,
    track: Track = silent,
) -> Calibration:
    """Statistics of every layer on windows sampled from the text, or saved ones, checked to fit the source.

    With a `directory` they are saved there as they are taken, and a run that was killed is continued.
    """
    if is_calibration(Path(request.text)):
        calibration = load_calibration(Path(request.text))
        if calibration.info.fingerprint != source.fingerprint:
            raise BadInput(f"{request.text} was calibrated on {calibration.info.source}, not on {source.name}")
        return calibration
    if directory is not None:
        return _collected(source, request, needs, directory, track)
    with TemporaryDirectory(prefix="care-") as temporary:
        calibration = _collected(source, request, needs, Path(temporary), track)
        return replace(calibration, layers=list(calibration.layers))


def _collected(
    source: Source, request: CalibrationRequest, needs: frozenset[str], directory: Path, track: Track
) -> Calibration:
    """Statistics collected in a directory, unless they are there."""
    if is_calibration(directory):
        return load_calibration(directory)
    start = time.perf_counter()
    wanted = _wanted(source, request, needs)
    Collection(source.observed, wanted, directory).run(track)
    info = CalibrationInfo(
        source=source.name, fingerprint=source.fingerprint, text=request.text, num_windows=request.num_windows,
        window=request.window, seed=request.seed, num_layers=source.spec.num_layers,
        seconds=time.perf_counter() - start, context=0 if wanted.contexts_BT is None else request.context,
    )  # fmt: skip
    finish_calibration(directory, info, wanted.windows_BT)
    return load_calibration(directory)


def _wanted(source: Source, request: CalibrationRequest, needs: frozenset[str]) -> Wanted:
    """Windows of the text, and what is asked of them."""
    tokens_T = source.tokens(load_text(request.text))
    windows_BT = sampled_windows(tokens_T, request.window, request.num_windows, request.seed)
    contexts_BT = None
    if "distances" in needs:
        num_contexts = max(min(request.num_contexts, len(tokens_T) // max(request.context, 1)), 1)
        contexts_BT = first_windows(tokens_T, request.context, num_contexts)
    return Wanted(windows_BT, contexts_BT, request.seed if "gradients" in needs else None)


def convert_layers(
    plan: Plan, *, first: int = 0, streams: Path | None = None, track: Track = silent
) -> Iterator[Factors]:
    """The converted attention of each layer in turn, one in memory at a time.

    A refit's hidden states are files in `streams`; they are there for layer `first` if the one before it was made.
    """
    layers = range(first, len(plan.ranks))
    with _directory(streams) as directory:
        prefix = _prefix(plan, directory)
        for index in track(layers, label="factorizing", total=len(layers)):
            weights, stats = plan.source.attention(index), plan.stats(index)
            if prefix is not None and stats is not None:
                stats = prefix.stats(index, weights.carried, stats)
            keys = split_keys(plan, weights, stats, plan.ranks[index].rope_dim // 2)
            factors = factorize(plan.recipe.factorization, weights, keys, stats, plan.ranks[index])
            yield factors if prefix is None else replace(factors, latent=prefix.fitted(index, factors.latent))


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
    check_space(out_dir, source.reader.num_bytes())
    run = {
        **describe_run(source, request),
        "recipe": recipe.digest(), "kv_budget": kv_budget, "dtype": str(dtype or source.dtype),
    }  # fmt: skip
    with CheckpointWriter(out_dir, source.spec.num_layers + 1, run, say) as writer:
        stats = writer.work / "calibration"
        calibration = calibrate(source, request, recipe.needs, directory=stats, track=track) if recipe.needs else None
        decided = _decided(writer.work / DECIDED)
        plan = plan_conversion(source, recipe, kv_budget, calibration, dtype=dtype, track=track, **decided)
        save_json(
            writer.work / DECIDED,
            {"ranks": [asdict(r) for r in plan.ranks], "folding": plan.folding and asdict(plan.folding)},
        )
        return _write(plan, writer, track)


def _decided(file: Path) -> dict[str, Any]:
    """What the plan of a run that was stopped had decided, as arguments for the plan of this one."""
    if not file.is_file():
        return {}
    found = read_json(file)
    tried = found["folding"]
    folding = tried and FoldingSearch({int(f): ppl for f, ppl in tried["perplexity"].items()}, tried["best"])
    return {"ranks": tuple(LayerRanks(**ranks) for ranks in found["ranks"]), "folding": folding}


def describe_run(source: Source, request: CalibrationRequest) -> dict[str, Any]:
    """What decides about the bytes of statistics, as far as it can change between two runs."""
    text = Path(request.text)
    explained = text / EXPLANATION if is_calibration(text) else text
    content = explained.read_bytes() if explained.is_file() else b""
    return {
        "version": f"{__version__}, torch {torch.__version__}", "source": source.identity, "device": source.device,
        "calibration": asdict(request), "text": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip


def _write(plan: Plan, writer: CheckpointWriter, track: Track) -> Report:
    """Every shard that is not there yet, then what makes them a checkpoint."""
    source, start = plan.source, time.perf_counter()
    layout, num_layers = FORMATS[plan.recipe.format], plan.target.spec.num_layers
    carried = source.architecture.untouched(source.reader, plan.target.spec)
    notes = writer.notes()[:num_layers]
    for factors in convert_layers(plan, first=len(notes), streams=writer.work, track=track):
        index = len(notes)
        notes.append(_note(plan, index, factors))
        writer.write_shard(index + 1, _attention(plan, index, factors) | _carried(plan, carried[index]), notes[index])
    writer.write_shard(num_layers + 1, _carried(plan, carried[None]))
    with writing(writer.out_dir):
        source.copy_side_files(writer.result)
    report = make_report(plan, [LayerReport(**note["report"]) for note in notes], time.perf_counter() - start)
    writer.finish(layout.config(plan.target, plan.ranks, [tuple(note["rope"]) for note in notes]), asdict(report))
    return report


def _note(plan: Plan, index: int, factors: Factors) -> dict[str, Any]:
    """What report and config must know of a layer when its tensors are on the disk."""
    rope = factors.latent.rope
    frequencies = plan.target.spec.rope_frequencies[index] if rope is None else rope.frequencies
    return {"report": asdict(layer_report(plan.ranks[index], factors)), "rope": frequencies}


def _attention(plan: Plan, index: int, factors: Factors) -> dict[str, torch.Tensor]:
    prefix = plan.source.architecture.attention.format(i=index)
    tensors = FORMATS[plan.recipe.format].attention_tensors(factors.latent, plan.target)
    return {f"{prefix}.{name}": check_finite(name, tensor) for name, tensor in tensors.items()}


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
