"""A SentencePiece vocabulary, kept as merges in a tokenizer.json, as llama.cpp's tokenizer `llama`.

SentencePiece joins the neighbors whose piece has the highest score; tokenizer.json holds the same order as a list of
merges, a run of them for each piece. The scores come back as the negative place of each run. What would not be joined
alike is refused.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from ..errors import UnsupportedModel

SPACE = "▁"
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))

Content = Mapping[str, Any]


def is_sentencepiece(content: Content) -> bool:
    """Whether unknown characters fall back to bytes, which byte-level tokenizers need not."""
    return content["model"].get("type") == "BPE" and bool(content["model"].get("byte_fallback"))


def space_prefix(content: Content) -> bool:
    """Whether a space is put before a text; UnsupportedModel where more is changed than spaces to ▁."""
    normalizers, pre_tokenizers = _parts(content, "normalizer"), _parts(content, "pre_tokenizer")
    if _only(pre_tokenizers, "Metaspace") and not normalizers:
        (meta,) = pre_tokenizers
        if meta["replacement"] == SPACE and not meta.get("split"):
            return meta["prepend_scheme"] != "never"
    # Once spaces are gone, splitting at them, which Gemma's files say, does nothing.
    elif all(part["type"] == "Split" and part["pattern"] == {"String": " "} for part in pre_tokenizers):
        replaced = normalizers[-1:]
        if _only(replaced, "Replace") and replaced[0]["pattern"] == {"String": " "} and replaced[0]["content"] == SPACE:
            before = normalizers[:-1]
            if not before:
                return False
            if _only(before, "Prepend") and before[0]["prepend"] == SPACE:
                return True
    steps = " + ".join(part["type"] for part in (*normalizers, *pre_tokenizers)) or "nothing"
    raise UnsupportedModel(
        f"this SentencePiece tokenizer prepares its text by {steps}, which llama.cpp's does not; use llama.cpp's "
        "convert_hf_to_gguf.py with the source's tokenizer.model"
    )


def _parts(content: Content, kind: str) -> list[Content]:
    part = content.get(kind)
    if part is None:
        return []
    return part["normalizers" if kind == "normalizer" else "pretokenizers"] if part["type"] == "Sequence" else [part]


def _only(parts: list[Content], kind: str) -> bool:
    return [part["type"] for part in parts] == [kind]


def piece_scores(content: Content) -> dict[str, float]:
    """The score of every piece that merges make; UnsupportedModel if scores cannot say what the merges say."""
    vocabulary = content["model"]["vocab"]
    missing = BYTE_TOKENS - vocabulary.keys()
    if missing:
        raise UnsupportedModel(
            f"this SentencePiece tokenizer has no token {min(missing)}; llama.cpp needs all 256 bytes"
        )
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in content["model"].get("merges", ())]
    runs = [piece for piece, _ in groupby(left + right for left, right in merges)]
    if len(set(runs)) < len(runs):
        twice = next(piece for place, piece in enumerate(runs) if piece in runs[:place])
        raise _not_scores(f"{twice!r} is made by merges of different places")
    known = set(merges)
    for piece in vocabulary.keys() - BYTE_TOKENS - _added(content):
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        lacking = next((s for s in splits if s[0] in vocabulary and s[1] in vocabulary and s not in known), None)
        if lacking:
            raise _not_scores(f"no merge makes {piece!r} of {lacking[0]!r} and {lacking[1]!r}")
    return {piece: -float(place) for place, piece in enumerate(runs)}


def _added(content: Content) -> set[str]:
    return {token["content"] for token in content.get("added_tokens", ())}


def _not_scores(why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the merges of this tokenizer are no order of scores, which llama.cpp needs: {why}; use llama.cpp's "
        "convert_hf_to_gguf.py with the source's tokenizer.model"
    )
