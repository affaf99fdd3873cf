"""The command line: commands are imported only when called, errors are one line and exit code 2."""

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NoReturn

import click

from .errors import CareError, InvalidRecipe
from .version import __version__

COMMANDS = {
    "inspect": "inspect",
    "calibrate": "calibrate",
    "convert": "convert",
    "eval": "evaluate",
    "needle": "needle",
    "compare": "compare",
    "heal": "heal",
    "generate": "generate",
    "export": "export",
    "report": "report",
    "serve": "serve",
}
"""Command name to module in care.commands."""

IN_PROCESSES = ("calibrate", "convert")
"""What torchrun can start in several processes that share the work."""

WITH_ACCELERATE = ("heal",)
"""What shares the work by Accelerate's means, which joins the processes itself."""

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
@click.pass_context
def group(ctx: click.Context) -> None:
    """Turn a pretrained GQA or MHA language model into a multi-head latent attention model."""
    if _started_processes() > 1 and ctx.invoked_subcommand not in IN_PROCESSES + WITH_ACCELERATE:
        raise InvalidRecipe(f"care {ctx.invoked_subcommand} runs in one process; start it without torchrun")


def main() -> None:
    """Run the command line and leave with its exit code."""
    # The libraries below read these when they are imported; progress and advice of our own are enough.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if _started_processes() == 1 or sys.argv[1:2] == list(WITH_ACCELERATE):
        _leave(*_run())
    from .ranks import first_to_fail, joined  # noqa: PLC0415 - loads torch

    with joined(int(os.environ["LOCAL_RANK"])):
        code, say = _run()
        if code:
            # What ends all processes is said once.
            _leave(code, say if first_to_fail() else _nothing)


def _started_processes() -> int:
    """How many processes torchrun started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def _leave(code: int, say: Callable[[], object]) -> NoReturn:
    say()
    sys.exit(code)


def _nothing() -> None:
    """Say nothing."""


def _run() -> tuple[int, Callable[[], object]]:
    """Run the command line; its exit code, and what says why."""
    try:
        return int(group(standalone_mode=False) or 0), _nothing
    except CareError as error:
        return _failed(str(error))
    except click.ClickException as error:
        return EXIT_ERROR, error.show
    except (KeyboardInterrupt, click.Abort):
        return _failed("interrupted; no output was written")
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "accelerate", "gguf", "huggingface_hub"):
            raise
        return _failed(f"this command needs {error.name}; pip install 'care-mla[hf]'")


def _failed(message: str) -> tuple[int, Callable[[], object]]:
    return EXIT_ERROR, partial(click.echo, "care: error: " + " ".join(message.split()), err=True)
