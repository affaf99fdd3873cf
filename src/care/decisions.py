"""What a plan decided, as a file: a conversion that was stopped goes on with the same decisions."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from .calibration import Calibration
from .checkpoint import read_json
from .folding import FoldingSearch
from .output import save_json
from .plan import Plan, at_budget, check_request
from .recipe import Recipe
from .source import Source
from .types import LayerRanks

PLAN_NAME = "plan.json"


def save_plan(plan: Plan, directory: Path) -> None:
    """Everything in a plan that is not in what it was made from."""
    content = {
        "rope": asdict(cast("Any", plan.recipe.rope)),
        "ranks": [asdict(ranks) for ranks in plan.ranks],
        "folding": None if plan.folding is None else asdict(plan.folding),
        "rounding_loss": plan.rounding_loss,
    }
    save_json(directory / PLAN_NAME, content)


def earlier_plan(
    source: Source,
    recipe: Recipe,
    kv_budget: float,
    calibration: Calibration | None,
    dtype: torch.dtype | None,
    directory: Path,
) -> Plan | None:
    """The plan whose decisions are in the directory; None where there are none."""
    if not (directory / PLAN_NAME).is_file():
        return None
    found = read_json(directory / PLAN_NAME)
    given = at_budget(recipe, kv_budget)
    decided = replace(given, rope=replace(cast("Any", given.rope), **found["rope"]))
    tried = found["folding"]
    folding = tried and FoldingSearch({int(f): lost for f, lost in tried["perplexity"].items()}, tried["best"])
    # A folding is searched for what was asked; rope dims change what is asked.
    target = check_request(source, given if folding else decided, kv_budget, dtype)
    ranks = tuple(LayerRanks(**layer) for layer in found["ranks"])
    return Plan(source, decided, kv_budget, target, ranks, calibration, folding, found["rounding_loss"])
