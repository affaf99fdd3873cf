"""What a report says, as plain data: of conversion.json, and of the JSON of other commands."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .writing import generations, last_part

CONTEXTS = (4096, 32_768, 131_072)
GPUS = (1, 2, 4, 8)
"""Context lengths and tensor-parallel sizes at which the cache is stated."""

SCALE_BYTES = 2
"""One 16-bit scale per quantized vector: per head in the source, per token in a latent."""

MEASURED_BY = "care eval --against, care compare or care generate --against"
"""What writes the JSON that a report takes."""

OWNER_AND_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Measured:
    """One model on one text, from any of the two commands; `excess` is in nats a token over the source."""

    text: str
    name: str
    mode: str
    kv_budget: float
    perplexity: float
    perplexity_error: float
    excess: float
    kl: float | None
    top1: float | None
    bytes_per_token: float
    ours: bool
    """Whether this row is the conversion that the report is of."""


def facts(conversion: Mapping[str, Any], results: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Everything on the page but its pictures. `results` are JSON files by name; BadInput for one of another kind."""
    read = [_read(name, result, conversion) for name, result in results]
    rows = [row for figures, _ in read for row in figures]
    return {
        "source": source_name(conversion),
        "recipe": conversion["recipe"],
        "kept": conversion["kept_share"],
        "verdict": [saving(conversion), _costs(rows)],
        "calibration": conversion["calibration"],
        "care_version": conversion["care_version"],
        "seconds": conversion["seconds"],
        "cache": cache_rows(conversion),
        "quantized": quantized_rows(conversion),
        "measured": [vars(row) for row in rows],
        "generations": [run for _, texts in read for run in texts],
        "losses": losses(conversion["layers"]),
        "command": conversion_command(conversion),
    }


def source_name(conversion: Mapping[str, Any]) -> str:
    """A hub id as it is, a directory or a file without what it lies in."""
    if conversion.get("source_hub_id"):
        return conversion["source_hub_id"]
    source = conversion["source"]
    if "source_hub_id" not in conversion and OWNER_AND_NAME.fullmatch(source):
        return source  # an older version did not tell a hub id from a relative path
    return last_part(source, "source")


def saving(conversion: Mapping[str, Any]) -> str:
    """One sentence on what became of the cache."""
    width, full = conversion["mean_cache_width"], conversion["source_cache_width"]
    return f"Keeps {conversion['kept_share']:.1%} of the cache: {width:,.0f} of {full:,} values a token and layer."


def _costs(rows: Sequence[Measured]) -> str:
    """What it costs in quality as far as that was measured."""
    own = [row for row in rows if row.ours]
    if not own:
        return "Its quality has not been measured; give the JSON of care eval or care compare."
    costs = "; ".join(
        f"perplexity {row.perplexity / math.exp(row.excess):,.2f} to {row.perplexity:,.2f} "
        f"({math.expm1(row.excess):+.1%}) on {row.text}"
        for row in own
    )
    return costs[0].upper() + costs[1:] + "."


def cache_rows(conversion: Mapping[str, Any]) -> list[dict[str, Any]]:
    """GiB of one sequence's 16-bit cache on one of several GPUs, before and after.

    The source's heads are split over GPUs, as far as they go; a latent is whole on every one.
    """
    L, heads, dim = len(conversion["layers"]), conversion["source_num_kv_heads"], conversion["source_head_dim"]
    after = sum(layer["width"] for layer in conversion["layers"])
    rows = []
    for gpus in GPUS:
        before = 2 * dim * math.ceil(heads / gpus) * L
        gib = {T: (2 * before * T / 2**30, 2 * after * T / 2**30) for T in CONTEXTS}
        rows.append({"gpus": gpus, "values": (before, after), "gib": gib})
    return rows


