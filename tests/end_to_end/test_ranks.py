"""Several processes against one: the same statistics and checkpoints, one voice, no process that waits for ever."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import care.conversion
from care.errors import BadInput
from care.modeling.loading import Location, load_model
from processes import die_before_file, run_care, run_ranks
from tiny import NUM_WINDOWS, WINDOW, TinyModels, random_tokens
from tolerances import assert_close

SAMPLES = ("--samples", str(NUM_WINDOWS), "--length", str(WINDOW), "--context", str(2 * WINDOW))
STEPS = (7, 5)
"""Files that rank 0 or 1 writes before it is killed; rank 0 writes five in a row that only count together."""


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three windows each, so that there is something to share."""
    monkeypatch.setattr("care.calibration.streams.BATCH_TOKENS", 3 * WINDOW)


def run(tmp_path: Path, count: int, *arguments: object) -> None:
    """A run of `count` processes that must succeed, in which only rank 0 speaks."""
    if count == 1:
        assert run_care(tmp_path, *arguments).code == 0
        return
    main, *others = run_ranks(tmp_path, count, *arguments)
    assert (main.code, "done in" in main.said) == (0, True), main.said
    assert {(other.code, other.said) for other in others} == {(0, "")}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("model", ["llama-gqa", "qwen3-moe", "gemma3-local"])
def test_statistics_are_those_of_one_process(
    tiny: TinyModels, tmp_path: Path, text_file: Path, model: str, count: int
) -> None:
    """Of four batches and eight contexts, gradients of drawn labels among them."""
    for processes, name in ((1, "one"), (count, "several")):
        run(tmp_path, processes, "calibrate", tiny.directory(model), tmp_path / name, "--text", text_file, *SAMPLES)
    one, several = ({p.name: p for p in (tmp_path / name).iterdir()} for name in ("one", "several"))
    assert one.keys() == several.keys()
    assert not (tmp_path / "several.partial").exists()
    for name in (name for name in one if name.endswith(".safetensors")):
        expected, found = load_file(one[name]), load_file(several[name])
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert_close(found[key], tensor, "fp64 sums")


def described(out: Path) -> dict[str, Any]:
    """What a conversion's report says of ranks and source."""
    report = json.loads((out / "conversion.json").read_text())
    widths = [[layer[key] for key in ("rope_dim", "key_rank", "value_rank", "width")] for layer in report["layers"]]
    return {"widths": widths, "source": report["source_fingerprint"], "recipe": report["recipe"]}


@pytest.mark.parametrize(
    ("recipe", "model"),
    [("best", "llama-gqa"), ("best-rebuild", "qwen3-moe"), ("best-deepseek", "llama-gqa"), ("care-e", "gemma3-local"),
     ("transmla", "llama-gqa"), ("palu", "mixtral")],
)  # fmt: skip
def test_a_conversion_is_that_of_one_process(
    tiny: TinyModels, tmp_path: Path, text_file: Path, recipe: str, model: str
) -> None:
    """With a refit all processes go through all layers, without one they take turns; the folding is searched once."""
    options = ("--recipe", recipe, "--calibration", text_file, *SAMPLES)
    for count, name in ((1, "one"), (2, "two")):
        run(tmp_path, count, "convert", tiny.directory(model), tmp_path / name, *options)
    assert described(tmp_path / "one") == described(tmp_path / "two")
    assert [p.name for p in tmp_path.glob("*.partial")] == []
    tokens = random_tokens(20, batch=2)
    with torch.inference_mode():
        one, two = (
            load_model(Location(tmp_path / name), dtype=torch.float32)(input_ids=tokens).logits
            for name in ("one", "two")
        )
    assert_close(two, one, "deepseek logits")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("recipe", "model"), [("best", "llama-gqa"), ("care-e", "qwen3-moe")])
