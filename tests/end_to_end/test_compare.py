"""care compare measures in memory what the written checkpoints would give, and goes on when it was stopped."""

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import care.comparison
import care.statistics
import care.sweep
from care.calibration import first_windows
from care.comparison import SOURCE, Comparison, Variant, compare, variants_of
from care.errors import BadInput, InvalidRecipe
from care.evaluation import live_cache, measure
from care.recipe import load_recipe
from care.statistics import CalibrationRequest
from processes import die_before_file, run_care
from tiny import NUM_WINDOWS, WINDOW, Case, TinyModels
from tolerances import assert_numbers

RECIPES = ("palu", "care-u", "care-e", "mha2mla", "transmla", "care-mla")
BUDGETS = (0.5, 0.25)
LENGTH, WINDOWS = 48, 3
TEXT = "the text"


@pytest.fixture(scope="module")
def windows(tiny: TinyModels) -> Tensor:
    tokens = tiny.source("llama-gqa").tokens(tiny.text_file.read_text())
    return first_windows(tokens, LENGTH, WINDOWS)


@pytest.fixture(scope="module")
def table(tiny: TinyModels, windows: Tensor) -> Comparison:
    return compare(tiny.source("llama-gqa"), variants(tiny, RECIPES), {TEXT: windows})


def variants(tiny: TinyModels, recipes: tuple[str, ...]) -> list[Variant]:
    """Recipes at both budgets, on the statistics that tiny conversions have."""
    request = CalibrationRequest(str(tiny.text_file), NUM_WINDOWS, WINDOW, seed=1, context=WINDOW)
    return variants_of([load_recipe(name) for name in recipes], BUDGETS, request)


def run(model: Any) -> Any:
    """Logits of a loaded model."""
    return lambda tokens: model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_is_the_converted_checkpoint(tiny: TinyModels, table: Comparison, windows: Tensor, recipe: str) -> None:
    source = tiny.source_model("llama-gqa")
    model = tiny.model(Case("llama-gqa", recipe, 0.5, format="native"))
    expected = measure({SOURCE: run(source), "converted": run(model)}, windows, reference=SOURCE)["converted"]
    row = table.rows[TEXT][f"{recipe} 0.5"].quality
    assert_numbers(row.nll, expected.nll, "fp32 nats")
    assert row.kl is not None
    assert expected.kl is not None
    assert_numbers(row.kl, expected.kl, "fp32 nats")
    assert row.top1_agreement == expected.top1_agreement
    assert table.rows[TEXT][f"{recipe} 0.5"].cache == live_cache(model)


def test_the_source_is_measured_as_it_is(tiny: TinyModels, table: Comparison, windows: Tensor) -> None:
    """And is whole again afterwards."""
    with torch.inference_mode():
        logits = tiny.source_model("llama-gqa")(input_ids=windows, use_cache=False).logits
        again = tiny.source("llama-gqa").logits(windows)
    assert torch.equal(logits, again)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert_numbers(table.rows[TEXT][SOURCE].quality.nll, float(nll), "fp32 nats")
    assert table.rows[TEXT][SOURCE].quality.kl == 0.0


def test_every_row_has_the_same_cache(tiny: TinyModels, table: Comparison) -> None:
    spec = tiny.source("llama-gqa").spec
    for variant in table.variants:
        if variant.name not in table.refused:
            values = variant.kv_budget * spec.cache_width * spec.num_layers
            assert table.rows[TEXT][variant.name].cache.values_per_token == values


def test_impossible_rows_say_why(table: Comparison) -> None:
    """At a quarter of this width, rotary values alone fill the cache."""
    assert set(table.refused) == {"transmla 0.25", "care-mla 0.25"}
    assert all("needs at least 9 (8 rotary)" in reason for reason in table.refused.values())
    assert not table.refused.keys() & table.rows[TEXT].keys()


def test_less_cache_is_worse(table: Comparison) -> None:
    """Random weights, so only of the weights' own best approximation."""
    kl = [table.rows[TEXT][f"care-u {budget}"].quality.kl for budget in BUDGETS]
    assert 0 < (kl[0] or math.nan) < (kl[1] or math.nan)


