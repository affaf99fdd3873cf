"""A converted model in llama.cpp: distance to transformers by quantization, cache, and decode speed against its source.

Usage: python benchmarks/llama_cpp.py SRC.gguf CHECKPOINT TEXT RESULT.json
CHECKPOINT is SRC converted to format deepseek; llama.cpp is found as in tests/engines (make engines-llama).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from care.calibration import load_text
from care.export import export_gguf
from care.modeling.loading import load_model, load_tokenizer, locate, logits, tokenize

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("CARE_LLAMA_PYTHON", ROOT / ".venv-llama" / "bin" / "python"))
PROMPTS = ("The three primary colors are", "In 1969, the first humans landed on", "def fibonacci(n):\n    ")
NEW_TOKENS, POSITIONS = 32, 48
LIKELY = 1e-3
"""Least probability of a token that counts as likely."""
CONTEXT, DECODED, ROUNDS = 4096, 64, 2
RUNS = (("f32", "f32", False), ("f32", "f16", True), ("f16", "f16", True), ("bf16", "f16", True), ("q8_0", "f16", True))
"""Weights, cache, and whether llama.cpp may use its flash attention."""


@dataclass(frozen=True)
class Reference:
    """transformers on the same checkpoint in fp32: greedy tokens per prompt, log-probabilities along a text."""

    prompts: list[list[int]]
    greedy: list[list[int]]
    text: list[int]
    logprobs_TV: torch.Tensor


def ask(model: Path, **request: Any) -> tuple[dict[str, Any], str]:  # noqa: ANN401 - JSON
    """One process of llama.cpp: its answer and its log."""
    request = {"model": str(model), "threads": 1, "cache": "f16", "flash": True, "context": CONTEXT, **request}
    done = subprocess.run(
        [str(PYTHON), str(ROOT / "benchmarks" / "llama_worker.py")], input=json.dumps(request), capture_output=True,
        text=True, errors="replace", check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


def reference(checkpoint: str, text: str) -> Reference:
    """What llama.cpp is compared with."""
    location = locate(checkpoint)
    model, tokenizer = load_model(location, dtype=torch.float32), load_tokenizer(location)
    prompts = [tokenize(tokenizer, prompt) for prompt in PROMPTS]
    tokens = tokenize(tokenizer, load_text(text))[: POSITIONS + 1]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        made = [model.generate(p[None], attention_mask=torch.ones_like(p[None]), **options)[0] for p in prompts]
        logprobs_TV = logits(model, tokens[None, :-1])[0].double().log_softmax(-1)
    # llama.cpp goes on after an end token, and is compared up to there.
    ends = model.generation_config.eos_token_id
    greedy = [m[len(p) : -1 if int(m[-1]) == ends else None].tolist() for m, p in zip(made, prompts, strict=True)]
    return Reference([p.tolist() for p in prompts], greedy, tokens.tolist(), logprobs_TV)


def agreement(ours: list[int], theirs: list[int]) -> int:
    """Tokens up to the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))


def measure(file: Path, cache: str, expected: Reference, *, flash: bool) -> dict[str, Any]:
    """Greedy tokens, log-probabilities of the whole vocabulary after each prefix of the text, the KV buffer."""
    greedy = [{"prompt": p, "predict": NEW_TOKENS, "probs": 1} for p in expected.prompts]
    vocabulary = expected.logprobs_TV.shape[1]
    jobs = [{"prompt": expected.text[: t + 1], "predict": 1, "probs": vocabulary} for t in range(POSITIONS)]
    answer, log = ask(file, cache=cache, flash=flash, completions=greedy + jobs)
    made = [completion["ids"] for completion in answer["completions"][: len(greedy)]]
    differences: list[torch.Tensor] = []
    nll: list[float] = []
    kept: list[int] = []
    for t, completion in enumerate(answer["completions"][len(greedy) :]):
        if not completion["top"]:
            continue  # llama.cpp reports no probabilities where its token is part of a character
        kept.append(t)
        top = completion["top"][0]
        row_V = torch.tensor([top.get(str(i), float("nan")) for i in range(vocabulary)], dtype=torch.float64)
        differences.append((row_V - expected.logprobs_TV[t]).abs())
        nll.append(float(expected.logprobs_TV[t, expected.text[t + 1]] - row_V[expected.text[t + 1]]))
    differences_TV = torch.stack(differences)
    likely_TV = differences_TV[expected.logprobs_TV[kept].exp() > LIKELY]
    return {
        "greedy_tokens": [len(tokens) for tokens in expected.greedy],
        "greedy_tokens_alike": [agreement(m, g) for m, g in zip(made, expected.greedy, strict=True)],
        "positions": len(differences),
        "largest_logprob_difference": float(differences_TV.max()),
        "mean_logprob_difference": float(differences_TV.mean()),
        "mean_logprob_difference_of_likely_tokens": float(likely_TV.mean()),
        "nll_minus_transformers": sum(nll) / len(nll),
        "kv_mib_at_4096": kv_mib(log),
    }


def kv_mib(log: str) -> float:
    """The KV buffer that llama.cpp reports."""
    said = re.search(r"KV buffer size = *([\d.]+) MiB", log)
    assert said
    return float(said[1])


def speed(file: Path, text: list[int], *, flash: bool) -> dict[str, float]:
    """Tokens per second on one thread: prefill to nearly 4k, then decode there; the best of the rounds."""
    job = {"prompt": text[: CONTEXT - DECODED - 1], "predict": DECODED, "probs": 0}
    rounds = [ask(file, flash=flash, completions=[job]) for _ in range(ROUNDS)]
    timings = [answer["completions"][0]["timings"] for answer, _ in rounds]
    return {
        "prefill_tokens_per_second": max(t["prompt_per_second"] for t in timings),
        "decode_tokens_per_second": max(t["predicted_per_second"] for t in timings),
        "kv_mib_at_4096": kv_mib(rounds[0][1]),
        "file_mb": file.stat().st_size / 1e6,
    }


def main(source: Path, checkpoint: str, text: str, result: Path) -> None:
    """Export every type once, compare, then time source and conversion in turns."""
    expected = reference(checkpoint, text)
    long_text = tokenize(load_tokenizer(locate(checkpoint)), load_text(text)).tolist()
    summary: dict[str, Any] = {
        "source": source.name, "text": Path(text).name, "positions": POSITIONS, "new_tokens": NEW_TOKENS, "threads": 1,
        "versions": {name: version(name) for name in ("torch", "transformers", "gguf")},
        "runs": [], "speed": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.gguf" for name in ("f32", "f16", "bf16", "q8_0", "q4_1")}
        for name, file in files.items():
            export_gguf(Path(checkpoint), file, name)
        for weights, cache, flash in RUNS:
            row = measure(files[weights], cache, expected, flash=flash)
            summary["runs"].append({"weights": weights, "cache": cache, "flash_attention": flash, **row})
            print(json.dumps(summary["runs"][-1]), flush=True)
        for flash in (True, False):
            for name, file in (("source q4_1", source), ("converted q4_1", files["q4_1"])):
                summary["speed"].append(
                    {"model": name, "flash_attention": flash, **speed(file, long_text, flash=flash)}
                )
                print(json.dumps(summary["speed"][-1]), flush=True)
        summary["versions"]["xllamacpp"] = ask(files["q4_1"], context=256)[0]["version"]
    result.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
