"""The model card: its command makes the checkpoint again, its code loads it, its figures are those of the files."""

import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_heal import NATIVE, request_for

import care.cli
from care.evaluation import live_cache
from care.healing import heal
from care.modeling.loading import Location, load_model, load_tokenizer
from care.report import model_card
from tiny import NUM_WINDOWS, WINDOW, TinyModels

SAMPLES = ("--samples", NUM_WINDOWS, "--length", WINDOW, "--context", WINDOW, "--seed", 3)
SOURCE = "llama-gqa"


def block(card: str, language: str = "") -> str:
    """The first block of code in a language."""
    return card.split(f"\n```{language}\n")[1].split("\n```\n")[0]


def cells(card: str, first: str) -> list[str]:
    """The row of a table that begins with a word."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def section(card: str, title: str) -> str:
    """What is under a heading."""
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `care ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["care", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        care.cli.main()
    return int(left.value.code or 0)


@pytest.fixture
def home(tiny: TinyModels, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with copies of source and text, in which commands are run."""
    shutil.copytree(tiny.directory(SOURCE), tmp_path / "data" / SOURCE)
    shutil.copy(text_file, tmp_path / "data" / "text.txt")
    (tmp_path / "cards").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "options",
    [
        ("--recipe", "best", "--kv-budget", 0.5),
        ("--recipe", "transmla", "--kv-budget", 2 / 3, "--dtype", "bfloat16"),
        ("--recipe", "best-deepseek", "--kv-budget", 0.625),
        ("--recipe", "care-u", "--mode", "absorbed"),
        ("--recipe", "palu", "--kv-budget", 0.3),
        ("--kv-budget", 1.0),
    ],
    ids=str,
)
def test_the_command_on_the_card_gives_the_same_files(
    home: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...]
) -> None:
    """Decisions included, which are in a recipe on the card where a name does not say them."""
    assert (
        run(monkeypatch, "convert", home / SOURCE, "first", "--calibration", home / "text.txt", *SAMPLES, *options) == 0
    )
    card = (home / "first" / "README.md").read_text(encoding="utf-8")
    assert str(home) not in card
    origin = section(card, "How it was made")
    if "```toml" in origin:
        name = origin.split("`, with every choice")[0].rpartition("`")[2]
        (home / name).write_text(block(origin, "toml"))
    command = shlex.split(block(origin).replace("\\\n", " "))
    assert command[:4] == ["care", "convert", SOURCE, "OUT"]
    assert run(monkeypatch, *command[1:]) == 0
    first, again = ({p.name: p.read_bytes() for p in (home / out).iterdir()} for out in ("first", "OUT"))
    assert first.keys() == again.keys()
    # A choice that was made is not made again, so a rerun does not know what the others would have lost.
    assert {name for name in first if first[name] != again[name]} <= {"conversion.json", "README.md"}
    assert section((home / "OUT" / "README.md").read_text(encoding="utf-8"), "How it was made") == origin


@pytest.mark.parametrize(("recipe", "library"), [("best", "care"), ("best-deepseek", "transformers")])
def test_its_code_loads_and_its_figures_are_those_of_the_model(
    home: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, library: str
) -> None:
    arguments = ("convert", SOURCE, "OUT", "--recipe", recipe, "--calibration", "text.txt", *SAMPLES)
    assert run(monkeypatch, *arguments, "--kv-budget", 0.625) == 0
    card = (home / "OUT" / "README.md").read_text(encoding="utf-8")
    metadata = ModelCard(card).data.to_dict()
    assert (metadata["library_name"], metadata["base_model"], "license" in metadata) == (library, SOURCE, False)
    assert "states none that could be read" in section(card, "License")
    made: dict[str, Any] = {}
    exec(block(card, "python"), made)
    used, of_source = (live_cache(m) for m in (made["model"], load_model(Location(home / SOURCE), dtype=torch.float32)))
    assert cells(card, "values") == [f"{u.values_per_token:.0f}" for u in (of_source, used)]
    assert cells(card, "bytes at 16 bits") == [f"{u.bytes_per_token / 2:.0f}" for u in (of_source, used)]
    layers = [line.split("|") for line in section(card, "What each layer caches").splitlines() if "joint" in line]
    widths = 0.0
    for line in layers:
        first, _, last = line[1].strip().partition("-")
        widths += (int(last or first) - int(first) + 1) * int(line[6])
    assert widths == used.values_per_token
    assert made["tokenizer"]("a b")["input_ids"] == load_tokenizer(Location(home / SOURCE))("a b")["input_ids"]


