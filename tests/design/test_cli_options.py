"""Commands and flags, frozen: a change here is a change for every user."""

import click
import pytest

from care.calibration import MOST_WINDOWS
from care.cli import COMMANDS, group
from care.engines import ENGINES

CALIBRATION = ["--samples", "--length", "--seed", "--context"]
TEXT = ["--text", "--window", "--windows", "--skip"]

OPTIONS = {
    "inspect": ["model", "--plot", "--json"],
    "calibrate": ["model", "stats", "--text", *CALIBRATION, "--recipes", "--device", "--json"],
    "convert": [
        "model", "out_dir", "--recipe", "--for", "--kv-budget", "--calibration", *CALIBRATION, "--mode", "--format",
        "--dry-run", "--dtype", "--device", "--json",
    ],
    "eval": [
        "model", "--against", *TEXT, "--bits-per-byte", "--by-position", "--tasks", "--rows", "--harness",
        "--harness-rows", "--dtype", "--device", "--json",
    ],
    "needle": [
        "model", "--against", "--text", "--lengths", "--depths", "--trials", "--seed", "--plot", "--dtype", "--device",
        "--json",
    ],
    "compare": [
        "model", "--recipes", "--kv-budgets", "--calibration", *CALIBRATION, "--format", *TEXT, "--keep",
        "--plot", "--device", "--json",
    ],
    "heal": [
        "model", "out_dir", "--teacher", "--data", "--minutes", "--tokens", "--train", "--lora-rank", "--beta",
        "--temperature", "--kl-only", "--hidden", "--rate", "--batch", "--length", "--together", "--held-out",
        "--refit-tokens", "--precision", "--recompute", "--compile", "--cuda-graph", "--seed", "--checkpoint-minutes",
        "--tensorboard", "--device", "--json",
    ],
    "generate": ["model", "prompts", "--against", "--max-new-tokens", "--chat", "--dtype", "--device", "--json"],
    "export": ["model", "file", "--to", "--quantize", "--json"],
    "report": ["model", "page", "--measured", "--json"],
    "serve": ["model", "--engine", "--port"],
}  # fmt: skip


def command(name: str) -> click.Command:
    """A command as the group gives it."""
    found = group.get_command(click.Context(group), name)  # type: ignore[attr-defined]
    assert found is not None
    return found


def test_commands_are_frozen() -> None:
    assert list(COMMANDS) == list(OPTIONS)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options_are_frozen(name: str) -> None:
    assert [parameter.opts[0] for parameter in command(name).params] == OPTIONS[name]


@pytest.mark.parametrize("name", list(OPTIONS))
def test_everything_is_explained(name: str) -> None:
    made = command(name)
    assert made.help
    assert all(p.help for p in made.params if isinstance(p, click.Option))


def test_defaults_are_the_documented_ones() -> None:
    defaults = {p.opts[0]: p.default for p in command("convert").params}
    assert (defaults["--for"], defaults["--kv-budget"]) == ("anything", 0.5)
    assert ENGINES["care"].recipe == "best"
    assert (defaults["--samples"], defaults["--length"], defaults["--seed"]) == (128, 256, 42)
    defaults = {p.opts[0]: p.default for p in command("eval").params}
    assert (defaults["--window"], MOST_WINDOWS) == (1024, 24)
