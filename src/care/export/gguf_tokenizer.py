"""A tokenizer.json as the tokenizer of a GGUF file.

llama.cpp holds the splitting of text into words in its own code and knows it by name. A name is written only where its
code does what the tokenizer.json says; another tokenizer is refused, because wrong tokens are a wrong model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from ..checkpoint import read_json
from ..errors import BadInput, UnsupportedModel
from .gguf_sentencepiece import BYTE_TOKENS, is_sentencepiece, piece_scores, space_prefix

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3_WORDS = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Step = tuple[str, object]

PRE_TOKENIZERS: dict[str, tuple[tuple[Step, ...], bool]] = {
    "gpt-2": ((("ByteLevel", True),), False),
    "smollm": ((("Digits", True), ("ByteLevel", True)), False),
    "llama-bpe": ((("Split", LLAMA3_WORDS), ("ByteLevel", False)), True),
    "tekken": ((("Split", TEKKEN_WORDS), ("ByteLevel", False)), True),
}
"""llama.cpp's name to the steps that it stands for, and whether words of the vocabulary are taken whole."""

STEP_ARGUMENTS = {"ByteLevel": "use_regex", "Digits": "individual_digits"}


@dataclass(frozen=True)
class GgufTokenizer:
    """Tokens by id, their kinds, and what llama.cpp does before and after looking them up.

    A SentencePiece tokenizer has a score for each token and may put a space before a text; others have neither.
    """

    pre: str
    tokens: list[str]
    kinds: list[TokenType]
    special: gguf.SpecialVocab
    scores: list[float] | None = None
    space_prefix: bool = False

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Everything under tokenizer.* of a GGUF file."""
        writer.add_tokenizer_model("gpt2" if self.scores is None else "llama")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        writer.add_token_types(self.kinds)
        self.special.add_to_gguf(writer, quiet=True)


def read_tokenizer(directory: Path, vocab_size: int) -> GgufTokenizer:
    """The tokenizer of a checkpoint; UnsupportedModel for one that llama.cpp would not run alike."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise BadInput(f"{directory} has no tokenizer.json; save its tokenizer with transformers first")
    content = read_json(file)
    if is_sentencepiece(content):
        return _sentencepiece(directory, content, vocab_size)
    pre = pre_tokenizer_name(content)
    tokens, kinds = _tokens(content, vocab_size)
    if not content["model"].get("merges"):
        raise UnsupportedModel(f"the tokenizer of {directory} has no merges, and llama.cpp does not load such a file")
    return GgufTokenizer(pre, tokens, kinds, _special(directory, vocab_size, load_merges=True))


def _sentencepiece(directory: Path, content: Mapping[str, Any], vocab_size: int) -> GgufTokenizer:
    """Pieces with their scores; bytes and the unknown token are kinds of their own."""
    prefix, scores = space_prefix(content), piece_scores(content)
    tokens, kinds = _tokens(content, vocab_size)
    for i, token in enumerate(tokens):
        if token in BYTE_TOKENS:
            kinds[i] = TokenType.BYTE
        elif token == content["model"].get("unk_token"):
            kinds[i] = TokenType.UNKNOWN
    special = _special(directory, vocab_size, load_merges=False)
    return GgufTokenizer("default", tokens, kinds, special, [scores.get(token, 0.0) for token in tokens], prefix)


def _special(directory: Path, vocab_size: int, *, load_merges: bool) -> gguf.SpecialVocab:
    special = gguf.SpecialVocab(directory, load_merges=load_merges, n_vocab=vocab_size)
    # llama.cpp's own defaults differ by pre-tokenizer, so both are written out.
    special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
    return special


def _tokens(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Tokens and their kinds by id; ids without a token are the padding of an embedding."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    normal = [(token, i, TokenType.NORMAL) for token, i in content["model"]["vocab"].items()]
    added = [
        (token["content"], token["id"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
        for token in content.get("added_tokens", ())
    ]
    for token, i, kind in [*normal, *added]:
        if i >= vocab_size:
            raise BadInput(f"token {token!r} has id {i}, the model's vocabulary ends at {vocab_size}")
        tokens[i], kinds[i] = token, kind
    return tokens, kinds


def pre_tokenizer_name(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for a byte-level BPE tokenizer's way of splitting text."""
    model = content["model"]
    if model.get("type") != "BPE" or content.get("normalizer"):
        raise UnsupportedModel(
            "only SentencePiece and byte-level BPE tokenizers without a normalizer are exported, "
            f"not {model.get('type')}"
        )
    found = (_steps(content.get("pre_tokenizer") or {}), bool(model.get("ignore_merges")))
    for name, known in PRE_TOKENIZERS.items():
        if found == known:
            return name
    raise UnsupportedModel(
        f"the pre-tokenizer {' + '.join(step for step, _ in found[0]) or 'none'} is none that is known to be "
        f"llama.cpp's (known: {', '.join(PRE_TOKENIZERS)}); use llama.cpp's convert_hf_to_gguf.py"
    )


def _steps(pre_tokenizer: Mapping[str, Any]) -> tuple[Step, ...]:
    """Names of the steps, each with the one argument that changes what it does."""
    kind = str(pre_tokenizer.get("type"))
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "Split" and not pre_tokenizer["invert"] and pre_tokenizer["behavior"] == "Isolated":
        return ((kind, pre_tokenizer["pattern"].get("Regex")),)
    if kind in STEP_ARGUMENTS and not pre_tokenizer.get("add_prefix_space"):
        return ((kind, pre_tokenizer[STEP_ARGUMENTS[kind]]),)
    return ((kind, None),)
