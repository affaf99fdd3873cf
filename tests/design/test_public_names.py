"""The names that users may rely on."""

import pytest

import care

PUBLIC = [
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


def test_the_list_is_frozen() -> None:
    assert care.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_there_and_explained(name: str) -> None:
    value = getattr(care, name)
    assert name == "__version__" or (value.__doc__ and value.__module__.startswith("care."))


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'care' has no attribute 'absent'"):
        _ = care.absent  # pyright: ignore


def test_every_error_is_a_care_error() -> None:
    assert all(issubclass(e, care.CareError) for e in (care.BadInput, care.InvalidRecipe, care.UnsupportedModel))
