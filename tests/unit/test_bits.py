"""Bits per byte, against direct counts; texts cut alike for tokenizers that have nothing in common."""

import math
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from care.errors import BadInput
from care.evaluation import bits_per_byte, common_spans, measure, measure_bits, predicted_bytes
from tolerances import assert_numbers

TEXT = (
    "The quick brown fox jumps over the lazy dog.  Two spaces, tabs\tand\n\nlines; naïve café, Straße, "
    "日本語のテキスト, emoji 🦊🦊 and 👩‍👩‍👧, then plain words once more: alpha beta gamma delta epsilon. "
) * 12


def fast(tokenizer: Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level(vocab_size: int) -> Any:
    """A byte-level BPE, whose tokens can be parts of a character and leave out the space before them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet))  # type: ignore
    return fast(made)


def sentencepiece_like() -> Any:
    """A unigram model with bytes for what it does not know, and a mark in the place of spaces."""
    pieces = [
        "\u2581the",
        "\u2581",
        "The",
        "qu",
        "ick",
        "\u2581brown",
        "fox",
        "o",
        "e",
        "a",
        "n",
        "t",
        "r",
        "s",
        "word",
    ]
    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *((p, -1.0) for p in pieces)]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(made)


TOKENIZERS = {"bytes": byte_level(256), "merged": byte_level(400), "pieces": sentencepiece_like()}


def run(size: int, seed: int) -> Any:
    """Logits that depend on the token alone."""
    table = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return lambda tokens_BT: table[tokens_BT]


def tokens(name: str, text: str) -> Tensor:
    return torch.tensor(TOKENIZERS[name](text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_predicted_tokens_are_those_of_the_text(name: str) -> None:
    """One window over all of a text without its first token, whose bytes are known; short ones nearly."""
    ids = tokens(name, TEXT)
    whole = predicted_bytes(TOKENIZERS[name], ids[None])
    first = 1 if name == "bytes" else len(TOKENIZERS[name].decode(ids[:1]))
    assert whole == len(TEXT.encode()) - first
    count = len(ids) // 16
    short = predicted_bytes(TOKENIZERS[name], ids[: 16 * count].view(count, 16), skip=4)
    if name == "bytes":
        # One token is one byte.
        assert abs(short - 11 * count) <= 6 * count
    plain = tokens(name, "alpha beta gamma delta " * 100)[:320].view(20, 16)
    expected = sum(len(TOKENIZERS[name].decode(w)) - len(TOKENIZERS[name].decode(w[:5])) for w in plain)
    assert predicted_bytes(TOKENIZERS[name], plain, skip=4) == expected


def test_bits_per_byte_is_the_text_s_bits_over_its_bytes() -> None:
    windows_BT = tokens("bytes", "plain words only, a byte each " * 20)[:512].view(8, 64)
    quality = measure({"a": run(256, 1)}, windows_BT)["a"]
    found = bits_per_byte(quality, predicted_bytes(TOKENIZERS["bytes"], windows_BT))
    logits = run(256, 1)(windows_BT)[:, :-1].double().flatten(0, 1)
    nll_N = torch.nn.functional.cross_entropy(logits, windows_BT[:, 1:].flatten(), reduction="none")
    assert found.num_bytes == found.predictions == 8 * 63
    expected = [float(nll_N.sum()) / math.log(2) / 504, float(nll_N.std(correction=0)) / math.log(2) / math.sqrt(504)]
    assert_numbers([found.value, found.error], expected, "fp32 nats")


@pytest.mark.parametrize("leader", TOKENIZERS)
@pytest.mark.parametrize("skip", [0, 5])
def test_spans_hold_the_same_text_in_every_tokenizer(leader: str, skip: int) -> None:
    """What is counted decodes to the same text, of the stated bytes, and windows follow one another without a gap."""
    order = {leader: TOKENIZERS[leader], **TOKENIZERS}
    window, count = 40, 6
    spans = common_spans(order, TEXT, window, count, skip)
    read = {name: [TOKENIZERS[name].decode(s.tokens_T) for s in found] for name, found in spans.items()}
    assert len({"".join(texts).replace(" ", "") for texts in read.values()}) == 1
    assert TEXT.startswith("".join(read["bytes"]))
    for number in range(count):
        here = {name: found[number] for name, found in spans.items()}
        assert skip < here[leader].first < len(here[leader].tokens_T) <= window + (leader == "pieces")
        counted = {TOKENIZERS["bytes"].decode(here["bytes"].tokens_T[here["bytes"].first :])}
        for name, span in here.items():
            whole, head = read[name][number], TOKENIZERS[name].decode(span.tokens_T[: span.first])
            counted.add(whole.removeprefix(head))
            assert whole.startswith(head)
        assert len(counted) == 1
        assert {len(counted.copy().pop().encode())} == {span.num_bytes for span in here.values()}


def test_models_with_other_tokens_are_measured_on_the_same_bytes() -> None:
    """Uniform models need log2 of their vocabulary for a token; the standard error is that of the mean."""
    spans = common_spans({name: TOKENIZERS[name] for name in ("merged", "bytes")}, TEXT, 32, 5)
    flat = {
        name: (lambda x, size=size: torch.zeros(*x.shape, size)) for name, size in (("merged", 400), ("bytes", 256))
    }
    found = measure_bits(flat, spans)
    assert found["merged"].num_bytes == found["bytes"].num_bytes == found["bytes"].predictions
    assert_numbers([found["bytes"].value, found["bytes"].error], [8.0, 0.0], "fp32 nats")
    expected = math.log2(400) * found["merged"].predictions / found["merged"].num_bytes
    assert_numbers(found["merged"].value, expected, "fp32 nats")
    one = measure_bits({"bytes": run(256, 3)}, spans)["bytes"]
    terms = [
        -run(256, 3)(s.tokens_T)[s.first - 1 : -1].double().log_softmax(-1).gather(1, s.tokens_T[s.first :, None])
        for s in spans["bytes"]
    ]
    nll_N = torch.cat(terms)[:, 0] / math.log(2)
    expected = [float(nll_N.mean()), float(nll_N.std(correction=0)) / math.sqrt(len(nll_N))]
    assert_numbers([one.value, one.error], expected, "fp32 nats")


@pytest.mark.parametrize(
    ("text", "skip", "words"),
    [
        ("too short", 0, "has 9 tokens of bytes, not 3 windows of 8"),
        (TEXT, 7, "no predictions behind the first 7"),
        (" " * 100, 0, "no word of this text ends within a window of 8 tokens"),
    ],
)
def test_texts_that_cannot_be_cut_alike_are_refused(text: str, skip: int, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        common_spans({name: TOKENIZERS[name] for name in ("bytes", "merged")}, text, 8, 3, skip)
