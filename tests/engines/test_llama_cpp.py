"""Exported files in llama.cpp itself against transformers on the same checkpoint."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from care.export import export_gguf
from care.export.gguf_sentencepiece import BYTE_TOKENS
from care.export.gguf_tokenizer import LLAMA3_WORDS, PRE_TOKENIZERS, TEKKEN_WORDS
from llama_process import ask_llama
from tiny import VOCABULARY, Case, TinyModels, random_tokens
from tolerances import assert_close

CASES = [
    Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek"),
    Case("llama-mha", "transmla", 0.5, "absorbed", "deepseek"),
    Case("llama-mqa", "care-mla", 1.0, "absorbed", "deepseek"),
    Case("llama-mqa-tied", "care-mla", 1.0, "absorbed", "deepseek"),
    Case("mistral", "care-mla", 0.5, "absorbed", "deepseek"),
]
"""Tied and untied heads, another eps, head dims 8, 12 and 16, full rank and less."""

EVERY = pytest.mark.parametrize("case", CASES, ids=str)
KV_CELLS = 256
"""llama.cpp rounds a context up to this many tokens."""
MIB = 2**20
HALF_BYTES = 2


STEPS: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name, words in (("llama-bpe", LLAMA3_WORDS), ("tekken", TEKKEN_WORDS))
    },
}


def exported(tiny: TinyModels, case: Case, to: Path, quantization: str) -> Path:
    """A conversion as a GGUF file whose tokens are whole characters: llama.cpp reports no others' probabilities."""
    checkpoint = shutil.copytree(tiny.converted(case), to / "model")
    words = {f"t{i}": i for i in range(VOCABULARY - 1)} | {"t1t2": VOCABULARY - 1}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[("t1", "t2")]))
    tokenizer.pre_tokenizer = STEPS["gpt-2"]
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(checkpoint)
    file = to / f"{quantization}.gguf"
    export_gguf(checkpoint, file, quantization)
    return file


def distributions(file: Path, tokens: list[int], **options: Any) -> Tensor:
    """llama.cpp's log-probabilities (T, vocabulary) after each prefix of a text."""
    jobs = [{"prompt": tokens[: t + 1], "predict": 1, "probs": VOCABULARY} for t in range(len(tokens))]
    answer = ask_llama(file, completions=jobs, **options)
    tops = [completion["top"][0] for completion in answer.completions]
    return torch.tensor([[top.get(str(i), float("nan")) for i in range(VOCABULARY)] for top in tops])


@EVERY
def test_log_probabilities_are_those_of_transformers(tiny: TinyModels, case: Case, tmp_path: Path) -> None:
    """fp32 weights and cache, every token of the vocabulary, at every position."""
    model, tokens = tiny.model(case), random_tokens(24)
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    made = distributions(exported(tiny, case, tmp_path, "f32"), tokens[0].tolist(), cache="f32")
    assert_close(made, expected, "llama.cpp log-probabilities")


@EVERY
def test_greedy_tokens_are_those_of_transformers(tiny: TinyModels, case: Case, tmp_path: Path) -> None:
    """Prefill of a prompt, then decode from the latent cache."""
    prompts, length = [random_tokens(n, seed=n) for n in (3, 17)], 24
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 258, "eos_token_id": None}
    expected = [
        tiny.model(case).generate(input_ids=p, attention_mask=torch.ones_like(p), **options)[0, p.shape[1] :].tolist()
        for p in prompts
    ]
    jobs = [{"prompt": p[0].tolist(), "predict": length, "probs": 1} for p in prompts]
    answer = ask_llama(exported(tiny, case, tmp_path, "f32"), cache="f32", completions=jobs)
    assert [completion["ids"] for completion in answer.completions] == expected


@EVERY
def test_only_latents_are_cached(tiny: TinyModels, case: Case, tmp_path: Path) -> None:
    """The buffer that llama.cpp reports, to the two decimals that it prints."""
    layers, width = 3, tiny.plan(case).ranks[0].width
    context = 64 * KV_CELLS
    answer = ask_llama(exported(tiny, case, tmp_path, "f32"), context=context)
    assert answer.kv_mib == round(layers * width * context * HALF_BYTES / MIB, 2)


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0", "q4_1"])
def test_small_types_keep_the_latent(tiny: TinyModels, tmp_path: Path, quantization: str) -> None:
    """The scaled-down latent, lost to fp16, would leave every position with the same values."""
    case, tokens = CASES[0], random_tokens(12)
    model = tiny.model(case)
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits[0].softmax(-1)
    made = distributions(exported(tiny, case, tmp_path, quantization), tokens[0].tolist()).exp()
    moved = 0.5 * (made - expected).abs().sum(-1)
    assert float(moved.max()) < {"f16": 0.02, "bf16": 0.1, "q8_0": 0.1, "q4_1": 0.5}[quantization]


