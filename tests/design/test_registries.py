"""Registries: one file per entry, one page of docs per entry, every shipped recipe parses."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import care
from care.allocation import ALLOCATORS
from care.architectures import ARCHITECTURES
from care.factorization import FACTORIZERS
from care.formats import FORMATS
from care.recipe import load_recipe, recipe_names
from care.rope_split import ROPE_SPLITS

PACKAGE = Path(care.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
REGISTRIES: dict[str, Mapping[str, Any]] = {
    "architectures": ARCHITECTURES,
    "factorization": FACTORIZERS,
    "rope_split": ROPE_SPLITS,
    "allocation": ALLOCATORS,
    "formats": FORMATS,
}
ENTRIES = [pytest.param(package, name, id=name) for package, entries in REGISTRIES.items() for name in entries]
PUBLISHED = ["asvd", "care-e", "care-mla", "care-u", "mha2mla", "palu", "svd-llm", "transmla"]
"""Recipes that the issue names; the package may hold more."""


@pytest.mark.parametrize(("package", "name"), ENTRIES)
def test_every_entry_has_its_own_file(package: str, name: str) -> None:
    assert (PACKAGE / package / f"{name.replace('-', '_')}.py").is_file()


@pytest.mark.parametrize("package", list(REGISTRIES))
def test_every_file_is_an_entry(package: str) -> None:
    files = {path.stem for path in (PACKAGE / package).glob("*.py")} - {"__init__", "base"}
    assert files == {name.replace("-", "_") for name in REGISTRIES[package]}


@pytest.mark.parametrize(("package", "name"), ENTRIES)
def test_every_entry_is_a_frozen_dataclass(package: str, name: str) -> None:
    entry = REGISTRIES[package][name]
    kind = entry if inspect.isclass(entry) else type(entry)
    assert is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert kind.__doc__


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_cites(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    own = re.fullmatch(r"care, (docs/methods/[\w-]+\.md)", recipe.paper)
    assert (DOCS.parent / own[1]).is_file() if own else re.search(r"arXiv \d{4}\.\d{5}", recipe.paper)


def test_every_published_recipe_is_there() -> None:
    assert set(PUBLISHED) <= set(recipe_names())


def documentation() -> str:
    """All pages as one text."""
    pages = sorted(DOCS.rglob("*.md"))
    if not pages:
        pytest.skip("docs/ has no pages yet")
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.parametrize("name", [name for entries in REGISTRIES.values() for name in entries])
def test_every_entry_is_documented(name: str) -> None:
    assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", documentation())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_page(name: str) -> None:
    documentation()
    assert (DOCS / "methods" / f"{name}.md").is_file()
