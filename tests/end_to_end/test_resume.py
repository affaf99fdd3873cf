"""Killed at any moment, the same command goes on and gives the same bytes.

Runs are real processes that die of SIGKILL just before a file gets its name, which is when most would be lost.
"""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import care.conversion
import care.output
import care.statistics
from processes import die_before_file, run_care
from tiny import NUM_WINDOWS, WINDOW, TinyModels

SAMPLES = ("--samples", str(NUM_WINDOWS), "--length", str(WINDOW), "--context", str(2 * WINDOW))
STEP = 7
"""Files that a run writes before it is killed."""


def contents(directory: Path) -> dict[str, Any]:
    """Every file; of reports, what is not the clock."""
    files: dict[str, Any] = {p.name: p.read_bytes() for p in directory.iterdir()}
    for name in ("conversion.json", "calibration.json"):
        if name in files:
            report = json.loads(files[name])
            report["seconds"] = None
            if report.get("calibration"):
                report["calibration"]["seconds"] = None
            files[name] = report
    return files


def run_to_the_end(tmp_path: Path, out: Path, *arguments: object) -> int:
    """Kill the command after every few files until it has nothing left to do; how often it was killed."""
    for kills in range(100):
        code, said = run_care(tmp_path, *arguments, prepare=lambda: die_before_file(STEP))
        assert (f"continuing from {out}.partial" in said) == (kills > 0)
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, said
        assert not out.exists()
        assert (tmp_path / f"{out.name}.partial").is_dir()
    raise AssertionError("no end")


@pytest.mark.parametrize(
    ("recipe", "model"), [("best", "llama-gqa"), ("best-rebuild", "qwen3-moe"), ("palu", "mixtral")]
)
def test_a_conversion_that_is_killed_again_and_again(
    tiny: TinyModels, tmp_path: Path, text_file: Path, recipe: str, model: str
) -> None:
    options = ("--recipe", recipe, "--calibration", text_file, *SAMPLES)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_care(tmp_path, "convert", tiny.directory(model), whole, *options)[0] == 0
    kills = run_to_the_end(tmp_path, out, "convert", tiny.directory(model), out, *options)
    assert kills >= (1 if recipe == "palu" else 4)
    assert contents(out) == contents(whole)
    assert not (tmp_path / "out.partial").exists()


def test_a_calibration_that_is_killed_again_and_again(tiny: TinyModels, tmp_path: Path, text_file: Path) -> None:
    options = ("--text", text_file, *SAMPLES)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_care(tmp_path, "calibrate", tiny.directory("llama-gqa"), whole, *options)[0] == 0
    assert run_to_the_end(tmp_path, out, "calibrate", tiny.directory("llama-gqa"), out, *options) >= 3
    assert contents(out) == contents(whole)


def killed(tmp_path: Path, source: Path, out: Path, *options: object) -> None:
    """Leave a conversion behind that was killed with its second layer."""
    code, _ = run_care(tmp_path, "convert", source, out, *options, prepare=lambda: die_before_file(4))
    assert code == -signal.SIGKILL
    assert (tmp_path / "out.partial" / "result" / "model-00001-of-00004.safetensors").is_file()


CHANGES: dict[str, tuple[tuple[object, ...], str]] = {
    "budget": (("--kv-budget", 0.25), "kv budget"),
    "recipe": (("--recipe", "mha2mla"), "recipe"),
    "dtype": (("--dtype", "bfloat16"), "dtype"),
    "windows": (("--samples", 3), "calibration"),
}


@pytest.mark.parametrize("change", [*CHANGES, "source", "text", "version"])
def test_another_run_starts_afresh(tiny: TinyModels, tmp_path: Path, text_file: Path, change: str) -> None:
    """And says so, and gives what it gives without remains."""
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    shutil.copytree(tiny.directory("llama-gqa"), source)
    shutil.copy(text_file, text)
    options = ("--recipe", "palu", "--calibration", text)
    killed(tmp_path, source, out, *options)
    more, words = CHANGES.get(change, ((), change))

    def prepare() -> None:
        if change == "version":
            care.statistics.__version__ = "0.0.0"

    if change == "source":
        os.utime(source / "model.safetensors", ns=(1, 1))
    if change == "text":
        text.write_text("other")
    code, said = run_care(tmp_path, "convert", source, out, *options, *more, prepare=prepare)
    assert code == 0
    assert f"out.partial is of another {words}; starting afresh" in said
    code, _ = run_care(tmp_path, "convert", source, tmp_path / "clean", *options, *more, prepare=prepare)
    assert contents(out) == contents(tmp_path / "clean")


def test_remains_without_a_description_are_replaced(tiny: TinyModels, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--recipe", "palu")
    killed(tmp_path, tiny.directory("llama-gqa"), out, *options)
    (tmp_path / "out.partial" / "run.json").write_text("{")
    code, said = run_care(tmp_path, "convert", tiny.directory("llama-gqa"), out, *options)
    assert (code, "starting afresh" in said) == (0, True)


@pytest.mark.parametrize("recipe", ["transmla", "best-deepseek", "care-e"])
def test_what_was_decided_is_not_decided_again(tiny: TinyModels, tmp_path: Path, text_file: Path, recipe: str) -> None:
    """Neither statistics nor folding nor rope dims nor ranks, once a layer is written."""
    options = ("--recipe", recipe, "--calibration", text_file, *SAMPLES, "--kv-budget", 0.625)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_care(tmp_path, "convert", tiny.directory("llama-gqa"), whole, *options)[0] == 0

    def kill_in_the_second_layer() -> None:
        real = care.output.save_tensors

        def save(path: Path, *arguments: Any) -> None:
            if path.name.startswith("model-00002"):
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, *arguments)

        care.output.save_tensors = save

    def refuse_to_decide() -> None:
        care.conversion.plan_conversion = care.statistics.Collection = None  # type: ignore[assignment]

    arguments = ("convert", tiny.directory("llama-gqa"), out, *options)
    assert run_care(tmp_path, *arguments, prepare=kill_in_the_second_layer)[0] == -signal.SIGKILL
    code, said = run_care(tmp_path, *arguments, prepare=refuse_to_decide)
    assert code == 0, said
    assert contents(out) == contents(whole)


def test_bad_input_leaves_nothing_behind_of_a_run_that_was_killed(tiny: TinyModels, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--recipe", "palu")
    killed(tmp_path, tiny.directory("llama-gqa"), out, *options)

    def spoil() -> None:
        def refuse(*_: object) -> None:
            raise care.BadInput("a tensor is damaged")

        care.conversion.factorize = refuse  # type: ignore[assignment]

    code, said = run_care(tmp_path, "convert", tiny.directory("llama-gqa"), out, *options, prepare=spoil)
    assert (code, "a tensor is damaged" in said) == (2, True)
    assert not (tmp_path / "out.partial").exists()
