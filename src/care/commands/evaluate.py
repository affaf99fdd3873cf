"""care eval: perplexity, distance to a reference, and the live cache of any model."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..calibration import first_windows, load_text
from ..conversion import DTYPES
from ..evaluation import CacheUse, Quality, TaskScore, live_cache, load_task, measure, score
from ..evaluation.harness import HarnessScore, HarnessTasks, harness_scores, load_harness_tasks, run_harness
from ..modeling.loading import load_model, load_tokenizer, locate, logits, tokenize
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
    working,
)

HARNESS_COLUMNS = ("model", "task", "rows", "metric", "value", "± se")
TASK_COLUMNS = ("model", "task", "rows", "acc", "± se", "acc_norm", "± se")
COLUMNS = ("model", "perplexity", "± se", "KL", "top-1", "cache B/token", "s")


@click.command()
@click.argument("model")
@click.option("--against", metavar="SRC", help="Reference model: adds KL(SRC || MODEL) and top-1 agreement.")
@click.option("--text", default=HELD_OUT, show_default=True, help="FILE or name of a text.")
@window_options
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
    windows: int,
    skip: int,
    tasks: str | None,
    rows: int,
    harness: str | None,
    harness_rows: int | None,
    dtype: str | None,
    device: str,
    json_file: str | None,
) -> None:
    """Measure MODEL, converted or not, on a text."""
    questions = {Path(name): load_task(Path(name), rows) for name in parse_list(tasks, "--tasks")} if tasks else {}
    asked_of_harness = load_harness_tasks(parse_list(harness, "--harness")) if harness else None
    names = [name for name in (against, model) if name is not None]
    locations = {name: locate(name) for name in names}
    tokenizer = load_tokenizer(locations[names[0]])
    windows_BT = first_windows(tokenize(tokenizer, load_text(text)), window, windows)
    with working("loading " + " and ".join(names)):
        wanted = DTYPES[dtype or "float32"]
        models = {name: load_model(at, dtype=wanted, device=device) for name, at in locations.items()}
    runs = {name: partial(logits, loaded) for name, loaded in models.items()}
    quality = measure(runs, windows_BT, reference=against, skip=skip, track=rich_track)
    cache = {name: live_cache(loaded) for name, loaded in models.items()}
    scores = {
        name: {path: score(models[name], tokenizer, asked, track=rich_track, label=f"{path.name} by {name}")
               for path, asked in questions.items()}
        for name in names
    }  # fmt: skip
    official = {
        name: _official(name, loaded, tokenizer, asked_of_harness, harness_rows) for name, loaded in models.items()
    }
    result: dict[str, Any] = {
        "text": text, "window": window, "windows": windows, "skip": skip,
        "models": {
            name: quality_record(quality[name], cache[name])
            | ({"tasks": {path.name: asdict(s) for path, s in scores[name].items()}} if tasks else {})
            | ({"harness": {task: asdict(s) for task, s in official[name].items()}} if harness else {})
            for name in names
        },
    }  # fmt: skip
    if asked_of_harness:
        result["harness"] = {"lm_eval_version": asked_of_harness.version, "rows": harness_rows}
    lines = [quality_row(name, quality[name], cache[name]) for name in names]
    shown = [table(f"{text}: {windows} windows of {window} tokens", COLUMNS, lines)]
    if tasks:
        answers = [(name, path.name, *_task_row(s)) for name in names for path, s in scores[name].items()]
        shown.append(table("tasks", TASK_COLUMNS, answers))
    if asked_of_harness:
        lines = [row for name in names for task, s in official[name].items() for row in _harness_rows(name, task, s)]
        shown.append(table(f"lm-evaluation-harness {asked_of_harness.version}", HARNESS_COLUMNS, lines))
    emit(result, json_file, *shown)


def _official(
    name: str,
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    tasks: HarnessTasks | None,
    rows: int | None,
) -> dict[str, HarnessScore]:
    """What the harness says of one model; nothing where it was not asked."""
    if tasks is None:
        return {}
    return harness_scores(run_harness(model, tokenizer, tasks, rows=rows, track=rich_track, label=f"harness: {name}"))


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
        "kl": quality.kl, "top1_agreement": quality.top1_agreement, "predictions": quality.predictions,
        "cache_values_per_token": cache.values_per_token, "cache_bytes_per_token": cache.bytes_per_token,
        "seconds": quality.seconds,
    }  # fmt: skip


def quality_row(name: str, quality: Quality, cache: CacheUse) -> tuple[str, ...]:
    """One model's numbers for a person; the standard error is that of the perplexity."""
    return (
        name, f"{quality.perplexity:,.2f}", f"{quality.perplexity * quality.nll_error:,.2f}",
        "-" if quality.kl is None else f"{quality.kl:.4f}",
        "-" if quality.top1_agreement is None else f"{quality.top1_agreement:.1%}",
        f"{cache.bytes_per_token:,.0f}", f"{quality.seconds:.1f}",
    )  # fmt: skip