TEXTS = [
    "Hello world", " leading  and   inner spaces ", "it's I'LL we've", "year 2024, 1234567 x9",
    "tabs\tand\nnew\r\n\nlines  \n", "na\u00efve cafe\u0301", "\u6771\u4eac \u306f\u9ad8\u3044",
    "\u041f\u0440\u0438, \u043c\u0438\u0440!",
    "emoji \U0001f999\U0001f3fd ok", "a/b\\c {x: [1, 2]}", "ALLCaps camelCase", "\u00bd \u00b2", "<s>not bos</s>",
]  # fmt: skip


def greedy_tokenizer(name: str, vocabulary: int) -> Tokenizer:
    """Merges that would join anything with anything, so that only the words' borders hold tokens apart."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model_words, merges = list(letters), []
    for left in ("Ġ", "1", "2", "a", "e", "l", "t", "Ċ", "č", "'", ".", "/", "Ã"):
        for right in ("Ġ", "1", "2", "a", "l", "o", "s", "Ċ", ",", "'", "l", "Ģ", "x"):
            if left + right not in model_words:
                model_words.append(left + right)
                merges.append((left, right))
    words = {word: i for i, word in enumerate(model_words)}
    ids = {**words, "<s>": len(words), "</s>": len(words) + 1}
    assert len(ids) <= vocabulary
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges, ignore_merges=PRE_TOKENIZERS[name][1]))
    tokenizer.pre_tokenizer, tokenizer.decoder = STEPS[name], decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def piece_tokenizer(vocabulary: int, *, space_prefix: bool) -> Tokenizer:
    """SentencePiece's way: whatever two pieces give a piece may be joined, those of the best place first."""
    letters = ["▁", *"aelortx12'.,", "é", "東"]
    longer = ["▁a", "el", "lo", "▁▁", "12", "ell", "▁al", "el▁", "▁▁▁▁", "llo", "ello", "1212", "▁x", "東é"]
    pieces = ["<unk>", "<s>", "</s>", *sorted(BYTE_TOKENS), *letters, *longer]
    ids = {piece: i for i, piece in enumerate(pieces)}
    assert len(ids) <= vocabulary
    merges = [
        (piece[:cut], piece[cut:])
        for piece in longer
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


TOKENIZERS: dict[str, Callable[[int], Tokenizer]] = {
    **{name: partial(greedy_tokenizer, name) for name in PRE_TOKENIZERS},
    "a space before": partial(piece_tokenizer, space_prefix=True),
    "no space before": partial(piece_tokenizer, space_prefix=False),
}


@pytest.mark.parametrize("starts", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_tokens_are_those_of_transformers(tiny: TinyModels, tmp_path: Path, name: str, starts: bool) -> None:
    checkpoint = shutil.copytree(tiny.converted(CASES[0]), tmp_path / "model")
    vocabulary = 512
    widen_vocabulary(checkpoint, vocabulary)
    tokenizer = TOKENIZERS[name](vocabulary)
    if starts:
        bos = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
        )
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(checkpoint)
    assert export_gguf(checkpoint, tmp_path / "f.gguf").pre_tokenizer == (name if name in PRE_TOKENIZERS else "default")
    made = ask_llama(tmp_path / "f.gguf", texts=TEXTS).tokens
    assert made == [wrapped(text)["input_ids"] for text in TEXTS]


def widen_vocabulary(checkpoint: Path, vocabulary: int) -> None:
    """Room for more tokens in the embedding and the head."""
    from safetensors.torch import load_file, save_file

    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    (checkpoint / "config.json").write_text(json.dumps(config))
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = torch.zeros(vocabulary, tensors[name].shape[1])
        save_file(tensors, shard, {"format": "pt"})


def test_the_chat_template_comes_along(tiny: TinyModels, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny.converted(CASES[0]), tmp_path / "model")
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (checkpoint / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "hi"}]
    expected = transformers.AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    export_gguf(checkpoint, tmp_path / "f.gguf")
    assert ask_llama(tmp_path / "f.gguf", conversations=[messages]).prompts == [expected]
