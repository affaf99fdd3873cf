"""The front of cache against perplexity: by definition, in the JSON, as text and as a picture."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from care.commands.front import fronts, fronts_text, marks, points
from care.pareto import on_front
from care.report.pictures import pareto_figure


def numbers(values: float, perplexity: float, excess: float = 0.0) -> dict[str, Any]:
    """A row's figures, as the command writes them."""
    return {
        "perplexity": perplexity, "excess": excess, "cache_values_per_token": values,
        "cache_bytes_per_token": 4 * values,
    }  # fmt: skip


ROWS = [
    {"recipe": "a", "mode": "absorbed", "kv_budget": 0.5, **numbers(50.0, 12.0, 0.2)},
    {"recipe": "b", "mode": "rebuild", "kv_budget": 0.5, **numbers(50.0, 11.0, 0.1)},
    {"recipe": "c", "mode": "rebuild", "kv_budget": 0.75, **numbers(75.0, 11.5, 0.15)},
    {"recipe": "a", "mode": "absorbed", "kv_budget": 0.25, **numbers(25.0, 20.0, 0.7)},
    {"recipe": "b", "mode": "rebuild", "kv_budget": 0.25, "refused": "for a reason"},
]
RECORD: dict[str, Any] = {"source": numbers(100.0, 10.0), "rows": ROWS}
FULL = {**RECORD, **fronts(RECORD)}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_a_staircase(points: list[tuple[int, int]]) -> None:
    """From the least cache on, what is lower than all before it; of one cache the lowest, as often as it is there."""
    stairs: list[tuple[int, int]] = []
    for cache in sorted({c for c, _ in points}):
        lowest = min(p for c, p in points if c == cache)
        if not stairs or lowest < stairs[-1][1]:
            stairs.append((cache, lowest))
    assert on_front(points) == [point in stairs for point in points]


def test_rows_on_the_front_are_listed_and_marked() -> None:
    """b beats a and c where there is more cache; a is the best of its mode all the same."""
    assert [(r["recipe"], r["cache_kept"]) for r in FULL["pareto"]] == [("b", 0.5), ("a", 0.25)]
    by_mode = {mode: [(r["recipe"], r["kv_budget"]) for r in rows] for mode, rows in FULL["pareto_by_mode"].items()}
    assert by_mode == {"absorbed": [("a", 0.5), ("a", 0.25)], "rebuild": [("b", 0.5)]}
    assert marks(FULL) == ["+", "*", "", "*", ""]


def test_the_list_is_aligned_and_bars_are_in_proportion() -> None:
    lines = fronts_text("a text", FULL).splitlines()
    assert [line[0] for line in lines[2:-1]] == [" ", "*", "+", "*"]
    assert [line.count("\u2588") for line in lines[2:-1]] == [6, 4, 7, 24]
    assert {line.index("%") for line in lines[1:-1]} == {len("* a 0.25 (absorbed)   75.0")}
    assert lines[1].split() == ["source", "100.0%", "10.00"]


def test_the_picture_has_a_mark_and_a_line_of_its_own_for_every_recipe() -> None:
    """Without colors: no two recipes share both; the front is where it should be."""
    pytest.importorskip("matplotlib")
    rows = [{**ROWS[0], "recipe": f"r{index}"} for index in range(30)]
    many = pareto_figure(points("dir/text", {**RECORD, "rows": rows})).axes[0]
    styles = [
        (line.get_marker(), str(line._unscaled_dash_pattern)) for line in many.lines if line.get_label()[0] == "r"
    ]
    assert len(styles) == len(set(styles)) == 30
    axes = pareto_figure(points("dir/text", RECORD)).axes[0]
    drawn = {line.get_label(): [tuple(map(float, xy)) for xy in line.get_xydata()] for line in axes.lines}
    assert drawn["front"] == [(0.25, 20.0), (0.5, 11.0)]
    assert drawn["a (absorbed)"] == [(0.25, 20.0), (0.5, 12.0)]
    assert drawn["b (rebuild)"] == [(0.5, 11.0)]
    assert axes.get_title() == "text"
