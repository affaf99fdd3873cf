"""care convert: the main job."""

from dataclasses import asdict
from pathlib import Path

import click

from ..conversion import DTYPES, run_conversion
from ..errors import InvalidRecipe
from ..formats import FORMATS
from ..output import check_output_free
from ..plan import at_budget, check_request
from ..recipe import load_recipe
from ..source import open_source
from ..statistics import CalibrationRequest
from ..types import MODES, Mode
from .console import calibration_options, device_option, dtype_option, emit, json_option, rich_track, say, working
from .profile import profile_text
from .prospect import emit_prospect

ENGINES = {"anything": "best", "transformers": "best-deepseek", "vllm": "best-deepseek", "llama.cpp": "best-deepseek"}
"""Where a result can be meant to run, and the recipe for it; all but "anything" run it with no code of ours."""

STOCK_FORMAT = "deepseek"
"""What stock engines read."""


@click.command()
@click.argument("model", metavar="SRC")
@click.argument("out_dir", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe_name", help="Recipe name or FILE.toml; default: the best one for --for.")
@click.option(
    "--for",
    "engine",
    type=click.Choice(list(ENGINES)),
    default="anything",
    show_default=True,
    help="Where the result will run: picks recipe and format.",
)
@click.option("--kv-budget", default=0.5, show_default=True, help="Kept share of the source's cache, in (0, 1].")
@click.option("--calibration", default="python-help", show_default=True, help="Text FILE or NAME, or saved STATS.")
@calibration_options
@click.option("--mode", type=click.Choice(MODES), help="Override the recipe's mode (the format becomes native).")
@click.option("--format", "format_name", type=click.Choice(list(FORMATS)), help="Override the recipe's format.")
@click.option("--dry-run", is_flag=True, help="Show what it would take and give, from the config alone.")
@dtype_option
@device_option
@json_option
def command(
    model: str,
    out_dir: Path,
    recipe_name: str | None,
    engine: str,
    kv_budget: float,
    calibration: str,
    samples: int,
    length: int,
    seed: int,
    context: int,
    mode: Mode | None,
    format_name: str | None,
    dry_run: bool,
    dtype: str | None,
    device: str,
    json_file: str | None,
) -> None:
    """Convert SRC into a latent-attention checkpoint in the directory OUT.

    A run that was stopped is continued by the same command.
    """
    check_output_free(out_dir)
    if engine != "anything":
        if format_name not in (None, STOCK_FORMAT) or mode not in (None, "absorbed"):
            raise InvalidRecipe(f"--for {engine} needs --format {STOCK_FORMAT} in absorbed mode; leave the option out")
        format_name = STOCK_FORMAT
    recipe = at_budget(load_recipe(recipe_name or ENGINES[engine], mode=mode, format=format_name), kv_budget)
    source = open_source(model, device)
    wanted = DTYPES[dtype] if dtype else None
    request = CalibrationRequest(calibration, samples, length, seed, context)
    if dry_run:
        check_request(source, recipe, kv_budget, wanted or source.stated_dtype)
        emit_prospect(source, recipe, kv_budget, request, wanted, json_file)
        return
    with working(f"loading {model}"):
        check_request(source, recipe, kv_budget, wanted)
    report = asdict(
        run_conversion(source, recipe, kv_budget, request, out_dir, dtype=wanted, track=rich_track, say=say)
    )
    summary = f"wrote {out_dir} ({recipe.format}, {recipe.mode}) in {report['seconds']:.1f} s"
    emit(report, json_file, profile_text(report), summary)