def clockless(record: Any) -> Any:
    """A result without what is read from the clock."""
    if isinstance(record, dict):
        return {k: clockless(v) for k, v in record.items() if k not in ("seconds", "conversion_seconds")}
    return [clockless(part) for part in record] if isinstance(record, list) else record


def test_the_size_of_a_group_changes_nothing(
    tiny: TinyModels, table: Comparison, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than a group is in memory: the source is run once for each, and every variant once."""
    runs = dict.fromkeys(range(1, 100), 0)

    def counted(models: Any, *arguments: Any, **options: Any) -> Any:
        runs[len(models)] += 1
        return measure(models, *arguments, **options)

    monkeypatch.setattr(care.comparison, "GROUP", 3)
    monkeypatch.setattr(care.comparison, "measure", counted)
    other = compare(tiny.source("llama-gqa"), variants(tiny, RECIPES), {TEXT: windows})
    for name, row in table.rows[TEXT].items():
        same = other.rows[TEXT][name]
        assert (row.quality.nll, row.quality.kl, row.cache) == (same.quality.nll, same.quality.kl, same.cache)
    assert {size: count for size, count in runs.items() if count} == {1 + 3: 3, 1 + 1: 1}


def swept(tmp_path: Path, *arguments: object, prepare: Callable[[], None] = lambda: None) -> tuple[int, str, Any]:
    """Run `care compare`; its exit code, what it said, and its JSON if it came to that."""
    result = tmp_path / "result.json"
    result.unlink(missing_ok=True)
    code, said = run_care(tmp_path, "compare", *arguments, "--json", result, prepare=prepare)
    return code, said, json.loads(result.read_text()) if code == 0 else None


def options(tiny: TinyModels, tmp_path: Path) -> tuple[object, ...]:
    """Six variants on two texts, in groups of four."""
    other = tmp_path / "other.txt"
    other.write_text(tiny.text_file.read_text()[::-1])
    return (
        tiny.directory("llama-gqa"), "--recipes", "best-rebuild,care-u,palu", "--kv-budgets", "0.5,0.25",
        "--calibration", tiny.text_file, "--samples", NUM_WINDOWS, "--length", WINDOW, "--context", 2 * WINDOW,
        "--text", tiny.text_file, "--text", other, "--window", LENGTH, "--windows", WINDOWS,
    )  # fmt: skip


def test_a_comparison_that_is_killed_again_and_again(tiny: TinyModels, tmp_path: Path) -> None:
    """Before every fourth file; a group is converted again, so its recipes write none."""
    arguments, kept = (*options(tiny, tmp_path), "--recipes", "care-u,svd-llm,palu"), tmp_path / "kept"
    _, _, whole = swept(tmp_path, *arguments)
    finished, result = list[int](), None
    for _ in range(100):
        code, said, result = swept(tmp_path, *arguments, "--keep", kept, prepare=lambda: die_before_file(4))
        finished += [int(found) for found in re.findall(r"(\d) of 6 variants are finished already", said)]
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
    assert finished == sorted(finished)
    assert len(set(finished)) >= 2
    assert clockless(result) == clockless(whole)
    assert not list(kept.glob("*.partial"))


def nothing_may_be_made() -> None:
    """Neither statistics nor conversions nor measurements."""
    care.sweep.calibrate = care.comparison.convert_layers = None  # type: ignore[assignment]
    care.comparison.measure = None  # type: ignore[assignment]


def test_what_is_finished_is_not_done_again(tiny: TinyModels, tmp_path: Path) -> None:
    """The same table to the last second of the clock; a text of another name and a subset of recipes are there too."""
    arguments, kept = options(tiny, tmp_path), ("--keep", tmp_path / "kept")
    _, _, first = swept(tmp_path, *arguments, *kept)
    code, said, again = swept(tmp_path, *arguments, *kept, prepare=nothing_may_be_made)
    assert (code, again) == (0, first), said
    (tmp_path / "renamed.txt").write_bytes(tiny.text_file.read_bytes())
    fewer = ("--recipes", "palu,care-u", "--text", tmp_path / "renamed.txt")
    code, said, part = swept(tmp_path, *arguments, *fewer, *kept, prepare=nothing_may_be_made)
    assert code == 0, said
    rows = {(r["recipe"], r["kv_budget"]): r for r in first["texts"][str(tiny.text_file)]["rows"]}
    assert all(rows[r["recipe"], r["kv_budget"]] == r for r in part["texts"][str(tmp_path / "renamed.txt")]["rows"])


CHANGES: dict[str, tuple[object, ...]] = {
    "budget": ("--kv-budgets", "0.5,0.375"),
    "format": ("--format", "deepseek"),
    "samples": ("--samples", NUM_WINDOWS - 1),
    "second calibration": ("--calibration", "python-help"),
    "windows": ("--windows", WINDOWS - 1),
    "window": ("--window", LENGTH - 1),
    "skip": ("--skip", 3),
}


@pytest.mark.parametrize("change", [*CHANGES, "recipe", "text", "calibration", "source", "version"])
def test_whatever_decides_about_a_row_makes_it_another(tiny: TinyModels, tmp_path: Path, change: str) -> None:
    """With a directory that another question filled, the result is that of no directory."""
    source, recipe = tmp_path / "source", tmp_path / "mine.toml"
    shutil.copytree(tiny.directory("llama-gqa"), source)
    text, calibration = tmp_path / "text.txt", tmp_path / "calibration.txt"
    for file in (text, calibration):
        file.write_bytes(tiny.text_file.read_bytes())
    recipe.write_text('mode = "absorbed"\n[factorization]\nmethod = "whitened"\njoint = true\n[rope]\n'
                      'method = "rorope"\ndims = 4\n')  # fmt: skip
    arguments: tuple[object, ...] = (
        source, "--recipes", recipe, "--kv-budgets", "0.5", "--calibration", calibration, "--samples", NUM_WINDOWS,
        "--length", WINDOW, "--text", text, "--window", LENGTH, "--windows", WINDOWS,
    )  # fmt: skip
    kept = ("--keep", tmp_path / "kept")
    _, _, before = swept(tmp_path, *arguments, *kept)
    if change == "recipe":
        recipe.write_text(recipe.read_text().replace("joint", "shrinkage = 0.5\njoint"))
    if change in ("text", "calibration"):
        (tmp_path / f"{change}.txt").write_text(tiny.text_file.read_text()[::-1])
    if change == "source":
        shutil.rmtree(source)
        shutil.copytree(tiny.directory("llama-wide"), source)
    prepare = new_version if change == "version" else lambda: None
    code, said, expected = swept(tmp_path, *arguments, *CHANGES.get(change, ()), prepare=prepare)
    assert code == 0, said
    _, said, found = swept(tmp_path, *arguments, *CHANGES.get(change, ()), *kept, prepare=prepare)
    assert "of 1 variants are finished already" not in said
    assert clockless(found) == clockless(expected)
    assert (clockless(found) == clockless(before)) == (change in ("version", "format"))


def new_version() -> None:
    """As if another version of care were installed."""
    care.statistics.__version__ = "0.0.0"


def test_damaged_rows_and_names_given_twice_are_named(tiny: TinyModels, windows: Tensor, tmp_path: Path) -> None:
    source, palu = tiny.source("llama-gqa"), variants(tiny, ("palu",))
    compare(source, palu, {TEXT: windows}, directory=tmp_path)
    next((tmp_path / "rows").glob("palu-0.5-*.json")).write_text('{"row": {}}')
    with pytest.raises(BadInput, match=r"palu-0\.5-.*json is damaged; remove it"):
        compare(source, palu, {TEXT: windows}, directory=tmp_path)
    with pytest.raises(InvalidRecipe, match=r"2 variants are called 'palu 0\.5'"):
        compare(source, [*palu, *palu], {TEXT: windows})
