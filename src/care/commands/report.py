"""care report: a conversion on one page."""

from pathlib import Path

import click

from ..checkpoint import CONVERSION_NAME, read_json
from ..engines import engine_verdicts
from ..errors import BadInput
from ..output import writing
from ..report import render
from ..report.facts import MEASURED_BY
from .console import emit, json_option, out


@click.command()
@click.argument("model", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("page", metavar="PAGE.html", type=click.Path(path_type=Path))
@click.option(
    "--measured", multiple=True, type=click.Path(path_type=Path),
    help=f"JSON of {MEASURED_BY}; may be given again.",
)  # fmt: skip
@json_option
def command(model: Path, page: Path, measured: tuple[Path, ...], json_file: str | None) -> None:
    """Write one HTML file on the converted model OUT that needs no network.

    What each layer caches and gives up, cache sizes, measurements, texts and how to make it again.
    """
    if not (model / CONVERSION_NAME).is_file():
        raise BadInput(f"{model} is not a converted model; care convert makes one")
    conversion, config = read_json(model / CONVERSION_NAME), read_json(model / "config.json")
    if "source_num_kv_heads" not in conversion:
        raise BadInput(f"{model} was converted by an older version of care; convert it again for a report")
    html, facts = render(conversion, [(str(path), read_json(path)) for path in measured], engine_verdicts(config))
    with writing(page):
        page.write_text(html, encoding="utf-8")
    emit(facts, json_file)
    if json_file != "-":
        out.print("\n".join(facts["verdict"]))
        out.print(f"wrote {page}")
