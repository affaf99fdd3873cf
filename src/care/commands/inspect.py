"""care inspect: what a model is and what conversion would save, from its config alone."""

from pathlib import Path
from typing import Any

import click
import torch

from ..checkpoint import CONVERSION_NAME, read_json
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
    """Show a model's attention, its cache, and what formats can take it.

    SRC is a directory, a hub id or a GGUF file; of a directory only config.json is read. A converted model shows its
    conversion instead.
    """
    provenance = locate(model).directory / CONVERSION_NAME
    if provenance.is_file():
        report = read_json(provenance)
        emit(report, json_file, _title(report), profile_text(report))
        if plot:
            plot_profile(report, plot)
            out.print(f"wrote {plot}")
        return
    if plot:
        raise BadInput(f"{model} is not a converted model; --plot draws what conversion made of each layer")
    facts = describe(open_source(model))
    rows = [(key.replace("_", " "), str(value)) for key, value in facts.items() if not isinstance(value, list)]
    tables = (cache_table(facts["cache"]), effort_table(facts["effort"]))
    emit(facts, json_file, table(model, ("", "value"), rows), *tables)


def _title(report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    made = f"{recipe['name']} ({recipe['paper']}), {recipe['mode']}, format {recipe['format']}"
    return f"{report['source']} converted by {made}"


def describe(source: Source) -> dict[str, Any]:
    """Attention facts, cache sizes at some budgets, and the formats that can express an absorbed result."""
    spec = source.spec
    return {
        "model_type": source.architecture.model_type,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "query_heads": spec.num_heads,
        "key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "cache_width_per_layer": spec.cache_width,
        "formats": ", ".join(f"{name}: {_verdict(source, name)}" for name in FORMATS),
        "parameters": Sizes.of(source).total,
        "cache": [cache_record(source, kept) for kept in (None, *BUDGETS)],
        "effort": effort_records(source, CalibrationRequest("python-help")),
    }


def _verdict(source: Source, name: str) -> str:
    """Whether a format can hold one rope slot per source frequency, the least that recipes ask."""
    target = Target(
        config=source.config, spec=source.spec, mode="absorbed", slot_frequencies=source.spec.shared_frequencies,
        deepseek_body=source.architecture.deepseek_body, dtype=torch.bfloat16,
    )  # fmt: skip
    try:
        FORMATS[name].check(target)
    except CareError as error:
        return f"no ({error})"
    return "yes"
