"""SentencePiece vocabularies as scores: what merges say, and what scores cannot say. Tokens: tests/engines."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from care.errors import UnsupportedModel
from care.export.gguf_sentencepiece import BYTE_TOKENS, piece_scores, space_prefix
from care.export.gguf_tokenizer import read_tokenizer

REPLACE: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND: dict[str, Any] = {"type": "Prepend", "prepend": "▁"}
METASPACE: dict[str, Any] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
SPLIT: dict[str, Any] = {
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
}  # fmt: skip
PIECES = ["<unk>", "<s>", *sorted(BYTE_TOKENS), "▁", "a", "b", "ab", "▁a", "▁ab"]
MERGES = [["a", "b"], ["▁", "a"], ["▁", "ab"], ["▁a", "b"]]


def content(normalizer: Any = None, pre_tokenizer: Any = None, merges: Any = MERGES, **more: Any) -> dict[str, Any]:
    """A tokenizer.json of 264 pieces."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    bpe = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab, "merges": merges, **more}
    added = [{"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True}]
    return {"model": bpe, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "added_tokens": added}


def steps(kind: str, *parts: dict[str, Any]) -> dict[str, Any]:
    """Parts one after another."""
    return {"type": "Sequence", kind: list(parts)}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        (steps("normalizers", PREPEND, REPLACE), None, True),
        (None, METASPACE, True),
        (None, {**METASPACE, "prepend_scheme": "never"}, False),
        (REPLACE, SPLIT, False),
    ],
    ids=["Llama 2", "Metaspace", "Metaspace without", "Gemma"],
)
def test_whether_a_space_stands_before_a_text(normalizer: Any, pre_tokenizer: Any, *, prefix: bool) -> None:
    assert space_prefix(content(normalizer, pre_tokenizer)) is prefix


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (None, None),
        (steps("normalizers", {"type": "NFKC"}, REPLACE), None),
        ({**REPLACE, "content": "_"}, None),
        (REPLACE, {**SPLIT, "pattern": {"Regex": r"\d"}}),
        (None, {**METASPACE, "split": True}),
        (REPLACE, METASPACE),
    ],
    ids=["spaces stay", "NFKC", "other mark", "digits", "split words", "twice"],
)
def test_other_preparations_are_refused(normalizer: Any, pre_tokenizer: Any) -> None:
    with pytest.raises(UnsupportedModel, match="prepares its text by"):
        space_prefix(content(normalizer, pre_tokenizer))


def test_scores_are_the_order_of_merges() -> None:
    """Both merges that make a piece stand at one place."""
    assert piece_scores(content()) == {"ab": 0.0, "▁a": -1.0, "▁ab": -2.0}
    assert piece_scores(content(merges=[" ".join(m) for m in MERGES])) == {"ab": 0.0, "▁a": -1.0, "▁ab": -2.0}


@pytest.mark.parametrize(
    ("merges", "why"),
    [
        ([MERGES[0], MERGES[2], MERGES[1], MERGES[3]], "'▁ab' is made by merges of different places"),
        (MERGES[:3], "no merge makes '▁ab' of '▁a' and 'b'"),
    ],
    ids=["two places", "a merge lacks"],
)
def test_merges_that_are_no_scores_are_refused(merges: Any, why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        piece_scores(content(merges=merges))


def test_a_byte_that_lacks_is_named() -> None:
    vocab = {piece: i for i, piece in enumerate(PIECES) if piece != "<0x41>"}
    with pytest.raises(UnsupportedModel, match="no token <0x41>"):
        piece_scores(content(vocab=vocab))


def test_tokens_kinds_and_scores_in_the_order_of_ids(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content(steps("normalizers", PREPEND, REPLACE))))
    made = read_tokenizer(tmp_path, 265)
    assert made.tokens == [*PIECES, "[PAD264]"]
    N, B = TokenType.NORMAL, TokenType.BYTE
    assert made.kinds == [TokenType.UNKNOWN, TokenType.CONTROL, *[B] * 256, *[N] * 6, TokenType.UNUSED]
    assert made.scores == [*[0.0] * 261, 0.0, -1.0, -2.0, 0.0]
    assert made.space_prefix
    assert made.special.merges == []
