"""Texts and the windows cut from them."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from care.calibration import (
    TEXTS,
    equal_shares,
    first_windows,
    load_text,
    sampled_windows,
    taken_in_turn,
    whole_windows,
)
from care.errors import BadInput

TEXT = "na\u00efve text\nof two lines\n"
ROWS = [{"text": "one"}, {"text": "two"}]


def test_plain_and_gzipped_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert load_text(str(tmp_path / "a.txt")) == TEXT
    assert load_text(str(tmp_path / "a.txt.gz")) == TEXT


def test_rows_are_joined_by_blank_lines(tmp_path: Path) -> None:
    content = "\n".join(map(json.dumps, ROWS)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert load_text(str(tmp_path / name)) == "one\n\ntwo"


@pytest.mark.parametrize("row", ["{", '{"body": "x"}', "[1]", '"text"', '{"text": 1}'])
def test_rows_without_text_are_refused(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + row)
    with pytest.raises(BadInput, match='every row must be a JSON object with a "text" key'):
        load_text(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"\xff\xfe\xfa"), ("a.gz", b"not gzip"), ("b.gz", b"\x1f\x8b")]
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"cannot read .*{name}"):
        load_text(str(tmp_path / name))


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(TEXT.encode() * 100))
    content[15:25] = b"\x00" * 10
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(BadInput, match="cannot read"):
        load_text(str(tmp_path / "a.txt.gz"))


def test_missing_file_names_the_named_texts() -> None:
    with pytest.raises(BadInput, match=r"absent; texts by name: python-help, python-help-heldout, wikitext2-train, .*"):
        load_text("absent")


def test_named_texts_are_disjoint() -> None:
    from pydoc_data.topics import topics

    train, held_out = (load_text(name) for name in TEXTS)
    names = sorted(topics)
    for index, name in enumerate(names):
        assert (topics[name] in held_out, topics[name] in train) == (index % 4 == 3, index % 4 != 3) or any(
            topics[name] in topics[other] for other in names if other != name
        )
    assert len(train) > 2 * len(held_out) > 50_000


def test_first_windows_follow_one_another() -> None:
    assert first_windows(torch.arange(11), 3, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_what_is_measured_where_no_number_of_windows_is_asked_for() -> None:
    """All that the text has up to a bound; one of a text that is too short, so that it is refused by its own length."""
    assert [whole_windows(tokens, 10) for tokens in (9, 10, 29, 239, 240, 10_000)] == [1, 1, 2, 23, 24, 24]


def test_sampled_windows_are_windows_of_the_text_without_repetition() -> None:
    tokens = torch.arange(103)
    drawn = sampled_windows(tokens, 10, 6, seed=1)
    starts = drawn[:, 0].tolist()
    assert torch.equal(drawn, torch.tensor(starts)[:, None] + torch.arange(10))
    assert all(start % 10 == 0 and start < 100 for start in starts)
    assert len(set(starts)) == 6


def test_the_first_drawn_windows_are_a_smaller_draw() -> None:
    tokens = torch.arange(1000)
    assert torch.equal(sampled_windows(tokens, 10, 6, seed=1)[:2], sampled_windows(tokens, 10, 2, seed=1))


def test_sampling_is_fixed_by_its_seed() -> None:
    tokens = torch.arange(1000)
    draws = [sampled_windows(tokens, 10, 6, seed).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_all_windows_can_be_asked_for() -> None:
    drawn = sampled_windows(torch.arange(30), 10, 3, seed=0)
    assert torch.equal(drawn[drawn[:, 0].argsort()], torch.arange(30).view(3, 10))


def test_shares_are_equal_up_to_one_and_taken_in_turn() -> None:
    assert [equal_shares(7, among) for among in (1, 2, 3)] == [[7], [4, 3], [3, 2, 2]]
    parts = [torch.full((count, 2), value) for value, count in ((0, 3), (1, 1), (2, 2))]
    assert taken_in_turn(parts)[:, 0].tolist() == [0, 1, 2, 0, 2, 0]


@pytest.mark.parametrize("cut", [lambda t, n, c: first_windows(t, n, c), lambda t, n, c: sampled_windows(t, n, c, 0)])
def test_a_text_too_short_says_by_how_much(cut) -> None:
    with pytest.raises(BadInput, match=r"the text has 29 tokens, 3 windows of 10 need 30; .* of which it has 2"):
        cut(torch.arange(29), 10, 3)
    for length, count in ((1, 3), (10, 0)):
        with pytest.raises(BadInput, match="need at least 1 window of 2 tokens"):
            cut(torch.arange(29), length, count)
