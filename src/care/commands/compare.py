"""care compare: the table of all methods at equal cache."""

from dataclasses import asdict, replace
from typing import Any

import click

from ..calibration import first_windows, load_text
from ..comparison import SOURCE, Comparison, Variant, compare
from ..errors import InvalidRecipe
from ..formats import FORMATS
from ..plan import at_budget, check_request
from ..recipe import load_recipe, recipe_names
from ..source import open_source
from ..statistics import CalibrationRequest, calibrate
from .console import (
    HELD_OUT,
    calibration_options,
    device_option,
    emit,
    json_option,
    parse_budgets,
    parse_list,
    rich_track,
    table,
    window_options,
    working,
)
from .evaluate import COLUMNS, quality_record, quality_row


@click.command()
@click.argument("model", metavar="SRC")
@click.option("--recipes", default=",".join(recipe_names()), help="Comma-separated names or files; default: all.")
@click.option("--kv-budgets", default="0.5,0.25", show_default=True, help="Comma-separated kept shares.")
@click.option("--calibration", default="python-help", show_default=True, help="Text FILE or NAME, or saved STATS.")
@calibration_options
@click.option("--format", "format_", type=click.Choice(sorted(FORMATS)), help="Hold this format for all recipes.")
@click.option(
    "--text", "texts", multiple=True, help=f"FILE or name of a text; may be given again. [default: {HELD_OUT}]"
)
@window_options
@device_option
@json_option
def command(
    model: str,
    recipes: str,
    kv_budgets: str,
    calibration: str,
    samples: int,
    length: int,
    seed: int,
    context: int,
    format_: str | None,
    texts: tuple[str, ...],
    window: int,
    windows: int,
    skip: int,
    device: str,
    json_file: str | None,
) -> None:
    """Convert SRC by several recipes at several budgets and measure all of them.

    One calibration serves all; every row caches the same number of values per token.
    """
    chosen = [load_recipe(name) for name in parse_list(recipes, "--recipes")]
    chosen = [replace(recipe, format=format_) for recipe in chosen] if format_ else chosen
    budgets = parse_budgets(kv_budgets)
    source = open_source(model, device)
    with working(f"loading {model}"):
        cut = {t: first_windows(source.tokens(load_text(t)), window, windows) for t in texts or (HELD_OUT,)}
        _refuse_if_nothing_left(source, chosen, budgets)
    needs = frozenset[str]().union(*(at_budget(recipe, b).needs for recipe in chosen for b in budgets))
    stats = calibrate(source, CalibrationRequest(calibration, samples, length, seed, context), needs, track=rich_track)
    result = compare(source, chosen, budgets, stats, cut, skip=skip, track=rich_track)
    protocol = {
        "source": model, "window": window, "windows": windows, "skip": skip, "calibration": asdict(stats.info)
    }  # fmt: skip
    records = {"protocol": protocol, "texts": {text: _records(result, text) for text in cut}}
    counted = f"{windows} windows of {window} tokens" + (f", the first {skip} not counted" if skip else "")
    emit(records, json_file, *(_table(f"{text}: {counted}", result, text) for text in cut))


def _refuse_if_nothing_left(source: Any, recipes: list[Any], budgets: list[float]) -> None:  # noqa: ANN401
    """One impossible combination becomes a row that says so; if all are, that is an error."""
    reasons = []
    for recipe in recipes:
        for budget in budgets:
            try:
                check_request(source, recipe, budget)
            except InvalidRecipe as error:
                reasons.append(str(error))
    if len(reasons) == len(recipes) * len(budgets):
        raise InvalidRecipe(reasons[0])


def _records(result: Comparison, text: str) -> dict[str, Any]:
    """One text's rows, the source's apart."""
    base = quality_record(result.quality[text][SOURCE], result.cache[SOURCE])
    return {SOURCE: base, "rows": [_record(result, text, v) for v in result.variants]}


def _record(result: Comparison, text: str, variant: Variant) -> dict[str, Any]:
    recipe = variant.recipe
    head = {"recipe": recipe.name, "paper": recipe.paper, "mode": recipe.mode, "kv_budget": variant.kv_budget}
    if variant.plan is None:
        return {**head, "refused": variant.refused}
    quality = result.quality[text][variant.name]
    return {
        **head,
        **quality_record(quality, result.cache[variant.name]),
        "excess": _excess(result, text, variant),
        "mean_cache_width": variant.plan.mean_width,
        "folding": variant.plan.folding.best if variant.plan.folding else None,
        "conversion_seconds": variant.seconds,
    }


def _excess(result: Comparison, text: str, variant: Variant) -> float:
    """ln(perplexity / perplexity of the source)."""
    return result.quality[text][variant.name].nll - result.quality[text][SOURCE].nll


def _table(title: str, result: Comparison, text: str) -> Any:  # noqa: ANN401 - a rich table
    columns = (*COLUMNS[:-1], "excess", "convert s")
    base = result.quality[text][SOURCE]
    rows: list[tuple[str, ...]] = [(*quality_row(SOURCE, base, result.cache[SOURCE])[:-1], "0.000", "-")]
    for variant in result.variants:
        if variant.refused is not None:
            rows.append((variant.name, "refused", *[""] * (len(columns) - 2)))
            continue
        quality = result.quality[text][variant.name]
        row = quality_row(f"{variant.name} ({variant.recipe.mode})", quality, result.cache[variant.name])
        rows.append((*row[:-1], f"{_excess(result, text, variant):.3f}", f"{variant.seconds:.1f}"))
    return table(title, columns, rows)
