"""care compare: the table of all methods at equal cache."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ..calibration import first_windows, load_text, whole_windows
from ..comparison import SOURCE, Comparison, Variant, compare, variants_of
from ..errors import InvalidRecipe
from ..formats import FORMATS
from ..plan import check_request
from ..recipe import load_recipe, recipe_names
from ..report.pictures import new_figure, pareto_figure, save_png
from ..source import Source, open_source
from ..statistics import CalibrationRequest
from .console import (
    HELD_OUT,
    calibration_options,
    calibration_text_option,
    device_option,
    emit,
    json_option,
    parse_budgets,
    parse_list,
    plot_option,
    rich_track,
    say,
    table,
    window_options,
    working,
)
from .evaluate import COLUMNS, quality_record, quality_row
from .front import fronts, fronts_text, marks, points


@click.command()
@click.argument("model", metavar="SRC")
@click.option("--recipes", default=",".join(recipe_names()), help="Comma-separated names or files; default: all.")
@click.option("--kv-budgets", default="0.5,0.25", show_default=True, help="Comma-separated kept shares.")
@calibration_text_option("--calibration", "Text FILE or NAME, or saved STATS")
@calibration_options
@click.option("--format", "format_", type=click.Choice(sorted(FORMATS)), help="Hold this format for all recipes.")
@click.option(
    "--text", "texts", multiple=True, help=f"FILE or name of a text; may be given again. [default: {HELD_OUT}]"
)
@window_options
@click.option(
    "--keep",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep statistics and finished rows in DIR; the same command, after a stop, goes on from there.",
)
@plot_option("Draw cache kept against perplexity as PNG.")
@device_option
@json_option
def command(
    model: str,
    recipes: str,
    kv_budgets: str,
    calibration: tuple[str, ...],
    samples: int,
    length: int,
    seed: int,
    context: int,
    format_: str | None,
    texts: tuple[str, ...],
    window: int,
    windows: int | None,
    skip: int,
    directory: Path | None,
    plot: str | None,
    device: str,
    json_file: str | None,
) -> None:
    """Convert SRC by several recipes at several budgets and measure all of them.

    One calibration serves all; every row caches the same number of values per token.
    """
    chosen = [load_recipe(name) for name in parse_list(recipes, "--recipes")]
    chosen = [replace(recipe, format=format_) for recipe in chosen] if format_ else chosen
    request = CalibrationRequest(calibration[0], samples, length, seed, context, also=calibration[1:])
    variants = variants_of(chosen, parse_budgets(kv_budgets), request)
    if plot is not None:
        new_figure(1, 1)  # refuses now where nothing can be drawn
    source = open_source(model, device)
    with working(f"loading {model}"):
        tokens = {t: source.tokens(load_text(t)) for t in texts or (HELD_OUT,)}
        windows = min(whole_windows(len(t), window) for t in tokens.values()) if windows is None else windows
        cut = {name: first_windows(tokens_T, window, windows, name=name) for name, tokens_T in tokens.items()}
        _refuse_if_nothing_left(source, variants)
    result = compare(source, variants, cut, skip=skip, directory=directory, say=say, track=rich_track)
    protocol = {
        "source": model, "window": window, "windows": windows, "skip": skip, "calibration": _calibration(result)
    }  # fmt: skip
    tables = {text: _records(result, text) for text in cut}
    counted = f"{windows} windows of {window} tokens" + (f", the first {skip} not counted" if skip else "")
    shown = [
        part for text, record in tables.items()
        for part in (_table(f"{text}: {counted}", result, text, record), fronts_text(text, record))
    ]  # fmt: skip
    emit({"protocol": protocol, "texts": tables}, json_file, *shown)
    if plot is not None:
        drawn = [point for text, record in tables.items() for point in points(text, record)]
        save_png(pareto_figure(drawn), Path(plot))
        say(f"wrote {plot}")


def _refuse_if_nothing_left(source: Source, variants: list[Variant]) -> None:
    """One impossible combination becomes a row that says so; if all are, that is an error."""
    reasons = []
    for variant in variants:
        try:
            check_request(source, variant.recipe, variant.kv_budget)
        except InvalidRecipe as error:
            reasons.append(str(error))
    if len(reasons) == len(variants):
        raise InvalidRecipe(reasons[0])


def _calibration(result: Comparison) -> dict[str, Any] | None:
    """What was calibrated on, of the first row that says it; None if no recipe asked for it."""
    made = (row.made for rows in result.rows.values() for row in rows.values())
    return next((asdict(m.calibration) for m in made if m is not None and m.calibration is not None), None)


def _records(result: Comparison, text: str) -> dict[str, Any]:
    """One text's rows, the source's apart, and which of them are on the front."""
    own = result.rows[text][SOURCE]
    record = {
        SOURCE: quality_record(own.quality, own.cache),
        "rows": [_record(result, text, v) for v in result.variants],
    }
    return {**record, **fronts(record)}


def _record(result: Comparison, text: str, variant: Variant) -> dict[str, Any]:
    recipe = variant.recipe
    head = {"recipe": recipe.name, "paper": recipe.paper, "mode": recipe.mode, "kv_budget": variant.kv_budget}
    row = result.rows[text].get(variant.name)
    if row is None or row.made is None:
        return {**head, "refused": result.refused[variant.name]}
    return {
        **head,
        **quality_record(row.quality, row.cache),
        "excess": _excess(result, text, variant),
        "mean_cache_width": row.made.mean_width,
        "folding": row.made.folding,
        "conversion_seconds": row.made.seconds,
    }


def _excess(result: Comparison, text: str, variant: Variant) -> float:
    """ln(perplexity / perplexity of the source)."""
    return result.rows[text][variant.name].quality.nll - result.rows[text][SOURCE].quality.nll


def _table(title: str, result: Comparison, text: str, record: dict[str, Any]) -> Any:  # noqa: ANN401 - a rich table
    columns = (*COLUMNS[:-1], "excess", "front", "convert s")
    own = result.rows[text][SOURCE]
    rows: list[tuple[str, ...]] = [(*quality_row(SOURCE, own.quality, own.cache)[:-1], "0.000", "", "-")]
    for variant, mark in zip(result.variants, marks(record), strict=True):
        row = result.rows[text].get(variant.name)
        if row is None or row.made is None:
            rows.append((variant.name, "refused", *[""] * (len(columns) - 2)))
            continue
        shown = quality_row(f"{variant.name} ({variant.recipe.mode})", row.quality, row.cache)
        rows.append((*shown[:-1], f"{_excess(result, text, variant):.3f}", mark, f"{row.made.seconds:.1f}"))
    return table(title, columns, rows)
