"""care.compare measures in memory what the written checkpoints would give."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from care.calibration import first_windows
from care.comparison import SOURCE, Comparison, compare
from care.evaluation import live_cache, measure
from care.recipe import load_recipe
from tiny import Case, TinyModels
from tolerances import assert_numbers

RECIPES = ("palu", "care-u", "care-e", "mha2mla", "transmla", "care-mla")
BUDGETS = (0.5, 0.25)
WINDOW, WINDOWS = 48, 3
TEXT = "the text"


@pytest.fixture(scope="module")
def windows(tiny: TinyModels) -> Tensor:
    tokens = tiny.source("llama-gqa").tokens(tiny.text_file.read_text())
    return first_windows(tokens, WINDOW, WINDOWS)


@pytest.fixture(scope="module")
def table(tiny: TinyModels, windows: Tensor) -> Comparison:
    chosen = [load_recipe(name) for name in RECIPES]
    return compare(tiny.source("llama-gqa"), chosen, BUDGETS, tiny.calibration("llama-gqa"), {TEXT: windows})


def run(model: Any) -> Any:
    """Logits of a loaded model."""
    return lambda tokens: model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_is_the_converted_checkpoint(tiny: TinyModels, table: Comparison, windows: Tensor, recipe: str) -> None:
    source = tiny.source_model("llama-gqa")
    model = tiny.model(Case("llama-gqa", recipe, 0.5, format="native"))
    expected = measure({SOURCE: run(source), "converted": run(model)}, windows, reference=SOURCE)["converted"]
    row = table.quality[TEXT][f"{recipe} 0.5"]
    assert_numbers(row.nll, expected.nll, "fp32 nats")
    assert row.kl is not None
    assert expected.kl is not None
    assert_numbers(row.kl, expected.kl, "fp32 nats")
    assert row.top1_agreement == expected.top1_agreement
    assert table.cache[f"{recipe} 0.5"] == live_cache(model)


def test_the_source_is_measured_as_it_is(tiny: TinyModels, table: Comparison, windows: Tensor) -> None:
    """And is whole again afterwards."""
    with torch.inference_mode():
        logits = tiny.source_model("llama-gqa")(input_ids=windows, use_cache=False).logits
        again = tiny.source("llama-gqa").logits(windows)
    assert torch.equal(logits, again)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert_numbers(table.quality[TEXT][SOURCE].nll, float(nll), "fp32 nats")
    assert table.quality[TEXT][SOURCE].kl == 0.0


def test_every_row_has_the_same_cache(tiny: TinyModels, table: Comparison) -> None:
    spec = tiny.source("llama-gqa").spec
    for variant in table.variants:
        if variant.refused is None:
            values = variant.kv_budget * spec.cache_width * spec.num_layers
            assert table.cache[variant.name].values_per_token == values


def test_impossible_rows_say_why(table: Comparison) -> None:
    """At a quarter of this width, rotary values alone fill the cache."""
    refused = {variant.name: variant.refused for variant in table.variants if variant.refused}
    assert set(refused) == {"transmla 0.25", "care-mla 0.25"}
    assert all("needs at least 9 (8 rotary)" in reason for reason in refused.values())


def test_less_cache_is_worse(table: Comparison) -> None:
    """Random weights, so only of the weights' own best approximation."""
    kl = [table.quality[TEXT][f"care-u {budget}"].kl for budget in BUDGETS]
    assert 0 < (kl[0] or math.nan) < (kl[1] or math.nan)
