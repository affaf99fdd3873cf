"""Tokenizers that llama.cpp runs alike, and the refusal of all others. The tokens themselves: tests/engines."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from care.errors import BadInput, UnsupportedModel
from care.export.gguf_tokenizer import LLAMA3_WORDS, pre_tokenizer_name, read_tokenizer

BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WORDS: dict[str, Any] = {
    "type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False,
}  # fmt: skip
DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    """Steps one after another."""
    return {"type": "Sequence", "pretokenizers": list(steps)}


def content(pre_tokenizer: dict[str, Any] | None, **model: Any) -> dict[str, Any]:
    """A tokenizer.json of four tokens."""
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": [["a", "b"]], **model}
    added = [
        {"id": 3, "content": "<s>", "special": True},
        {"id": 4, "content": "<tool>", "special": False},
    ]
    return {"model": bpe, "pre_tokenizer": pre_tokenizer, "normalizer": None, "added_tokens": added}


KNOWN = {
    "gpt-2": content(BYTES),
    "smollm": content(sequence(DIGITS, BYTES)),
    "llama-bpe": content(sequence(WORDS, {**BYTES, "use_regex": False}), ignore_merges=True),
}
UNKNOWN = {
    "no merges of whole words": content(sequence(WORDS, {**BYTES, "use_regex": False})),
    "other words": content(sequence({**WORDS, "pattern": {"Regex": r"\w+"}}, BYTES), ignore_merges=True),
    "removed words": content(
        sequence({**WORDS, "behavior": "Removed"}, {**BYTES, "use_regex": False}), ignore_merges=True
    ),
    "digits together": content(sequence({**DIGITS, "individual_digits": False}, BYTES)),
    "a space in front": content({**BYTES, "add_prefix_space": True}),
    "none": content(None),
    "WordPiece": content(BYTES, type="WordPiece"),
    "a normalizer": {**content(BYTES), "normalizer": {"type": "NFC"}},
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_pre_tokenizers(name: str) -> None:
    assert pre_tokenizer_name(KNOWN[name]) == name


@pytest.mark.parametrize("name", list(UNKNOWN))
def test_unknown_tokenizers_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"llama\.cpp's|byte-level BPE"):
        pre_tokenizer_name(UNKNOWN[name])


def save(directory: Path, tokenizer: dict[str, Any], **options: Any) -> Path:
    """The files that a checkpoint has."""
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **options}))
    return directory


def test_tokens_their_kinds_and_the_padding(tmp_path: Path) -> None:
    made = read_tokenizer(save(tmp_path, content(BYTES)), 6)
    assert made.tokens == ["a", "b", "ab", "<s>", "<tool>", "[PAD5]"]
    N = TokenType.NORMAL
    assert made.kinds == [N, N, N, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED]
    assert made.special.merges == ["a b"]
    assert made.special.special_token_ids == {"bos": 3}
    assert made.special.add_special_token == {"bos": False, "eos": False}


def test_a_chat_template_is_kept(tmp_path: Path) -> None:
    assert read_tokenizer(save(tmp_path, content(BYTES), chat_template="{{ x }}"), 6).special.chat_template == "{{ x }}"
    save(tmp_path, content(BYTES))
    (tmp_path / "chat_template.jinja").write_text("{{ y }}")
    assert read_tokenizer(tmp_path, 6).special.chat_template == "{{ y }}"


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"'<tool>' has id 4, the model's vocabulary ends at 4"):
        read_tokenizer(save(tmp_path, content(BYTES)), 4)


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="has no merges"):
        read_tokenizer(save(tmp_path, content(BYTES, merges=[])), 6)


def test_a_checkpoint_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path, 6)
