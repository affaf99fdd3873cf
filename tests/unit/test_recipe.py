"""Recipes: what is read, what is refused, and how a misspelling is answered."""

from pathlib import Path
from typing import Any

import pytest

from care.allocation import Greedy, Threshold, Uniform
from care.errors import InvalidRecipe
from care.factorization import Asvd, Svd, TwoSided, Whitened
from care.recipe import Recipe, load_recipe, parse_recipe, recipe_names
from care.refit import Ridge
from care.rope_split import KeepAll, MeanPhase, RoRope

SHIPPED: dict[str, tuple[Any, ...]] = {
    "palu": ("rebuild", "native", Svd(), Uniform()),
    "asvd": ("rebuild", "native", Asvd(exponent=0.5), Uniform()),
    "svd-llm": ("rebuild", "native", Whitened(shrinkage=0.0), Uniform()),
    "mha2mla": ("rebuild", "native", Svd(joint=True), Uniform()),
    "care-u": ("rebuild", "native", Whitened(shrinkage=0.01), Uniform()),
    "care-c": ("rebuild", "native", Whitened(shrinkage=0.01, power=2), Uniform()),
    "care-e": ("rebuild", "native", Whitened(shrinkage=0.01), Greedy(0.5, 2.0)),
    "transmla": ("absorbed", "deepseek", Whitened(shrinkage=0.0, joint=True, balanced=True), Uniform()),
    "care-mla": ("absorbed", "deepseek", Whitened(shrinkage=0.01, joint=True), Uniform()),
    "best": ("absorbed", "native", TwoSided(), Threshold()),
    "best-rebuild": ("rebuild", "native", TwoSided(), Threshold()),
    "best-deepseek": ("absorbed", "deepseek", TwoSided(), Uniform()),
}
"""What each paper's method, and each of our own, comes to."""

SPLITS = {"best": MeanPhase(), "best-deepseek": MeanPhase(one_per_frequency=True)}
"""Rope splits other than TransMLA's."""


def read(tmp_path: Path, content: str) -> Recipe:
    """A recipe from a file."""
    (tmp_path / "mine.toml").write_text(content)
    return load_recipe(str(tmp_path / "mine.toml"))


def test_every_shipped_recipe_is_listed_here() -> None:
    assert set(recipe_names()) == set(SHIPPED)


@pytest.mark.parametrize("name", list(SHIPPED))
def test_shipped_recipes_are_their_papers(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.mode, recipe.format, recipe.factorization, recipe.allocation) == SHIPPED[name]
    if recipe.mode == "absorbed":
        assert recipe.rope == SPLITS.get(name, RoRope(dims=64, folding="auto"))
    assert recipe.refit == (Ridge() if name.startswith("best") else None)


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        'paper = "mine"\nmode = "absorbed"\nformat = "native"\n[factorization]\nmethod = "whitened"\nshrinkage = 0.5\n'
        'joint = true\n[rope]\nmethod = "keep-all"\n[allocation]\nmethod = "greedy"\nfloor = 0.25\nceiling = 3\n',
    )
    expected = Recipe("mine", "mine", "absorbed", "native", Whitened(0.5, joint=True), KeepAll(), Greedy(0.25, 3))
    assert recipe == expected


def test_what_is_left_out_has_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, '[factorization]\nmethod = "svd"\n')
    assert (recipe.mode, recipe.format, recipe.allocation) == ("absorbed", "native", Uniform())


