"""The rank profile of a conversion, as text and as a picture."""

from pathlib import Path
from typing import Any

from ..errors import BadInput

BAR_WIDTH = 48


def _parts(layer: dict[str, Any]) -> list[tuple[str, int]]:
    if layer["joint"]:
        return [("rope", layer["rope_dim"]), ("latent", layer["value_rank"])]
    return [("rope", layer["rope_dim"]), ("key latent", layer["key_rank"]), ("value latent", layer["value_rank"])]


def profile_text(report: dict[str, Any]) -> str:
    """One bar per layer: rope slots, then latents, against the source's cache width."""
    full = report["source_cache_width"]
    fills = {"rope": "▓", "key latent": "▒", "latent": "█", "value latent": "█"}
    lines = [f"values cached per token, of {full} in the source ({report['kept_share']:.1%} kept)"]
    for index, layer in enumerate(report["layers"]):
        bar = "".join(fills[name] * round(size / full * BAR_WIDTH) for name, size in _parts(layer))
        lines.append(
            f"{index:>3} {bar:<{BAR_WIDTH}} {layer['width']:>5}  {' + '.join(str(n) for _, n in _parts(layer) if n)}"
        )
    shown = [name for name, size in _parts(report["layers"][0]) if size]
    return "\n".join([*lines, "    " + "   ".join(f"{fills[name]} {name}" for name in shown)])


def plot_profile(report: dict[str, Any], path: Path) -> None:
    """Widths per layer as stacked, hatched bars above the relative error of keys and values."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise BadInput("drawing needs matplotlib; pip install 'care-mla[plot]'") from error
    layers = report["layers"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    widths, errors = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    base = [0] * len(layers)
    styles = {
        "rope": ("0.35", ""),
        "key latent": ("0.85", "//"),
        "value latent": ("0.65", ".."),
        "latent": ("0.75", "//"),
    }
    for name in dict(_parts(layers[0])):
        sizes = [dict(_parts(layer))[name] for layer in layers]
        color, hatch = styles[name]
        if any(sizes):
            widths.bar(range(len(layers)), sizes, bottom=base, color=color, hatch=hatch, edgecolor="black", label=name)
        base = [b + s for b, s in zip(base, sizes, strict=True)]
    widths.axhline(report["source_cache_width"], color="black", linestyle="--", label="source")
    widths.set(ylabel="values cached per token", ylim=(0, report["source_cache_width"] * 1.25))
    widths.set_title(f"{report['recipe']['name']}: {report['kept_share']:.1%} of the source's cache")
    widths.legend(ncols=4, loc="upper right")
    errors.plot([layer["key_error"] for layer in layers], color="black", marker="o", label="no-rope keys")
    errors.plot([layer["value_error"] for layer in layers], color="0.5", marker="s", linestyle="--", label="values")
    largest = max(max(layer["key_error"], layer["value_error"]) for layer in layers)
    errors.set(xlabel="layer", ylabel="relative error", ylim=(0, 1.3 * largest or 1.0))
    errors.legend(ncols=2, loc="upper right")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot write {path}: {error}") from error
