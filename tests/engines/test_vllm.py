"""Converted checkpoints in vLLM itself against transformers on the same checkpoint: the CPU build."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from care.conversion import convert
from care.modeling.loading import Location, load_model
from care.plan import plan_conversion
from care.recipe import load_recipe
from care.source import open_source
from care.statistics import CalibrationRequest, calibrate
from tiny import NUM_WINDOWS, VOCABULARY, WINDOW, Case, TinyModels, build_checkpoint, random_tokens
from tolerances import assert_close
from vllm_process import ask_vllm, load_error, post, served

CASES = [
    Case("llama-gqa", "best", 0.5, "absorbed", "native"),
    Case("llama-gqa", "best", 1.0, "absorbed", "native"),
    Case("llama-gqa", "care-u", 0.5, "absorbed", "native"),
    Case("llama3-rope", "best", 0.5, "absorbed", "native"),
    Case("llama-bias", "best", 0.5, "absorbed", "native"),
    Case("mistral-window", "best", 0.5, "absorbed", "native"),
    Case("qwen2-bias", "best", 0.5, "absorbed", "native"),
    Case("qwen2-window", "best", 0.5, "absorbed", "native"),
    Case("qwen3-norm", "best", 0.5, "absorbed", "native"),
    Case("qwen3-norm-bias", "best", 0.25, "absorbed", "native"),
    Case("smollm3-nope", "best", 0.5, "absorbed", "native"),
]
"""Joint and separate latents, parity, biases, norms on keys, windows in all and in some layers, layers without RoPE."""

EVERY = pytest.mark.parametrize("case", CASES, ids=str)
PROMPTS = [random_tokens(n, seed=n)[0].tolist() for n in (3, 17, 150)]
NEW_TOKENS = 24
CHUNK = 64
"""Tokens of a step: the longest prompt comes in chunks, the last of them beside others' decode."""
CACHE_BYTES = 2**24
FP32_BYTES = 4
STOCK = "deepseek at 512 + 64"


def request(model: Path, **options: Any) -> dict[str, Any]:
    """Greedy tokens, with the log-probabilities of the whole vocabulary everywhere."""
    return {
        "model": str(model), "max_model_len": 256, "cache_bytes": CACHE_BYTES,
        "options": {"max_num_batched_tokens": CHUNK, "max_num_seqs": 4, **options},
        "jobs": [
            {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "logprobs": VOCABULARY},
            {"prompts": PROMPTS, "new_tokens": NEW_TOKENS},
        ],
    }  # fmt: skip


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A conversion to the one shape for which stock vLLM has a kernel on the CPU."""
    root = tmp_path_factory.mktemp("stock")
    wide = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    settings = {**wide, "model_type": "llama", "rms_norm_eps": 1e-5, "initializer_range": 0.1}
    source = open_source(str(build_checkpoint(root / "source", settings)))
    statistics = calibrate(
        source, CalibrationRequest(str(text_file), NUM_WINDOWS, WINDOW, context=WINDOW), frozenset({"inputs"})
    )
    convert(plan_conversion(source, load_recipe("transmla"), 0.5625, statistics), root / "out")
    return root / "out"


@pytest.fixture(scope="session")
def answers(tiny: TinyModels, stock: Path) -> dict[str, Any]:
    """What vLLM makes of all cases, in one process."""
    # Compiled, as vLLM is by default: its rotation on the CPU is wrong in stock models otherwise.
    requests = [request(stock)] + [request(tiny.converted(case), enforce_eager=case != CASES[0]) for case in CASES]
    return dict(zip([STOCK, *map(str, CASES)], ask_vllm(requests), strict=True))


def assert_same_distributions(model: Any, completions: list[dict[str, Any]]) -> None:
    """Every token of the vocabulary, at every position of prompts and answers."""
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + completion["ids"]]), use_cache=False).logits[0]
        rows = completion["prompt_logprobs"][1:] + completion["logprobs"]
        made = torch.tensor([[row[str(token)] for token in range(VOCABULARY)] for row in rows])
        assert_close(made, logits.log_softmax(-1)[: len(rows)], "vLLM log-probabilities")


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """transformers' own tokens."""
    ids: Tensor = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
        pad_token_id=258, eos_token_id=None,
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()


@EVERY
def test_tokens_and_log_probabilities_are_those_of_transformers(
    tiny: TinyModels, answers: dict[str, Any], case: Case
) -> None:
    """Chunks of prefill, decode, and batches of both; and again, with the first page of the longest prompt cached."""
    model, (first, again) = tiny.model(case), answers[str(case)]["jobs"]
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    assert [completion["ids"] for completion in first["completions"]] == expected
    assert [completion["ids"] for completion in again["completions"]] == expected
    assert_same_distributions(model, first["completions"])


@EVERY
def test_every_layer_caches_its_own_width(tiny: TinyModels, answers: dict[str, Any], case: Case) -> None:
    """All storage that vLLM allocates: nothing is padded to the widest layer."""
    widths = [ranks.width for ranks in tiny.plan(case).ranks]
    cache = answers[str(case)]["cache"]
    assert cache["widths"] == widths
    assert cache["bytes_per_token"] == sum(widths) * FP32_BYTES


def test_the_cases_have_unequal_layers(tiny: TinyModels) -> None:
    """Of which the test above would otherwise say little."""
    unequal = [case for case in CASES if len({ranks.width for ranks in tiny.plan(case).ranks}) > 1]
    assert len(unequal) >= len(CASES) // 2


def test_the_stock_format_is_read_by_vllm_itself(stock: Path, answers: dict[str, Any]) -> None:
    model, answer = load_model(Location(stock), dtype=torch.float32), answers[STOCK]
    completions = answer["jobs"][0]["completions"]
    assert [completion["ids"] for completion in completions] == [greedy(model, prompt) for prompt in PROMPTS]
    assert_same_distributions(model, completions)
    assert answer["cache"]["widths"] == [512 + 64] * 3


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case("llama-gqa", "best-rebuild", 0.5, "rebuild", "native"), "convert with --mode absorbed"),
        (Case("olmo2-norm", "best", 0.5, "absorbed", "native"), "care's plugin has Llama's body, not that of olmo2"),
    ],
    ids=str,
)
def test_what_the_plugin_does_not_compute_is_refused(tiny: TinyModels, case: Case, words: str) -> None:
    assert words in load_error(tiny.converted(case))


def test_care_serve_answers_a_chat(tiny: TinyModels, tmp_path: Path) -> None:
    """The OpenAI API with the chat template that came along, token for token transformers' answer."""
    case = CASES[0]
    model = shutil.copytree(tiny.converted(case), tmp_path / "model")
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "hi there"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    expected = greedy(tiny.model(case), prompt)
    with served(model, tmp_path / "log") as address:
        asked = {"messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
                 "return_token_ids": True}  # fmt: skip
        answer = post(address, "/v1/chat/completions", {"model": str(model), **asked})
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == expected
    assert f"serving {model.name} with vllm" in (tmp_path / "log").read_text()
