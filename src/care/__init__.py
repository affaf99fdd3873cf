"""care: turn a pretrained GQA or MHA language model into a multi-head latent attention model.

The command line in Python: `open_source`, `load_recipe`, `calibrate`, `plan_conversion`, `convert`. Nothing here
imports transformers until it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BadInput, CareError, InvalidRecipe, UnsupportedModel
from .version import __version__

if TYPE_CHECKING:
    from .conversion import Report, convert
    from .modeling.native import register
    from .plan import Plan, plan_conversion
    from .recipe import Recipe, load_recipe, recipe_names
    from .source import Source, open_source
    from .statistics import CalibrationRequest, calibrate

_HOMES = {
    "CalibrationRequest": "statistics", "Plan": "plan", "Report": "conversion", "calibrate": "statistics",
    "convert": "conversion", "plan_conversion": "plan", "register": "modeling.native", "Recipe": "recipe",
    "load_recipe": "recipe", "recipe_names": "recipe", "Source": "source", "open_source": "source",
}  # fmt: skip

__all__ = [
    "BadInput",
    "CalibrationRequest",
    "CareError",
    "InvalidRecipe",
    "Plan",
    "Recipe",
    "Report",
    "Source",
    "UnsupportedModel",
    "__version__",
    "calibrate",
    "convert",
    "load_recipe",
    "open_source",
    "plan_conversion",
    "recipe_names",
    "register",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - module attribute hook
    """Import a public name from its module when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'care' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