def quantized_rows(conversion: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bytes per token of the source's cache and of the latent one, at 16, 8 and 4 bits with their scales."""
    L, heads = len(conversion["layers"]), conversion["source_num_kv_heads"]
    values = {
        "source": conversion["source_cache_width"] * L,
        "converted": sum(x["width"] for x in conversion["layers"]),
    }
    vectors = {"source": 2 * heads * L, "converted": L}
    return [
        {
            "bits": bits,
            **{name: values[name] * bits / 8 + (SCALE_BYTES * vectors[name] if bits < 16 else 0) for name in values},
        }
        for bits in (16, 8, 4)
    ]


def losses(layers: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Predicted nats a token over all layers, where the method weighs in nats."""
    if any(layer["key_loss"] is None for layer in layers):
        return None
    return {part: sum(layer[f"{part}_loss"] or 0.0 for layer in layers) for part in ("rope", "key", "value")}


def conversion_command(conversion: Mapping[str, Any], recipe: str | None = None, *, public: bool = False) -> str:
    """What makes this checkpoint again; `recipe` names a file with every choice made.

    `public` leaves out where source and text lie on this machine.
    """
    chosen, calibration = conversion["recipe"], conversion["calibration"]
    source = source_name(conversion) if public else conversion["source"]
    parts = [f"care convert {source} OUT --recipe {recipe or chosen['name']} --kv-budget {conversion['kv_budget']}"]
    parts.append(f"--mode {chosen['mode']} --format {chosen['format']}")
    if calibration:
        texts = (calibration["text"], *calibration.get("also", ()))
        parts += [f"--calibration {Path(text).name if public else text}" for text in texts]
        parts.append(f"--samples {calibration['num_windows']}")
        parts.append(f"--length {calibration['window']} --seed {calibration['seed']}")
        parts += [f"--context {calibration['context']}"] if calibration["context"] else []
    return " \\\n    ".join(parts)


def _read(
    name: str, result: Mapping[str, Any], conversion: Mapping[str, Any]
) -> tuple[list[Measured], list[dict[str, Any]]]:
    """Figures and texts of one file, which has the one or the other."""
    try:
        if "generations" in result:
            return [], [generations(name, result)]
        return _compared(result, conversion) if "texts" in result else _evaluated(result), []
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise BadInput(f"{name} is not the JSON of {MEASURED_BY}") from error


def _compared(result: Mapping[str, Any], conversion: Mapping[str, Any]) -> list[Measured]:
    recipe, budget = conversion["recipe"], conversion["kv_budget"]
    rows = []
    for text, measured in result["texts"].items():
        source = measured["source"]
        rows.append(_row(text, "source", "", 1.0, source, source))
        for r in measured["rows"]:
            if "refused" not in r:
                ours = (r["recipe"], r["mode"], r["kv_budget"]) == (recipe["name"], recipe["mode"], budget)
                rows.append(_row(text, r["recipe"], r["mode"], r["kv_budget"], r, source, ours=ours))
    return rows


def _evaluated(result: Mapping[str, Any]) -> list[Measured]:
    """The source is the model that has no distance from itself."""
    models = result["models"]
    source = next(m for m in models.values() if m["kl"] == 0)
    rows = [_row(result["text"], "source", "", 1.0, source, source)]
    for name, m in models.items():
        if m is not source:
            kept = m["cache_bytes_per_token"] / source["cache_bytes_per_token"]
            rows.append(_row(result["text"], Path(name).name, "", kept, m, source, ours=True))
    return rows


def _row(
    text: str,
    name: str,
    mode: str,
    budget: float,
    m: Mapping[str, Any],
    source: Mapping[str, Any],
    *,
    ours: bool = False,
) -> Measured:
    return Measured(
        text=Path(text).name, name=name, mode=mode, kv_budget=budget, perplexity=m["perplexity"],
        perplexity_error=m["perplexity"] * m["nll_standard_error"], excess=m["nll"] - source["nll"], kl=m["kl"],
        top1=m["top1_agreement"], bytes_per_token=m["cache_bytes_per_token"], ours=ours,
    )  # fmt: skip
