"""care convert: the main job."""

from dataclasses import asdict, replace
from pathlib import Path

import click

from ..conversion import DTYPES, run_conversion
from ..engines import ENGINES, plugin_refusal, vllm_shape
from ..errors import InvalidRecipe
from ..formats import FORMATS
from ..output import check_output_free
from ..plan import at_budget, check_request
from ..recipe import Recipe, load_recipe
from ..rope_split import MeanPhase, RoRope
from ..source import Source, open_source
from ..statistics import CalibrationRequest
from ..types import MODES, Mode
from .console import (
    calibration_options,
    calibration_text_option,
    device_option,
    dtype_option,
    emit,
    json_option,
    rich_track,
    say,
    working,
)
from .profile import profile_text
from .prospect import emit_prospect

ANYTHING = "care"
"""The engine that is meant where none is named: our own classes, which take everything."""


@click.command()
@click.argument("model", metavar="SRC")
@click.argument("out_dir", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe_name", help="Recipe name or FILE.toml; default: the best one for --for.")
@click.option(
    "--for",
    "engine",
    type=click.Choice(["anything", *(name for name in ENGINES if name != ANYTHING)]),
    default="anything",
    show_default=True,
    help="Where the result will run: picks recipe, format and, for vllm (on GPUs), a shape that it has kernels for.",
)
@click.option("--kv-budget", default=0.5, show_default=True, help="Kept share of the source's cache, in (0, 1].")
@calibration_text_option("--calibration", "Text FILE or NAME, or saved STATS")
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
    calibration: tuple[str, ...],
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
    engine = ANYTHING if engine == "anything" else engine
    recipe = load_recipe(recipe_name or ENGINES[engine].recipe, mode=mode, format=_format(engine, format_name, mode))
    source = open_source(model, device)
    recipe, kv_budget = _fitted(engine, source, recipe, kv_budget)
    recipe = at_budget(recipe, kv_budget)
    wanted = DTYPES[dtype] if dtype else None
    request = CalibrationRequest(calibration[0], samples, length, seed, context, also=calibration[1:])
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


def _format(engine: str, chosen: str | None, mode: Mode | None) -> str | None:
    """The format that an engine reads; refuse another one, and rebuild mode, which only our own classes have."""
    if engine == ANYTHING:
        return chosen
    wanted = load_recipe(ENGINES[engine].recipe).format
    if chosen not in (None, wanted) or mode not in (None, "absorbed"):
        raise InvalidRecipe(f"--for {engine} needs --format {wanted} in absorbed mode; leave the option out")
    return wanted


def _fitted(engine: str, source: Source, recipe: Recipe, kv_budget: float) -> tuple[Recipe, float]:
    """Recipe and budget for an engine that does not take every shape; InvalidRecipe where it takes none."""
    if engine == "vllm-cpu" and (reason := plugin_refusal(source.architecture.model_type, source.config)) is not None:
        raise InvalidRecipe(f"vLLM cannot run a conversion of {source.name}: {reason}; use --for anything")
    if engine != "vllm" or kv_budget > 1:
        return recipe, kv_budget
    if not isinstance(recipe.rope, MeanPhase | RoRope):
        raise InvalidRecipe(f"--for vllm sets rope.dims, which recipe {recipe.name} does not have; leave --recipe out")
    rank, rope = vllm_shape(source.spec, kv_budget)
    fitted = (rank + rope) / source.spec.cache_width
    say(f"vLLM has kernels for {rank} + {rope} values: converting at --kv-budget {fitted:.4f}")
    return replace(recipe, rope=replace(recipe.rope, dims=rope)), fitted