def test_processes_that_are_killed_again_and_again(
    tiny: TinyModels, tmp_path: Path, text_file: Path, recipe: str, model: str, victim: int
) -> None:
    """One of two dies before every few files that it writes, and takes the other with it."""
    options = ("--recipe", recipe, "--calibration", text_file, *SAMPLES)
    run(tmp_path, 2, "convert", tiny.directory(model), tmp_path / "whole", *options)
    out, arguments = tmp_path / "out", ("convert", tiny.directory(model), tmp_path / "out", *options)
    for kills in range(50):
        ends = run_ranks(
            tmp_path, 2, *arguments, prepare=lambda rank: die_before_file(STEPS[rank]) if rank == victim else None
        )
        assert (f"continuing from {out}.partial" in ends[0].said) == (kills > 0)
        if ends[victim].code == 0:
            break
        assert ends[victim].code == -signal.SIGKILL
        assert ends[1 - victim].code == 2, ends[1 - victim].said
        assert "another of the processes ended" in ends[1 - victim].said
        assert not out.exists()
    else:
        raise AssertionError("no end")
    assert kills >= 1
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")} for name in ("out", "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_process_ends_both(tiny: TinyModels, tmp_path: Path, text_file: Path, failing: int) -> None:
    """With its own line, and nothing left behind."""

    def spoil(rank: int) -> None:
        def refuse(*_: object) -> None:
            raise BadInput("a tensor is damaged")

        if rank == failing:
            care.conversion.factorize = refuse  # type: ignore[assignment]

    arguments = ("convert", tiny.directory("llama-gqa"), tmp_path / "out", "--calibration", text_file, *SAMPLES)
    ends = run_ranks(tmp_path, 2, *arguments, prepare=spoil)
    assert [end.code for end in ends] == [2, 2]
    assert ends[failing].said.splitlines()[-1] == "care: error: a tensor is damaged"
    assert list(tmp_path.glob("out*")) == []


def test_another_number_of_processes_starts_afresh(tiny: TinyModels, tmp_path: Path, text_file: Path) -> None:
    arguments = ("convert", tiny.directory("llama-gqa"), tmp_path / "out", "--calibration", text_file, *SAMPLES)
    run_ranks(tmp_path, 2, *arguments, prepare=lambda _rank: die_before_file(6))
    assert (tmp_path / "out.partial").is_dir()
    ended = run_care(tmp_path, *arguments)
    assert ended.code == 0
    assert "out.partial is of another number of processes; starting afresh" in ended.said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", "SRC", "OUT", "--samples", "3", "--length", "32"), "in 1 batches, fewer than the 2 processes"),
        (("convert", "SRC", "OUT", "--device", "cuda:1"), "cannot share device 'cuda:1'; give --device cuda"),
        (("convert", "SRC", "OUT", "--recipe", "absent"), "absent"),
        (("eval", "SRC"), "care eval runs in one process; start it without torchrun"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tiny: TinyModels, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    """By one line of whoever found it first."""
    paths = {"SRC": tiny.directory("llama-gqa"), "OUT": tmp_path / "out"}
    ends = run_ranks(tmp_path, 2, *(paths.get(argument, argument) for argument in arguments))
    assert [end.code for end in ends] == [2, 2]
    lines = "".join(end.said for end in ends).splitlines()
    assert sum(words in line for line in lines) in (1, 2)
    assert not list(tmp_path.glob("out*"))


SPOILED = """
import os, care.cli, care.conversion
from care.errors import BadInput
def refuse(*_): raise BadInput("a tensor is damaged")
if os.environ["RANK"] == "1": care.conversion.factorize = refuse
care.cli.main()
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two processes as users start them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_torchrun(tiny: TinyModels, tmp_path: Path) -> None:
    """The command of the README; then an error of rank 1, after which one line is said and nothing is left."""
    options = (tiny.directory("llama-gqa"), tmp_path / "out", "--samples", 8, "--length", 256)
    done = torchrun("-m", "care", "convert", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert (tmp_path / "out" / "config.json").is_file()
    (tmp_path / "spoiled.py").write_text(SPOILED)
    options = (tiny.directory("llama-gqa"), tmp_path / "other", "--samples", 8, "--length", 256)
    failed = torchrun(tmp_path / "spoiled.py", "convert", *options)
    assert failed.returncode != 0
    said = [line for line in failed.stderr.splitlines() if "care: error" in line]
    assert said == ["care: error: a tensor is damaged"]
    assert not (tmp_path / "other").exists()
