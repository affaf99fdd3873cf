"""Texts by name from the hub: what is asked of `datasets`, how rows are joined, and what is said without it.

`datasets` itself is no part of the development environment; here it is a module with one function, which knows the
rows that the real sets begin with.
"""

import sys
from types import ModuleType
from typing import Any

import pytest

from care.calibration import load_text
from care.calibration.hub_texts import HUB_TEXTS
from care.errors import BadInput

PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/0000.parquet"
ASKED = {
    "wikitext2-train": ("Salesforce/wikitext", "train", {"name": "wikitext-2-raw-v1"}),
    "wikitext2-valid": ("Salesforce/wikitext", "validation", {"name": "wikitext-2-raw-v1"}),
    "wikitext2-test": ("Salesforce/wikitext", "test", {"name": "wikitext-2-raw-v1"}),
    "ptb-train": ("parquet", "train", {"data_files": PTB.format("train")}),
    "ptb-valid": ("parquet", "train", {"data_files": PTB.format("validation")}),
    "ptb-test": ("parquet", "train", {"data_files": PTB.format("test")}),
    "c4-train": ("allenai/c4", "train", {
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "verification_mode": "no_checks"}),
    "c4-valid": ("allenai/c4", "validation", {
        "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "verification_mode": "no_checks"}),
}  # fmt: skip
COLUMN = {"parquet": "sentence"}


class Rows(list[str]):
    """A data set of one column."""

    def __init__(self, rows: list[str], column: str) -> None:
        super().__init__(rows)
        self.column = column

    def select(self, indices: range) -> "Rows":
        """Some rows."""
        return Rows([self[index] for index in indices], self.column)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            assert key == self.column
            return list(self)
        return super().__getitem__(key)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Rows to give and the last call, of a library that stands in for `datasets`."""
    state: dict[str, Any] = {"rows": ["", " = One = ", "two"]}

    def load_dataset(path: str, *, split: str, **more: Any) -> Rows:
        state["asked"] = (path, split, more)
        if "error" in state:
            raise state["error"]
        return Rows(state["rows"], COLUMN.get(path, "text"))

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return state


def test_every_text_is_asked_for_by_its_own_name_split_and_column(hub: dict[str, Any]) -> None:
    assert list(ASKED) == list(HUB_TEXTS)
    for name, asked in ASKED.items():
        text = load_text(name)
        assert hub["asked"] == asked
        assert text == ("  = One =  two" if name.startswith("ptb") else "\n\n = One = \n\ntwo")


def test_of_c4_a_part_is_taken(hub: dict[str, Any]) -> None:
    hub["rows"] = [str(number) for number in range(20_000)]
    for name, rows in (("c4-valid", 1100), ("c4-train", 10_000)):
        assert load_text(name) == "\n\n".join(map(str, range(rows)))
    assert len(load_text("wikitext2-test").split()) == 20_000


class OfAnotherLibrary(Exception):
    """As httpx has them."""


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach it\nfor long"), OfAnotherLibrary("Couldn't reach it")]
)
def test_a_hub_that_is_not_reached_is_one_line(hub: dict[str, Any], error: Exception) -> None:
    hub["error"] = error
    with pytest.raises(BadInput) as refused:
        load_text("ptb-test")
    said = "cannot fetch the text ptb-test from the hub (Couldn't reach it); give a file instead"
    assert str(refused.value) == said


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"c4-valid is fetched by datasets; pip install 'care-mla\[texts\]', or give"):
        load_text("c4-valid")


def test_a_misspelled_name_is_offered_the_nearest(hub: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"no such text file: wikitext-test; did you mean wikitext2-test"):
        load_text("wikitext-test")
    assert "asked" not in hub
