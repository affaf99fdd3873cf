"""The ablations of CARE's paper on a real model: what calibration text, its amount and its weighting are worth.

    python benchmarks/ablations.py NAME SRC RESULT.json --text FILE [FILE ...] --calibration FILE [FILE ...]

size        calibration windows, from 8 to 128, of the same length
length      tokens per calibration window, at equal tokens
domain      each calibration text by itself
mixed       each calibration text by itself, and all in equal shares, at equal tokens
shrinkage   of the input moment C towards a multiple of the identity
root        the square root of C (care-u) against C itself (care-c)

Next to RESULT.json is a picture. With --keep DIR a run that was stopped goes on, and rows that several ablations share
are measured once.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from care import CalibrationRequest, CareError, InvalidRecipe, Recipe, __version__, load_recipe, open_source
from care.calibration import first_windows, load_text
from care.commands.console import rich_track, say
from care.comparison import SOURCE, Comparison, Row, Variant, compare
from care.report.pictures import LINES, MARKERS, new_figure, save_png

SIZES = (8, 16, 32, 64, 128)
LENGTHS = (64, 128, 256, 512, 1024)
SHRINKAGES = (0.0, 0.0001, 0.001, 0.01, 0.1, 0.5)
ROOTS = ("care-u", "care-c")

Settings = dict[str, tuple[list[Recipe], CalibrationRequest]]
"""What is compared: by label, the recipes and what they are calibrated on."""


def size(base: CalibrationRequest, recipes: list[Recipe]) -> Settings:
    """More and more windows; each number has the smaller ones' windows among its own."""
    return {str(count): (recipes, replace(base, num_windows=count)) for count in SIZES if count >= len(base.texts)}


