"""The report as one HTML file that needs no network."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from ..errors import BadInput
from .facts import CONTEXTS, facts
from .pictures import draw_errors, draw_losses, draw_spectrum, draw_widths, new_figure, pareto_figure, svg


def render(
    conversion: Mapping[str, Any],
    results: Sequence[tuple[str, Mapping[str, Any]]] = (),
    engines: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, Any]]:
    """The page, and its facts as plain data.

    `conversion` is a checkpoint's conversion.json, `results` are JSON files of care eval, compare and generate by
    name, `engines` which engines take the checkpoint. BadInput for other JSON, or without matplotlib and jinja2.
    """
    try:
        from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise BadInput("a report needs jinja2; pip install 'care-mla[plot]'") from error
    said = {**facts(conversion, results), "engines": dict(engines or {})}
    template = files("care.report").joinpath("page.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(template).render(said, contexts=CONTEXTS, pictures=_pictures(conversion, said)), said


def _pictures(conversion: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, str]:
    layers = conversion["layers"]
    figure = new_figure(9, 6)
    widths, errors = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    draw_widths(widths, conversion)
    if said["losses"]:
        draw_losses(errors, layers)
    else:
        draw_errors(errors, layers)
    drawn = {"profile": svg(figure), "spectra": svg(_spectra(layers))}
    if said["measured"]:
        drawn["pareto"] = svg(pareto_figure(said["measured"]))
    return drawn


def _spectra(layers: Sequence[Mapping[str, Any]]) -> Any:  # noqa: ANN401 - matplotlib's
    """One map per latent, and one of the rope slots where they are weighed."""
    names = ["latent"] if len(layers[0]["left_out"]) == 1 else ["key latent", "value latent"]
    ranks = [[layer["value_rank"]] if layer["joint"] else [layer["key_rank"], layer["value_rank"]] for layer in layers]
    maps = [
        (
            [layer["left_out"][i] for layer in layers],
            [r[i] / max(layer["num_directions"][i], 1) for r, layer in zip(ranks, layers, strict=True)],
            name,
        )
        for i, name in enumerate(names)
    ]
    if layers[0]["rope_left_out"]:
        slots = [layer["rope_dim"] / 2 / layer["rope_slots"] for layer in layers]
        maps.append(([layer["rope_left_out"] for layer in layers], slots, "rotations"))
    figure = new_figure(4.5 * len(maps), 4.5)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    drawn = [draw_spectrum(ax, *made) for ax, made in zip(axes, maps, strict=True)]
    axes[0].set_ylabel("layer")
    figure.colorbar(drawn[0], ax=list(axes), label="share of the energy left out")
    return figure
