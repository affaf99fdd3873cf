"""care calibrate: moments of every layer, saved for any number of conversions."""

from dataclasses import asdict
from pathlib import Path

import click

from ..estimate import calibration_bytes
from ..output import DirectoryWriter, check_output_free, check_space
from ..recipe import load_recipe
from ..source import open_source
from ..statistics import STATISTICS, CalibrationRequest, calibrate, describe_run
from .console import (
    calibration_options,
    calibration_text_option,
    device_option,
    emit,
    json_option,
    parse_list,
    rich_track,
    say,
    working,
)


@click.command()
@click.argument("model", metavar="SRC")
@click.argument("stats", type=click.Path(path_type=Path))
@calibration_text_option("--text", "FILE or name of a text")
@calibration_options
@click.option("--recipes", "recipe_names", help="Collect only what these comma-separated recipes need.")
@device_option
@json_option
def command(
    model: str,
    stats: Path,
    calibration: tuple[str, ...],
    samples: int,
    length: int,
    seed: int,
    context: int,
    recipe_names: str | None,
    device: str,
    json_file: str | None,
) -> None:
    """Run SRC over a text and save its statistics in the directory STATS.

    Everything that any recipe asks for is collected, unless --recipes names those that matter. A run that was
    stopped is continued by the same command.
    """
    recipes = [load_recipe(name) for name in parse_list(recipe_names, "--recipes")] if recipe_names else []
    needs = frozenset[str]({"inputs"}).union(*(recipe.needs for recipe in recipes)) if recipes else STATISTICS
    check_output_free(stats)
    source = open_source(model, device)
    with working(f"loading {model}"):
        _ = source.reader
    request = CalibrationRequest(calibration[0], samples, length, seed, context, also=calibration[1:])
    check_space(stats, calibration_bytes(source, needs, request))
    with DirectoryWriter(stats, {**describe_run(source, request), "recipes": sorted(needs)}, say) as writer:
        result = calibrate(source, request, needs, directory=writer.result, track=rich_track)
    info = asdict(result.info)
    tokens = result.info.num_windows * result.info.window
    emit(info, json_file, f"calibrated {tokens:,} tokens in {result.info.seconds:.1f} s, saved in {stats}")