def length(base: CalibrationRequest, recipes: list[Recipe]) -> Settings:
    """Longer and fewer windows."""
    tokens = base.num_windows * base.window
    fitting = [window for window in LENGTHS if tokens // window >= len(base.texts)]
    return {str(window): (recipes, replace(base, window=window, num_windows=tokens // window)) for window in fitting}


def domain(base: CalibrationRequest, recipes: list[Recipe]) -> Settings:
    """One text at a time."""
    return {Path(text).name: (recipes, replace(base, text=text, also=())) for text in base.texts}


def mixed(base: CalibrationRequest, recipes: list[Recipe]) -> Settings:
    """One text at a time, and all of them."""
    if not base.also:
        raise InvalidRecipe("mixed needs two calibration texts or more; give --calibration FILE FILE")
    return {**domain(base, recipes), "all in equal shares": (recipes, base)}


def shrinkage(base: CalibrationRequest, recipes: list[Recipe]) -> Settings:
    """The recipes with another shrinkage of C."""
    return {f"{value:g}": ([_shrunk(recipe, value) for recipe in recipes], base) for value in SHRINKAGES}


def _shrunk(recipe: Recipe, value: float) -> Recipe:
    method = cast("Any", recipe.factorization)
    if "shrinkage" not in asdict(method):
        raise InvalidRecipe(f"recipe {recipe.name} has no factorization.shrinkage; leave it out of --recipes")
    return replace(recipe, factorization=replace(method, shrinkage=value))


def root(base: CalibrationRequest, recipes: list[Recipe]) -> Settings:
    """Two recipes, whatever --recipes says."""
    del recipes
    return {name: ([load_recipe(name)], base) for name in ROOTS}


ABLATIONS = {"size": size, "length": length, "domain": domain, "mixed": mixed, "shrinkage": shrinkage, "root": root}
AXES = {"size": "calibration windows", "length": "tokens per calibration window", "shrinkage": "shrinkage of C"}
"""What a setting is called where it is a number."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ABLATIONS)
    parser.add_argument("source")
    parser.add_argument("result", type=Path)
    parser.add_argument("--text", nargs="+", required=True, help="texts to measure on")
    parser.add_argument("--calibration", nargs="+", required=True, help="texts to calibrate on")
    parser.add_argument("--recipes", default="care-u", help="comma-separated; root has its own")
    parser.add_argument("--kv-budgets", default="0.5,0.25", help="comma-separated kept shares")
    parser.add_argument("--keep", type=Path, help="directory for statistics and finished rows")
    parser.add_argument("--device", default="cpu")
    for option, default in (("samples", 128), ("length", 256), ("seed", 42), ("window", 1024), ("windows", 24)):
        parser.add_argument(f"--{option}", type=int, default=default)
    return parser.parse_args(arguments)


def variants(options: argparse.Namespace) -> list[Variant]:
    """All settings of the ablation at all budgets; the label of each is its setting."""
    base = CalibrationRequest(
        options.calibration[0], options.samples, options.length, options.seed, also=tuple(options.calibration[1:])
    )
    settings = ABLATIONS[options.name](base, [load_recipe(name) for name in options.recipes.split(",")])
    budgets = [float(budget) for budget in options.kv_budgets.split(",")]
    return [
        Variant(recipe, budget, request, label)
        for label, (recipes, request) in settings.items() for recipe in recipes for budget in budgets
    ]  # fmt: skip


def numbers(row: Row) -> dict[str, Any]:
    """What was measured, as plain data."""
    return {**asdict(row.quality), "perplexity": row.quality.perplexity, **asdict(row.cache)}


def records(result: Comparison, text: str) -> dict[str, Any]:
    """A text's rows; files by their names only."""
    rows, base = [], result.rows[text][SOURCE]
    for variant in result.variants:
        head = {"setting": variant.label, "recipe": variant.recipe.name, "kv_budget": variant.kv_budget}
        if variant.name in result.refused:
            rows.append({**head, "refused": result.refused[variant.name]})
            continue
        row, request = result.rows[text][variant.name], variant.request
        asked = {
            "texts": [Path(name).name for name in request.texts], "num_windows": request.num_windows,
            "window": request.window, "seed": request.seed,
        }  # fmt: skip
        excess = row.quality.nll - base.quality.nll
        rows.append({**head, "calibration": asked, **numbers(row), "excess": excess})
    return {SOURCE: numbers(base), "rows": rows}


def plot(name: str, texts: Mapping[str, Any], path: Path) -> None:
    """Excess against the setting, one line per recipe and budget; readable without colors."""
    figure = new_figure(8, 4.5 * len(texts))
    for axes, (text, table) in zip(figure.subplots(len(texts), 1, squeeze=False)[:, 0], texts.items(), strict=True):
        rows = [row for row in table["rows"] if "refused" not in row]
        labels = list(dict.fromkeys(row["setting"] for row in rows))
        lines = list(dict.fromkeys((row["recipe"] if name != "root" else "", row["kv_budget"]) for row in rows))
        for index, (recipe, budget) in enumerate(lines):
            own = [r for r in rows if r["kv_budget"] == budget and recipe in ("", r["recipe"])]
            axes.plot(
                [labels.index(r["setting"]) for r in own], [r["excess"] for r in own],
                marker=MARKERS[index % len(MARKERS)], linestyle=LINES[index % len(LINES)], color="black",
                label=f"{recipe} at {budget:.0%} of the cache".strip(),
            )  # fmt: skip
        axes.set_xticks(range(len(labels)), labels)
        axes.set(title=text, xlabel=AXES.get(name, ""), ylabel="excess over the source, nats/token")
        axes.axhline(0, color="0.5", linewidth=1)
        axes.grid(axis="y", color="0.9")
        axes.legend()
    save_png(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one ablation, write its figures and its picture."""
    options = parse(arguments)
    new_figure(1, 1)  # refuses now where nothing can be drawn
    asked = variants(options)
    source = open_source(options.source, options.device)
    cut = {t: first_windows(source.tokens(load_text(t)), options.window, options.windows) for t in options.text}
    result = compare(source, asked, cut, directory=options.keep, say=say, track=rich_track)
    texts = {Path(text).name: records(result, text) for text in cut}
    summary = {
        "ablation": options.name,
        "source": Path(options.source).name,
        "protocol": {
            "window": options.window, "windows": options.windows,
            "calibration": [Path(name).name for name in options.calibration],
        },
        "machine": {
            "processor": platform.processor() or platform.machine(), "device": options.device,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "care": __version__, "torch": version("torch"), "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "texts": texts,
    }  # fmt: skip
    options.result.write_text(json.dumps(summary, indent=2) + "\n")
    plot(options.name, texts, options.result.with_suffix(".png"))
    for text, table in texts.items():
        print(f"{text}: source {table[SOURCE]['perplexity']:.2f}")
        for row in table["rows"]:
            head = f"  {row['recipe']:<16} {row['kv_budget']:>5g}  {row['setting']:<24}"
            print(head, row.get("refused") or f"{row['perplexity']:12.2f} {row['excess']:8.4f}")


if __name__ == "__main__":
    try:
        main()
    except CareError as error:
        raise SystemExit(f"ablations: error: {error}") from error
