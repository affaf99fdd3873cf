"""The command line: commands are imported only when called, errors are one line and exit code 2."""

import os
import sys
from importlib import import_module

import click

from .errors import CareError
from .version import __version__

COMMANDS = {
    "inspect": "inspect",
    "calibrate": "calibrate",
    "convert": "convert",
    "eval": "evaluate",
    "compare": "compare",
    "heal": "heal",
    "generate": "generate",
    "export": "export",
}
"""Command name to module in care.commands."""

EXIT_ERROR = 2


class _Commands(click.Group):
    """A group that looks commands up in COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return import_module(f".commands.{COMMANDS[cmd_name]}", __package__).command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="care")
def group() -> None:
    """Turn a pretrained GQA or MHA language model into a multi-head latent attention model."""


def main() -> None:
    """Run the command line and leave with its exit code."""
    # The libraries below read these when they are imported; progress and advice of our own are enough.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(group(standalone_mode=False))
    except CareError as error:
        _fail(str(error))
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_ERROR)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; no output was written")
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "accelerate", "gguf", "huggingface_hub"):
            raise
        _fail(f"this command needs {error.name}; pip install 'care-mla[hf]'")


def _fail(message: str) -> None:
    click.echo("care: error: " + " ".join(message.split()), err=True)
    sys.exit(EXIT_ERROR)