def test_the_source_has_its_license_and_not_its_card_on_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = "license: other\nlicense_name: the 'gemma' license\nlicense_link: https://a.b/c#d\ntags:\n- x"
    (home / SOURCE / "README.md").write_text(f"---\n{metadata}\n---\n# The source's own card\n")
    (home / SOURCE / "LICENSE").write_text("terms")
    assert run(monkeypatch, "convert", SOURCE, "OUT", "--recipe", "palu") == 0
    card = (home / "OUT" / "README.md").read_text(encoding="utf-8")
    stated = {k: v for k, v in yaml.safe_load(card.split("---\n")[1]).items() if k.startswith("license")}
    assert stated == {k: v for k, v in yaml.safe_load(metadata).items() if k.startswith("license")}
    assert "The source's own card" not in card
    assert "the 'gemma' license (https://a.b/c#d)" in section(card, "License")
    assert (home / "OUT" / "LICENSE").read_text() == "terms"


def healed(tiny: TinyModels, model: Path, out: Path) -> tuple[str, dict[str, Any]]:
    """The card and the report after a few steps."""
    report = heal(replace(request_for(tiny, tokens=256), model=str(model)), out)
    return (out / "README.md").read_text(encoding="utf-8"), report


def test_healing_is_on_the_card(tiny: TinyModels, tmp_path: Path) -> None:
    """With what it did; what was said of the conversion stays, and so does a license that a person has added."""
    model = shutil.copytree(tiny.converted(NATIVE), tmp_path / "model")
    before = (model / "README.md").read_text(encoding="utf-8")
    (model / "README.md").write_text(before.replace("library_name", "license: mit\nlibrary_name", 1))
    card, report = healed(tiny, model, tmp_path / "healed")
    looks = report["held_out"]
    for when, look in (("before", looks[0]), ("after", looks[-1])):
        assert cells(card, when) == [str(look["tokens"]), f"{look['ce']:.4f}", f"{look['kl']:.4f}"]
    assert section(card, "How it was made") == section(before, "How it was made")
    assert section(card, "Cache of one token, all layers") == section(before, "Cache of one token, all layers")
    assert ModelCard(card).data.to_dict()["license"] == "mit"
    assert "healed before" not in card
    assert str(tiny.root) not in card
    assert "healed before" in healed(tiny, tmp_path / "healed", tmp_path / "twice")[0]


def test_the_card_names_the_texts_of_healing(tiny: TinyModels, tmp_path: Path) -> None:
    """By their shares where one was named twice, and not by a directory."""
    text = str(tiny.text_file)
    for name, data in (("shares", (text, text, "self")), ("equal", (text, "self"))):
        heal(replace(request_for(tiny, tokens=256), data=data), tmp_path / name)
    said = {name: (tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("shares", "equal")}
    assert "tokens of `text.txt` (2/3), what the teacher wrote (1/3)." in said["shares"]
    assert "tokens of `text.txt`, what the teacher wrote." in said["equal"]


def test_flags_of_healing_are_in_its_command(tiny: TinyModels, tmp_path: Path) -> None:
    _, report = healed(tiny, tiny.converted(NATIVE), tmp_path / "healed")
    config = json.loads((tmp_path / "healed" / "config.json").read_text())
    flags = ("recompute", "compile", "cuda_graph")
    for wanted in (False, True):
        objective = report["request"]["objective"] | {"hidden": 0.5 * wanted}
        asked = report["request"] | dict.fromkeys(flags, wanted) | {"objective": objective}
        card = model_card({}, config, {**report, "request": asked})
        assert ("--hidden 0.5" in card) == wanted
        assert [f"--{flag.replace('_', '-')}" in card for flag in flags] == [wanted] * len(flags)


@pytest.mark.parametrize("left", ["recipe and source", "nothing"])
def test_checkpoints_of_older_versions_heal(tiny: TinyModels, tmp_path: Path, left: str) -> None:
    """Their conversion.json has not all facts, or is not there; nothing is invented."""
    model = shutil.copytree(tiny.converted(NATIVE), tmp_path / "model")
    (model / "README.md").unlink()
    old = json.loads((model / "conversion.json").read_text())
    kept = {key: old[key] for key in ("care_version", "source", "recipe", "layers")} | {"source": "owner/name"}
    (model / "conversion.json").write_text(json.dumps(kept))
    if left == "nothing":
        (model / "conversion.json").unlink()
    card, report = healed(tiny, model, tmp_path / "healed")
    assert cells(card, "after")[2] == f"{report['held_out'][-1]['kl']:.4f}"
    assert "## How it was made" not in card
    assert ModelCard(card).data.to_dict().get("base_model") == (None if left == "nothing" else "owner/name")
    assert load_file(next((tmp_path / "healed").glob("*.safetensors")))
