"""care export: a converted checkpoint as a file for another engine."""

from dataclasses import asdict
from pathlib import Path

import click

from ..errors import BadInput
from ..export import QUANTIZATIONS, export_gguf
from .console import emit, json_option, rich_track

TARGETS = ("gguf",)


@click.command()
@click.argument("model", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(TARGETS), default="gguf", show_default=True, help="Kind of file.")
@click.option("--quantize", help=f"One of {', '.join(QUANTIZATIONS)}; the checkpoint's own type by default.")
@json_option
def command(model: Path, file: Path, target: str, quantize: str | None, json_file: str | None) -> None:
    """Write the checkpoint OUT of format deepseek to FILE, which llama.cpp runs."""
    del target  # there is one so far
    if not (model / "config.json").is_file():
        raise BadInput(f"{model} is not a converted model's directory")
    written = export_gguf(model, file, quantize.lower() if quantize else None, track=rich_track)
    summary = (
        f"wrote {file} ({written.quantization}, {written.num_bytes / 1e6:,.0f} MB, pre-tokenizer "
        f"{written.pre_tokenizer}); run it with llama.cpp: llama-cli -m {file}"
    )
    emit(asdict(written), json_file, summary)