REFUSED = {
    "key": ('mod = "absorbed"\n[factorization]\nmethod = "svd"\n', "unknown recipe key 'mod'; did you mean 'mode'?"),
    "option": ('[factorization]\nmethod = "svd"\njoin = true\n', "factorization.'join'; did you mean 'joint'?"),
    "option of another method": ('[factorization]\nmethod = "svd"\nshrinkage = 0.1\n', "factorization.'shrinkage'"),
    "method": ('[factorization]\nmethod = "svdd"\n', "factorization.method 'svdd' is unknown; did you mean 'svd'?"),
    "no method": ("[factorization]\njoint = true\n", "factorization.method None is unknown"),
    "no factorization": ('mode = "absorbed"\n', "lacks [factorization]"),
    "not a table": ('factorization = "svd"\n', "section factorization must be a table"),
    "mode": (
        'mode = "rebuilt"\n[factorization]\nmethod = "svd"\n',
        "mode 'rebuilt' is unknown; did you mean 'rebuild'",
    ),
    "format": ('format = "deepsek"\n[factorization]\nmethod = "svd"\n', "did you mean 'deepseek'?"),
    "rope": ('[factorization]\nmethod = "svd"\n[rope]\nmethod = "rope"\n', "did you mean 'rorope'?"),
    "allocation": ('[factorization]\nmethod = "svd"\n[allocation]\nmethod = "even"\n', "known: uniform, greedy"),
    "text for a number": (
        '[factorization]\nmethod = "whitened"\nshrinkage = "0.1"\n',
        "factorization.shrinkage is '0.1'; expected something like 0.01",
    ),
    "fraction for a count": ('[factorization]\nmethod = "whitened"\npower = 1.5\n', "factorization.power is 1.5"),
    "flag for a number": ('[factorization]\nmethod = "whitened"\npower = true\n', "factorization.power is True"),
    "number for a flag": ('[factorization]\nmethod = "svd"\njoint = 1\n', "factorization.joint is 1"),
    "text for a flag": ('[factorization]\nmethod = "svd"\njoint = "auto"\n', "factorization.joint is 'auto'"),
    "out of range": ('[factorization]\nmethod = "whitened"\npower = 3\n', "it must be 1 or 2"),
    "bounds": ('[factorization]\nmethod = "svd"\n[allocation]\nmethod = "greedy"\nfloor = 2.0\n', "must enclose 1"),
    "not TOML": ("[factorization\n", "is not TOML"),
    "paper that is no text": ('paper = 3\n[factorization]\nmethod = "svd"\n', "paper"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_bad_recipes_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, words = REFUSED[name]
    with pytest.raises(InvalidRecipe) as refused:
        read(tmp_path, content)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(InvalidRecipe, match=r"no recipe 'care-m'; did you mean 'care-mla'.*known: asvd, "):
        load_recipe("care-m")


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name in ("absent.toml", "binary.toml"):
        with pytest.raises(InvalidRecipe, match=f"cannot read recipe .*{name}"):
            load_recipe(str(tmp_path / name))


def test_overrides() -> None:
    """Another mode than the recipe's is native, unless a format is named too."""
    assert (load_recipe("care-mla").format, load_recipe("care-mla", mode="absorbed").format) == ("deepseek", "deepseek")
    rebuilt = load_recipe("care-mla", mode="rebuild")
    assert (rebuilt.mode, rebuilt.format) == ("rebuild", "native")
    absorbed = load_recipe("palu", mode="absorbed", format="deepseek")
    assert (absorbed.mode, absorbed.format) == ("absorbed", "deepseek")
    with pytest.raises(InvalidRecipe, match="format 'gguf' is unknown"):
        load_recipe("palu", format="gguf")


def test_needs_are_those_of_what_is_used() -> None:
    """The rope split counts in absorbed mode only."""
    assert load_recipe("palu").needs == frozenset()
    assert load_recipe("palu", mode="absorbed").needs == {"inputs"}
    assert load_recipe("care-u").needs == {"inputs"}


def test_describe_can_be_read_again() -> None:
    """Provenance is a recipe."""
    for name in recipe_names():
        recipe = load_recipe(name)
        described = recipe.describe()
        assert parse_recipe({k: v for k, v in described.items() if k != "name"}, described["name"]) == recipe


def test_digest_tells_recipes_apart() -> None:
    digests = {load_recipe(name).digest() for name in recipe_names()}
    assert len(digests) == len(recipe_names())
    assert load_recipe("palu").digest() == load_recipe("palu").digest()
    assert load_recipe("palu", mode="absorbed").digest() not in digests
