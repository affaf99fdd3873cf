"""The report's pictures: matplotlib, in greys and hatches that survive a black and white printer."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..pareto import on_front

STYLES = {
    "rope": ("0.35", ""),
    "key latent": ("0.85", "//"),
    "value latent": ("0.65", ".."),
    "latent": ("0.75", "//"),
}
"""Shade and hatch of what a layer caches."""

MARKERS = "osD^vPX*<>ph"
LINES = ("-", "--", "-.", ":", (0, (1, 3)), (0, (7, 2, 1, 2, 1, 2)), (0, (9, 4)))
"""Their lengths have no common factor: recipe by recipe another pair."""
SHORT = 5.0
"""Highest over lowest perplexity up to which an axis is labeled evenly."""
LEAST_SHARE = 1e-4
"""Where the spectra's color scale ends."""


def parts(layer: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What a layer caches, by name."""
    if layer["joint"]:
        return [("rope", layer["rope_dim"]), ("latent", layer["value_rank"])]
    return [("rope", layer["rope_dim"]), ("key latent", layer["key_rank"]), ("value latent", layer["value_rank"])]


def new_figure(width: float, height: float) -> Any:  # noqa: ANN401 - matplotlib's
    """An empty figure; BadInput where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise BadInput("drawing needs matplotlib; pip install 'care-mla[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_png(figure: Any, path: Path) -> None:  # noqa: ANN401
    """The figure as a file; BadInput where it cannot be written."""
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot write {path}: {error}") from error


def svg(figure: Any) -> str:  # noqa: ANN401
    """The figure as an SVG element, the same bytes every time."""
    import matplotlib as mpl  # noqa: PLC0415 - there is a figure, so there is matplotlib

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "care", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def draw_widths(axes: Any, conversion: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Widths per layer as stacked bars under the source's."""
    layers, full = conversion["layers"], conversion["source_cache_width"]
    base = [0] * len(layers)
    for name in dict(parts(layers[0])):
        sizes = [dict(parts(layer))[name] for layer in layers]
        color, hatch = STYLES[name]
        if any(sizes):
            axes.bar(range(len(layers)), sizes, bottom=base, color=color, hatch=hatch, edgecolor="black", label=name)
        base = [b + s for b, s in zip(base, sizes, strict=True)]
    axes.axhline(full, color="black", linestyle="--", label="source")
    axes.set(ylabel="values cached per token", ylim=(0, full * 1.25))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{conversion['recipe']['name']}: {conversion['kept_share']:.1%} of the source's cache")
    axes.legend(ncols=4, loc="upper right")


def draw_errors(axes: Any, layers: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401
    """Relative errors of keys and values in the input metric."""
    axes.plot([layer["key_error"] for layer in layers], color="black", marker="o", label="no-rope keys")
    axes.plot([layer["value_error"] for layer in layers], color="0.5", marker="s", linestyle="--", label="values")
    largest = max(max(layer["key_error"], layer["value_error"]) for layer in layers)
    axes.set(xlabel="layer", ylabel="relative error", ylim=(0, 1.3 * largest or 1.0))
    axes.legend(ncols=2, loc="upper right")


def draw_losses(axes: Any, layers: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401
    """Predicted nats a token by layer: lost rotations, truncated keys, truncated values."""
    base = [0.0] * len(layers)
    for part, color, hatch in (("rope", "0.35", ""), ("key", "0.85", "//"), ("value", "0.65", "..")):
        sizes = [layer[f"{part}_loss"] or 0.0 for layer in layers]
        if any(sizes):
            axes.bar(range(len(layers)), sizes, bottom=base, color=color, hatch=hatch, edgecolor="black", label=part)
        base = [b + s for b, s in zip(base, sizes, strict=True)]
    axes.set(xlabel="layer", ylabel="predicted loss, nats a token", ylim=(0, 1.25 * max(base) or 1.0))
    axes.legend(ncols=3, loc="upper right")


def draw_spectrum(axes: Any, curves: Sequence[Sequence[float]], kept: Sequence[float], title: str) -> Any:  # noqa: ANN401
    """Layers down, ranks across, the share of the energy that a rank leaves out as shade; a line at what was kept."""
    from matplotlib.colors import LogNorm  # noqa: PLC0415

    shares = [[max(share, LEAST_SHARE) for share in curve] for curve in curves]
    steps = len(curves[0]) - 1
    drawn = axes.imshow(
        shares, aspect="auto", cmap="Greys", norm=LogNorm(LEAST_SHARE, 1), interpolation="nearest",
        extent=(-0.5 / steps, 1 + 0.5 / steps, len(curves) - 0.5, -0.5),
    )  # fmt: skip
    axes.step([kept[0], *kept], [y - 0.5 for y in range(len(kept) + 1)], color="white", linewidth=4, where="pre")
    axes.step([kept[0], *kept], [y - 0.5 for y in range(len(kept) + 1)], color="black", linewidth=1.5, where="pre")
    axes.set(title=title, xlabel="share of all directions kept", xlim=(0, 1))
    axes.yaxis.get_major_locator().set_params(integer=True)
    return drawn


def pareto_figure(measured: Sequence[Mapping[str, Any]]) -> Any:  # noqa: ANN401
    """One picture per text, from rows with text, name, mode, perplexity, bytes per token, and whether it is ours."""
    texts = list(dict.fromkeys(row["text"] for row in measured))
    figure = new_figure(9, 5 * len(texts))
    for ax, text in zip(figure.subplots(len(texts), 1, squeeze=False)[:, 0], texts, strict=True):
        draw_pareto(ax, [row for row in measured if row["text"] == text])
    return figure


def draw_pareto(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401
    """Cache kept against perplexity: one mark and line style per recipe, hollow where keys are rebuilt.

    A broad grey line goes through the rows that no other row beats in both.
    """
    source = next(row for row in rows if row["name"] == "source")
    kept = [(r["bytes_per_token"] / source["bytes_per_token"], r["perplexity"], r) for r in rows if r is not source]
    front = on_front([(share, perplexity) for share, perplexity, _ in kept])
    best = sorted((share, perplexity) for (share, perplexity, _), on in zip(kept, front, strict=True) if on)
    if best:
        axes.plot(*zip(*best, strict=True), color="0.8", linewidth=7, solid_capstyle="round", label="front")
    emphasis = any(row["ours"] for row in rows)
    for index, (name, mode) in enumerate(dict.fromkeys((r["name"], r["mode"]) for _, _, r in kept)):
        own = [(share, perplexity, r) for share, perplexity, r in kept if (r["name"], r["mode"]) == (name, mode)]
        black = not emphasis or any(r["ours"] for _, _, r in own)
        axes.plot(
            *zip(*sorted(point[:2] for point in own), strict=True),
            marker=MARKERS[index % len(MARKERS)], markerfacecolor="white" if mode == "rebuild" else None,
            color="black" if black else "0.45", linestyle=LINES[index % len(LINES)],
            linewidth=2 if emphasis and black else 1, label=f"{name} ({mode})" if mode else name,
        )  # fmt: skip
    axes.axhline(source["perplexity"], color="black", linewidth=2, alpha=0.6, label="source")
    axes.set(xlabel="share of the cache kept", ylabel="perplexity", yscale="log", title=source["text"], xlim=(0, 1.05))
    _label_perplexities(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")


def _label_perplexities(axes: Any) -> None:  # noqa: ANN401
    """Plain numbers on a logarithmic axis, several on a short one too."""
    from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter, StrMethodFormatter  # noqa: PLC0415

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)) if high > SHORT * low else AutoLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
