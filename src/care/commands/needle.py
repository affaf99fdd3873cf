"""care needle: whether a model finds a fact in a long text, by depth and length."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from ..calibration import load_text
from ..errors import InvalidRecipe
from ..evaluation.haystack import DIGITS, WRONG_ANSWERS, ask, cut
from ..evaluation.needle import Answer, Cell, Mean, cells, difference, find_needles, overall
from ..modeling.loading import Location, load_config, load_tokenizer, locate
from ..report.heat import HeatMap, plot_heat
from .console import (
    HELD_OUT,
    device_option,
    dtype_option,
    emit,
    json_option,
    parse_list,
    plot_option,
    rich_track,
    table,
)
from .models import load_models

SCORES: dict[str, tuple[str, Callable[[Answer], float]]] = {
    "exact": ("found by generation", lambda answer: float(answer.exact)),
    "choice": (f"likelier than {WRONG_ANSWERS} wrong ones", lambda answer: float(answer.choice)),
    "nats": ("-log-probability", lambda answer: answer.nats),
}
"""What is measured of an answer: how it is called for a person, and its value."""

DRAWN = ("exact", "choice")
Number = TypeVar("Number", int, float)


@click.command()
@click.argument("model")
@click.option("--against", metavar="SRC", help="Reference model: asked the same of the same haystacks.")
@click.option("--text", default=HELD_OUT, show_default=True, help="FILE or name of a text: the haystack.")
@click.option("--lengths", default="512,1024,2048", show_default=True, help="Tokens of prompt and answer together.")
@click.option("--depths", default="0,0.25,0.5,0.75,1", show_default=True, help="Where the fact lies: 0 start, 1 end.")
@click.option("--trials", default=5, show_default=True, help="Haystacks and facts at each length.")
@click.option("--seed", default=42, show_default=True, help="Draws the facts and where haystacks begin.")
@plot_option("Draw heat maps.")
@dtype_option
@device_option
@json_option
def command(
    model: str,
    against: str | None,
    text: str,
    lengths: str,
    depths: str,
    trials: int,
    seed: int,
    plot: str | None,
    dtype: str | None,
    device: str,
    json_file: str | None,
) -> None:
    """Hide a number in a text and ask MODEL for it."""
    sizes = _numbers(lengths, "--lengths", int, "512,1024")
    places = _numbers(depths, "--depths", float, "0,0.5,1")
    names = [name for name in (against, model) if name is not None]
    locations = {name: locate(name) for name in names}
    for name, at in locations.items():
        _refuse_beyond(name, at, max(sizes))
    tokenizer = load_tokenizer(locations[names[0]])
    questions = ask(tokenizer, cut(load_text(text), tokenizer), sizes, places, trials, seed)
    models = load_models(locations, dtype, device)
    answers = find_needles(models, tokenizer, questions, track=rich_track)
    found = {name: cells(answers[name]) for name in names}
    protocol = {
        "text": text, "lengths": sizes, "depths": places, "trials": trials, "seed": seed, "digits": DIGITS,
        "wrong_answers": WRONG_ANSWERS, "chat": bool(tokenizer.chat_template), "dtype": dtype or "float32",
    }  # fmt: skip
    records = {name: _record(answers[name], found[name]) for name in names}
    if against is not None:
        records[model]["difference"] = {
            score: asdict(difference(answers[model], answers[against], value)) for score, (_, value) in SCORES.items()
        }
    if plot is not None:
        maps = [[_heat(name, found[name], score) for score in DRAWN] for name in names]
        plot_heat(maps, Path(plot), row_label="depth", column_label="tokens")
    shown = [_table(name, found[name], score) for name in names for score in DRAWN]
    emit({"protocol": protocol, "models": records}, json_file, *shown, _summary(records))


def _numbers(value: str, option: str, kind: type[Number], example: str) -> list[Number]:
    """A comma-separated option, each number once."""
    try:
        return list(dict.fromkeys(kind(part) for part in parse_list(value, option)))
    except ValueError as error:
        raise InvalidRecipe(f"{option} {value!r} must be numbers such as {example}") from error


def _refuse_beyond(name: str, location: Location, longest: int) -> None:
    """Positions that a model was not made for are not measured; a config without their number says nothing."""
    limit = load_config(location).get("max_position_embeddings")
    if limit is not None and longest > limit:
        raise InvalidRecipe(f"--lengths {longest} is beyond the {limit} positions of {name}; give at most {limit}")


def _record(answers: Sequence[Answer], found: Sequence[Cell]) -> dict[str, Any]:
    """One model's numbers as plain data, every answer among them."""
    return {
        "overall": {score: asdict(overall(answers, value)) for score, (_, value) in SCORES.items()},
        "cells": [asdict(cell) for cell in found],
        "answers": [
            {
                "length": a.question.length, "depth": a.question.depth, "trial": a.question.trial,
                "answer": a.question.answer, "written": a.written, "exact": a.exact, "choice": a.choice, "nats": a.nats,
            }
            for a in answers
        ],
    }  # fmt: skip


def _grid(found: Sequence[Cell], score: str) -> dict[float, dict[int, Mean]]:
    """One score by depth and length."""
    grid: dict[float, dict[int, Mean]] = {}
    for cell in found:
        grid.setdefault(cell.depth, {})[cell.length] = getattr(cell, score)
    return grid


def _share(mean: Mean) -> str:
    return f"{mean.value:.0%}" + ("" if mean.error is None else f" ± {mean.error:.0%}")


def _table(name: str, found: Sequence[Cell], score: str) -> Any:  # noqa: ANN401 - a rich table
    grid = _grid(found, score)
    columns = ("depth", *(f"{length:,} tokens" for length in next(iter(grid.values()))))
    rows = [(f"{depth:g}", *map(_share, by_length.values())) for depth, by_length in grid.items()]
    return table(f"{name}: {SCORES[score][0]}", columns, rows)


def _heat(name: str, found: Sequence[Cell], score: str) -> HeatMap:
    grid = _grid(found, score)
    return HeatMap(
        title=f"{Path(name).name}\n{SCORES[score][0]}",
        rows=[f"{depth:g}" for depth in grid],
        columns=[f"{length:,}" for length in next(iter(grid.values()))],
        shares=[[mean.value for mean in by_length.values()] for by_length in grid.values()],
        words=[[_share(mean).replace(" ", "\n", 1) for mean in by_length.values()] for by_length in grid.values()],
    )


def _summary(records: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Over all lengths and depths, and the model less its reference."""
    rows = [(name, *_line(records[name]["overall"])) for name in records]
    rows += [("difference", *_line(record["difference"])) for record in records.values() if "difference" in record]
    return table("all lengths and depths", ("model", *(f"{s}: {words}" for s, (words, _) in SCORES.items())), rows)


def _line(means: Mapping[str, Any]) -> tuple[str, ...]:
    shares = [_share(Mean(**means[score])) for score in DRAWN]
    nats = means["nats"]
    return (*shares, f"{nats['value']:.2f}" + ("" if nats["error"] is None else f" ± {nats['error']:.2f}"))
