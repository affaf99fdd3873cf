"""care eval: perplexity, bits per byte, distance to a reference, and the live cache of any model."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..calibration import first_windows, load_text, whole_windows
from ..errors import BadInput, InvalidRecipe
from ..evaluation import (
    BitsPerByte,
    Bucket,
    CacheUse,
    Quality,
    Row,
    TaskScore,
    bits_per_byte,
    common_spans,
    live_cache,
    load_task,
    measure,
    measure_bits,
    predicted_bytes,
    score,
)
from ..evaluation.harness import HarnessScore, HarnessTasks, harness_scores, load_harness_tasks, run_harness
from ..modeling.lazy_logits import lazy_logits
from ..modeling.loading import load_tokenizer, locate, tokenize
from .console import (
    HELD_OUT,
    device_option,
    dtype_option,
    emit,
    json_option,
    parse_list,
    rich_track,
    table,
    window_options,
)
from .models import load_models, refuse_other, refuse_other_tokenizers

HARNESS_COLUMNS = ("model", "task", "rows", "metric", "value", "± se")
TASK_COLUMNS = ("model", "task", "rows", "acc", "± se", "acc_norm", "± se")
COLUMNS = ("model", "perplexity", "KL", "top-1", "cache B/token", "s")
POSITION_COLUMNS = ("model", "position", "predictions", "perplexity", "KL", "top-1")
BITS_COLUMNS = ("model", "bits/byte", "bytes", "predictions", "cache B/token")

PER_TOKEN = "KL, top-1 and perplexity per token cannot be compared; --bits-per-byte can"
"""What cannot be done with models that have other tokens, and the remedy."""

NEAR = 0.5
"""How like a name must be to be offered in the place of one that is not there."""


@click.command()
@click.argument("model")
@click.option("--against", metavar="SRC", help="Reference model: adds KL(SRC || MODEL) and top-1 agreement.")
@click.option("--text", default=HELD_OUT, show_default=True, help="FILE or name of a text.")
@window_options
@click.option(
    "--bits-per-byte",
    "across",
    is_flag=True,
    help="Compare models with different tokenizers: each reads the same text in its own tokens.",
)
@click.option("--by-position", is_flag=True, help="Show perplexity, KL and top-1 by position in the window too.")
@click.option("--tasks", help="Comma-separated .jsonl(.gz) files of multiple-choice rows: adds acc and acc_norm.")
@click.option("--rows", default=500, show_default=True, help="Rows of each task, from its start.")
@click.option("--harness", help="Comma-separated tasks of the lm-evaluation-harness, or .jsonl(.gz) files for it.")
@click.option("--harness-rows", type=int, help="Rows of each of these, from its start; default: all.")
@dtype_option
@device_option
@json_option
def command(
    model: str,
    against: str | None,
    text: str,
    window: int,
    windows: int | None,
    skip: int,
    across: bool,
    by_position: bool,
    tasks: str | None,
    rows: int,
    harness: str | None,
    harness_rows: int | None,
    dtype: str | None,
    device: str,
    json_file: str | None,
) -> None:
    """Measure MODEL, converted or not, on a text."""
    if across and by_position:
        raise InvalidRecipe("--by-position counts positions in one tokenizer's tokens; leave out --bits-per-byte")
    questions = {path: load_task(path, rows) for path in _task_files(tasks)}
    asked_of_harness = load_harness_tasks(parse_list(harness, "--harness")) if harness else None
    names = [name for name in (against, model) if name is not None]
    locations = {name: locate(name) for name in names}
    tokenizers = {name: load_tokenizer(at) for name, at in locations.items()}
    content = load_text(text)
    if across:
        spans, windows_BT = common_spans(tokenizers, content, window, windows, skip), None
        windows = len(next(iter(spans.values())))
    else:
        refuse_other_tokenizers(tokenizers, PER_TOKEN)
        tokens_T = tokenize(tokenizers[names[0]], content)
        windows = whole_windows(len(tokens_T), window) if windows is None else windows
        spans, windows_BT = {}, first_windows(tokens_T, window, windows)
    models = load_models(locations, dtype, device)
    runs = {name: partial(lazy_logits, loaded) for name, loaded in models.items()}
    cache = {name: live_cache(loaded) for name, loaded in models.items()}
    title = f"{text}: {windows} windows of {window} tokens"
    if windows_BT is None:
        records, shown = _by_bytes(measure_bits(runs, spans, track=rich_track), cache, title)
    else:
        refuse_other("vocabulary size", {name: m.config.vocab_size for name, m in models.items()}, PER_TOKEN)
        num_bytes = predicted_bytes(tokenizers[names[0]], windows_BT, skip)
        quality = measure(runs, windows_BT, reference=against, skip=skip, track=rich_track)
        records, shown = _by_tokens(quality, num_bytes, cache, title)
        shown += [_position_table(quality)] if by_position else []
    answered, answers = _answer_tasks(models, tokenizers, questions)
    official, verdicts = _run_harness(models, tokenizers, asked_of_harness, harness_rows)
    result: dict[str, Any] = {
        "text": text, "window": window, "windows": windows, "skip": skip,
        "models": {name: records[name] | answered.get(name, {}) | official.get(name, {}) for name in names},
    }  # fmt: skip
    if asked_of_harness:
        result["harness"] = {"lm_eval_version": asked_of_harness.version, "rows": harness_rows}
    emit(result, json_file, *shown, *answers, *verdicts)


def _task_files(tasks: str | None) -> list[Path]:
    """The files named in --tasks; BadInput with the nearest names beside it for one that is not there."""
    paths = [Path(name) for name in parse_list(tasks, "--tasks")] if tasks else []
    for path in paths:
        if not path.is_file():
            beside = {p.name.partition(".")[0]: p.name for p in sorted(path.parent.glob("*.jsonl*"))}
            near = [
                beside[stem] for stem in difflib.get_close_matches(path.name.partition(".")[0], beside, cutoff=NEAR)
            ]
            hint = f"did you mean {' or '.join(near)}?" if near else f"{path.parent} has no .jsonl file of a like name"
            raise BadInput(f"no such task file: {path}; {hint}")
    return paths


def _by_bytes(
    bits: Mapping[str, BitsPerByte], cache: Mapping[str, CacheUse], title: str
) -> tuple[dict[str, dict[str, Any]], list[Any]]:
    """Records and table of models that need not have the same tokens."""
    records = {name: _bits_record(b) | {"predictions": b.predictions} | _cache_record(cache[name])
               for name, b in bits.items()}  # fmt: skip
    rows = [
        (name, _pm(b.value, b.error, ".4f"), f"{b.num_bytes:,}", f"{b.predictions:,}",
         f"{cache[name].bytes_per_token:,.0f}")
        for name, b in bits.items()
    ]  # fmt: skip
    return records, [table(f"{title} of {next(iter(bits))}", BITS_COLUMNS, rows)]


def _by_tokens(
    quality: Mapping[str, Quality], num_bytes: int, cache: Mapping[str, CacheUse], title: str
) -> tuple[dict[str, dict[str, Any]], list[Any]]:
    """Records and table of models with the same tokens."""
    bits = {name: bits_per_byte(q, num_bytes) for name, q in quality.items()}
    records = {
        name: quality_record(q, cache[name])
        | _bits_record(bits[name])
        | {"by_position": [asdict(b) for b in q.buckets]}
        for name, q in quality.items()
    }
    rows = [quality_row(name, q, cache[name]) for name, q in quality.items()]
    rows = [(*row[:2], _pm(bits[row[0]].value, bits[row[0]].error, ".4f"), *row[2:]) for row in rows]
    return records, [table(title, (*COLUMNS[:2], "bits/byte", *COLUMNS[2:]), rows)]


def _position_table(quality: Mapping[str, Quality]) -> Any:  # noqa: ANN401 - a rich table
    rows = [
        (name, f"{b.first}-{b.last}", f"{b.predictions:,}", *_quality_cells(b))
        for name, q in quality.items() for b in q.buckets
    ]  # fmt: skip
    return table("by position in the window", POSITION_COLUMNS, rows)


def _answer_tasks(
    models: Mapping[str, Any], tokenizers: Mapping[str, Any], questions: Mapping[Path, Sequence[Row]]
) -> tuple[dict[str, dict[str, Any]], list[Any]]:
    """Records and table of multiple choice; nothing where no file was named."""
    if not questions:
        return {}, []
    scores = {
        name: {path.name: score(model, tokenizers[name], asked, track=rich_track, label=f"{path.name} by {name}")
               for path, asked in questions.items()}
        for name, model in models.items()
    }  # fmt: skip
    rows = [(name, task, *_task_row(s)) for name, found in scores.items() for task, s in found.items()]
    records = {name: {"tasks": {task: asdict(s) for task, s in found.items()}} for name, found in scores.items()}
    return records, [table("tasks", TASK_COLUMNS, rows)]


def _run_harness(
    models: Mapping[str, Any], tokenizers: Mapping[str, Any], tasks: HarnessTasks | None, limit: int | None
) -> tuple[dict[str, dict[str, Any]], list[Any]]:
    """Records and table of the harness; nothing where it was not asked."""
    if tasks is None:
        return {}, []
    scores = {
        name: harness_scores(
            run_harness(model, tokenizers[name], tasks, rows=limit, track=rich_track, label=f"harness: {name}")
        )
        for name, model in models.items()
    }
    rows = [row for name, found in scores.items() for task, s in found.items() for row in _harness_rows(name, task, s)]
    records = {name: {"harness": {task: asdict(s) for task, s in found.items()}} for name, found in scores.items()}
    return records, [table(f"lm-evaluation-harness {tasks.version}", HARNESS_COLUMNS, rows)]


def _harness_rows(name: str, task: str, s: HarnessScore) -> list[tuple[str, ...]]:
    """One row a metric: they are never mixed."""
    errors = {metric: "-" if error is None else f"{error:.4f}" for metric, error in s.errors.items()}
    return [(name, task, str(s.rows), metric, f"{value:.4f}", errors[metric]) for metric, value in s.values.items()]


def _task_row(s: TaskScore) -> tuple[str, ...]:
    """Percentages with standard errors."""
    norm = "-" if s.acc_norm is None else f"{s.acc_norm:.1%}"
    norm_error = "-" if s.acc_norm_error is None else f"{s.acc_norm_error:.1%}"
    return (str(s.rows), f"{s.acc:.1%}", f"{s.acc_error:.1%}", norm, norm_error)


def quality_record(quality: Quality, cache: CacheUse) -> dict[str, Any]:
    """One model's numbers as plain data."""
    return {
        "perplexity": quality.perplexity, "nll": quality.nll, "nll_standard_error": quality.nll_error,
        "kl": quality.kl, "kl_standard_error": quality.kl_error, "top1_agreement": quality.top1_agreement,
        "top1_standard_error": quality.top1_error, "predictions": quality.predictions, **_cache_record(cache),
        "seconds": quality.seconds,
    }  # fmt: skip


def _cache_record(cache: CacheUse) -> dict[str, float]:
    return {"cache_values_per_token": cache.values_per_token, "cache_bytes_per_token": cache.bytes_per_token}


def _bits_record(bits: BitsPerByte) -> dict[str, float]:
    return {"bits_per_byte": bits.value, "bits_per_byte_standard_error": bits.error, "bytes": bits.num_bytes}


def quality_row(name: str, quality: Quality, cache: CacheUse) -> tuple[str, ...]:
    """One model's numbers for a person, with standard errors."""
    return (name, *_quality_cells(quality), f"{cache.bytes_per_token:,.0f}", f"{quality.seconds:.1f}")


def _quality_cells(q: Quality | Bucket) -> tuple[str, str, str]:
    """Perplexity, KL and top-1 agreement."""
    perplexity = math.exp(q.nll)
    return (
        _pm(perplexity, perplexity * q.nll_error, ",.2f"), _pm(q.kl, q.kl_error, ".4f"),
        _pm(q.top1_agreement, q.top1_error, ".1%"),
    )  # fmt: skip


def _pm(value: float | None, error: float | None, form: str) -> str:
    """A figure with its standard error."""
    return "-" if value is None or error is None else f"{value:{form}} ± {error:{form}}"
