"""A recipe: the whole scientific content of a conversion, read from one small TOML document."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

from .allocation import ALLOCATORS, Allocator
from .errors import InvalidRecipe
from .factorization import FACTORIZERS, Factorizer
from .formats import FORMATS
from .refit import REFITS, Ridge
from .rope_split import ROPE_SPLITS, RopeSplit, RoRope
from .types import MODES, Mode

Part = TypeVar("Part")


@dataclass(frozen=True)
class Recipe:
    """How to convert: method, rope split, allocation, and the runtime mode and format of the result.

    `rope` matters in absorbed mode only; `refit` is what is done after truncation, None for nothing; `paper` cites the
    method's source.
    """

    name: str
    paper: str
    mode: Mode
    format: str
    factorization: Factorizer
    rope: RopeSplit
    allocation: Allocator
    refit: Ridge | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that calibration must provide."""
        split = self.rope.needs if self.mode == "absorbed" else frozenset[str]()
        after = frozenset[str]() if self.refit is None else self.refit.needs
        return self.factorization.needs | split | after

    def describe(self) -> dict[str, Any]:
        """Every choice as plain data, for provenance."""
        parts = {"factorization": FACTORIZERS, "rope": ROPE_SPLITS, "allocation": ALLOCATORS}
        described: dict[str, Any] = {key: getattr(self, key) for key in ("name", "paper", "mode", "format")}
        for key, registry in parts.items():
            part = getattr(self, key)
            described[key] = {"method": _registered_name(registry, part), **asdict(part)}
        if self.refit is not None:
            described["refit"] = {"method": _registered_name(REFITS, self.refit), **asdict(self.refit)}
        return described

    def digest(self) -> str:
        """A short hash of every choice."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]


def _registered_name(registry: Mapping[str, type], part: object) -> str:
    return next(name for name, kind in registry.items() if type(part) is kind)


def nearest(word: str, known: list[str]) -> str:
    """A hint for a misspelt word: the nearest known one, and all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(known)})"


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes in the package."""
    return tuple(sorted(p.name.removesuffix(".toml") for p in _recipe_dir().iterdir() if p.name.endswith(".toml")))


def _recipe_dir() -> Any:  # noqa: ANN401 - importlib's Traversable moved between modules in 3.11-3.14
    return resources.files("care") / "recipes"


def load_recipe(name_or_file: str, *, mode: Mode | None = None, format: str | None = None) -> Recipe:
    """A named recipe or a TOML file, with mode and format overridden where given.

    Raises InvalidRecipe for an unknown name, key or value, with the nearest valid one.
    """
    path = Path(name_or_file)
    if path.suffix == ".toml":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRecipe(f"cannot read recipe {path}: {error}") from error
    elif name_or_file in recipe_names():
        text = (_recipe_dir() / f"{name_or_file}.toml").read_text(encoding="utf-8")
    else:
        raise InvalidRecipe(f"no recipe {name_or_file!r}" + nearest(name_or_file, list(recipe_names())))
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidRecipe(f"recipe {name_or_file} is not TOML: {error}") from error
    recipe = parse_recipe(document, path.stem)
    if mode is not None and mode != recipe.mode:
        recipe = replace(recipe, mode=mode, format="native")
    return recipe if format is None else replace(recipe, format=_choice("format", format, list(FORMATS)))


def parse_recipe(document: Mapping[str, Any], name: str) -> Recipe:
    """A recipe from a parsed document; unknown keys are refused."""
    known = ["paper", "mode", "format", "factorization", "rope", "allocation", "refit"]
    _refuse_unknown(document, known, "")
    if "factorization" not in document:
        raise InvalidRecipe(f"recipe {name} lacks [factorization]; it needs at least its method")
    paper = document.get("paper", "")
    _check_type("paper", paper, "")
    mode = _choice("mode", document.get("mode", "absorbed"), list(MODES))
    return Recipe(
        name=name,
        paper=paper,
        mode=cast("Mode", mode),
        format=_choice("format", document.get("format", "native"), list(FORMATS)),
        factorization=_part(FACTORIZERS, document["factorization"], "factorization"),
        rope=_part(ROPE_SPLITS, document["rope"], "rope") if "rope" in document else RoRope(),
        allocation=_part(ALLOCATORS, document.get("allocation", {"method": "uniform"}), "allocation"),
        refit=_part(REFITS, document["refit"], "refit") if "refit" in document else None,
    )


def _choice(key: str, value: object, known: list[str]) -> str:
    if value not in known:
        raise InvalidRecipe(f"{key} {value!r} is unknown" + nearest(str(value), known))
    return str(value)


def _refuse_unknown(table: Mapping[str, Any], known: list[str], section: str) -> None:
    for key in table:
        if key not in known:
            raise InvalidRecipe(f"unknown recipe key {section}{key!r}" + nearest(key, known))


def _part(registry: Mapping[str, type[Part]], table: object, section: str) -> Part:
    """One section as a dataclass of its registry, each value checked against the field's default type."""
    if not isinstance(table, dict):
        raise InvalidRecipe(f"recipe section {section} must be a table with a method")
    options = dict(cast("Mapping[str, Any]", table))
    method = _choice(f"{section}.method", options.pop("method", None), list(registry))
    kind = registry[method]
    defaults = {f.name: f.default for f in fields(cast("Any", kind))}
    _refuse_unknown(options, ["method", *defaults], f"{section}.")
    may_be_auto = {f.name for f in fields(cast("Any", kind)) if "auto" in str(f.type)}
    for key, value in options.items():
        if value == "auto" and key in may_be_auto:
            continue
        _check_type(f"{section}.{key}", value, defaults[key])
    return kind(**options)


def _check_type(key: str, value: object, default: object) -> None:
    allowed = (int, float) if isinstance(default, float) else type(default)
    wrong_bool = isinstance(value, bool) != isinstance(default, bool)
    if wrong_bool or not isinstance(value, allowed):
        raise InvalidRecipe(f"recipe key {key} is {value!r}; expected something like {default!r}")
