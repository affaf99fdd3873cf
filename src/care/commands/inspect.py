"""care inspect: what a model is and what conversion would save, from its config alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from ..checkpoint import CONVERSION_NAME, read_json
from ..engines import engine_prospects, engine_verdicts
from ..errors import BadInput, CareError
from ..estimate import Sizes
from ..formats import FORMATS
from ..modeling.loading import locate
from ..source import Source, open_source
from ..statistics import CalibrationRequest
from ..types import Target
from .console import emit, json_option, out, table
from .profile import plot_profile, profile_text
from .prospect import cache_record, cache_table, effort_records, effort_table

BUDGETS = (1.0, 0.75, 0.5, 0.25)


@click.command()
@click.argument("model", metavar="SRC")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw a converted model's rank profile as PNG.")
@json_option
def command(model: str, plot: Path | None, json_file: str | None) -> None:
    """Show a model's attention, its cache, and what formats and engines can take it.

    SRC is a directory, a hub id or a GGUF file; of a directory only config.json is read. A converted model shows its
    conversion instead.
    """
    provenance = locate(model).directory / CONVERSION_NAME
    if provenance.is_file():
        report = read_json(provenance)
        engines = engine_verdicts(read_json(provenance.with_name("config.json")))
        shown = (_title(report), profile_text(report), _engine_table("takes this checkpoint", engines))
        emit({**report, "engines": engines}, json_file, *shown)
        if plot:
            plot_profile(report, plot)
            out.print(f"wrote {plot}")
        return
    if plot:
        raise BadInput(f"{model} is not a converted model; --plot draws what conversion made of each layer")
    facts = describe(open_source(model))
    rows = [(key.replace("_", " "), str(value)) for key, value in facts.items() if not isinstance(value, list | dict)]
    engines = _engine_table("takes a conversion of it", facts["engines"])
    tables = (cache_table(facts["cache"]), effort_table(facts["effort"]), engines)
    emit(facts, json_file, table(model, ("", "value"), rows), *tables)


def _engine_table(claim: str, engines: Mapping[str, str]) -> Table:
    """One row per engine; the text may wrap."""
    made = Table("engine", claim)
    for row in engines.items():
        made.add_row(*row)
    return made


def _title(report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    made = f"{recipe['name']} ({recipe['paper']}), {recipe['mode']}, format {recipe['format']}"
    return f"{report['source']} converted by {made}"


def describe(source: Source) -> dict[str, Any]:
    """Attention facts, cache sizes at some budgets, and the formats that can express an absorbed result."""
    spec = source.spec
    refusals = {name: _refusal(source, name) for name in FORMATS}
    return {
        "model_type": source.architecture.model_type,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "query_heads": spec.num_heads,
        "key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "cache_width_per_layer": spec.cache_width,
        "formats": ", ".join(
            f"{name}: {f'no ({refusal})' if refusal else 'yes'}" for name, refusal in refusals.items()
        ),
        "engines": engine_prospects(source.architecture.model_type, source.config, spec, refusals["deepseek"]),
        "parameters": Sizes.of(source).total,
        "cache": [cache_record(source, kept) for kept in (None, *BUDGETS)],
        "effort": effort_records(source, CalibrationRequest("python-help")),
    }


def _refusal(source: Source, name: str) -> str | None:
    """Why a format cannot hold one rope slot per source frequency, the least that recipes ask; None if it can."""
    target = Target(
        config=source.config, spec=source.spec, mode="absorbed", slot_frequencies=source.spec.shared_frequencies,
        deepseek_body=source.architecture.deepseek_body, dtype=torch.bfloat16,
    )  # fmt: skip
    try:
        FORMATS[name].check(target)
    except CareError as error:
        return str(error)
    return None
