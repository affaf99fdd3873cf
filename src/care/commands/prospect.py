"""What a conversion would give and take: tables for inspect and for a dry run."""

from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from ..estimate import SERVING_GPUS, Speed, cache_per_gpu, estimate
from ..recipe import Recipe, load_recipe
from ..source import Source
from ..statistics import CalibrationRequest
from .console import emit, table

LONG_CONTEXT = 32_768
BYTES_PER_VALUE = 2
"""Cache sizes are stated for a 16-bit cache, whatever the weights are stored in."""

SHOWN_RECIPES = ("palu", "care-u", "best")
"""Without statistics, with those of inputs, and with all."""


def cache_record(source: Source, kept: float | None) -> dict[str, Any]:
    """The cache at a kept share, or the source's own: per token, at a long context, and by GPU of several."""
    values = cache_per_gpu(source, kept, 1)
    per_gpu = {n: cache_per_gpu(source, kept, n) * BYTES_PER_VALUE * LONG_CONTEXT / 2**30 for n in SERVING_GPUS}
    return {
        "kept": kept,
        "values_per_token": values,
        "bytes_per_token": values * BYTES_PER_VALUE,
        "gib_at_32k": per_gpu[1],
        "gib_at_32k_per_gpu": per_gpu,
    }


def cache_table(rows: list[dict[str, Any]]) -> Table:
    """One line per kept share; a latent is whole on every GPU, the source's heads are split."""
    columns = ("kept", "values/token", "bytes/token", *(f"GiB at 32k, TP {n}" for n in SERVING_GPUS))
    return table("KV cache, 16 bits a value", columns, [_cache_row(row) for row in rows])


def _cache_row(row: dict[str, Any]) -> tuple[str, ...]:
    kept = "source" if row["kept"] is None else f"{row['kept']:.0%}"
    sizes = (f"{gib:.2f}" for gib in row["gib_at_32k_per_gpu"].values())
    return (kept, str(row["values_per_token"]), f"{row['bytes_per_token']:,}", *sizes)


def effort_records(source: Source, request: CalibrationRequest) -> list[dict[str, Any]]:
    """What recipes of each kind take, with the default calibration."""
    speed = Speed.measured()
    recipes = [load_recipe(name) for name in SHOWN_RECIPES]
    return [{"recipe": r.name, **asdict(estimate(source, r, request, speed))} for r in recipes]


def effort_table(records: list[dict[str, Any]]) -> Table:
    """One line per recipe."""
    rows = [
        (
            row["recipe"], f"{row['memory_bytes'] / 1e9:.1f} GB", f"{row['disk_bytes'] / 1e9:.1f} GB",
            _duration(row["seconds"]),
        )
        for row in records
    ]  # fmt: skip
    return table("what converting takes here, estimated", ("recipe", "peak memory", "disk", "time"), rows)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def emit_prospect(
    source: Source,
    recipe: Recipe,
    kv_budget: float,
    request: CalibrationRequest,
    dtype: torch.dtype | None,
    json_file: str | None,
) -> None:
    """Show a conversion that is not carried out."""
    cache = [cache_record(source, None), cache_record(source, kv_budget)]
    effort = {"recipe": recipe.name, **asdict(estimate(source, recipe, request, Speed.measured(), dtype))}
    record = {"recipe": recipe.describe(), "kv_budget": kv_budget, "cache": cache, "effort": effort}
    emit(record, json_file, cache_table(cache), effort_table([effort]))
