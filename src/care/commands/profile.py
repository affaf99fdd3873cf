"""The rank profile of a conversion, as text and as a picture."""

from pathlib import Path
from typing import Any

from ..report.pictures import draw_errors, draw_widths, new_figure, parts, save_png

BAR_WIDTH = 48


def profile_text(report: dict[str, Any]) -> str:
    """One bar per layer: rope slots, then latents, against the source's cache width."""
    full = report["source_cache_width"]
    fills = {"rope": "▓", "key latent": "▒", "latent": "█", "value latent": "█"}
    lines = [f"values cached per token, of {full} in the source ({report['kept_share']:.1%} kept)"]
    for index, layer in enumerate(report["layers"]):
        bar = "".join(fills[name] * round(size / full * BAR_WIDTH) for name, size in parts(layer))
        lines.append(
            f"{index:>3} {bar:<{BAR_WIDTH}} {layer['width']:>5}  {' + '.join(str(n) for _, n in parts(layer) if n)}"
        )
    shown = [name for name, size in parts(report["layers"][0]) if size]
    return "\n".join([*lines, "    " + "   ".join(f"{fills[name]} {name}" for name in shown)])


def plot_profile(report: dict[str, Any], path: Path) -> None:
    """Widths per layer above the relative error of keys and values, as PNG."""
    figure = new_figure(9, 6)
    widths, errors = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    draw_widths(widths, report)
    draw_errors(errors, report["layers"])
    save_png(figure, path)
