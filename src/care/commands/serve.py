"""care serve: a converted model behind an engine's own server."""

import os
from pathlib import Path

import click

from ..checkpoint import read_json
from ..errors import BadInput
from ..serving.launch import SERVERS, Model, launch
from .console import say

DEFAULT_PORT = 8000


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--engine", type=click.Choice(["auto", *SERVERS]), default="auto", show_default=True, help="Whose server."
)
@click.option("--port", default=DEFAULT_PORT, show_default=True, help="Where it listens.")
def command(model: Path, engine: str, port: int) -> None:
    """Serve MODEL, a converted checkpoint or an exported GGUF file, over the OpenAI API.

    The first of the installed engines that takes it is started: its own server, in the place of this process. The
    chat template is the source's, which came along.
    """
    exported = model.suffix == ".gguf" and model.is_file()
    if not exported and not (model / "config.json").is_file():
        raise BadInput(f"{model} is neither a converted model's directory nor a GGUF file")
    config = None if exported else read_json(model / "config.json")
    server = launch(Model(model, config), None if engine == "auto" else engine, port)
    say(server.said)
    os.execv(server.command[0], server.command)
