"""Run one GGUF file in llama.cpp: a request as JSON on stdin, the answer as JSON on stdout, llama.cpp's log on stderr.

For the Python of an environment with xllamacpp (`make engines-llama` makes one), which needs nothing of care.
Request: model, context, cache (f32, f16, q8_0), flash, threads, and one list each of completions (prompt as token ids,
predict, probs), texts to tokenize, and conversations to put through the chat template.
"""

import json
import os
import sys
import urllib.request
from importlib.metadata import version
from typing import Any

import xllamacpp  # pyright: ignore[reportMissingImports]

CACHES = {"f32": "GGML_TYPE_F32", "f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0"}
SECONDS = 600
LOG_MEMORY = 5
"""Least verbosity at which llama.cpp says how large its buffers are."""


def serve(request: dict[str, Any]) -> Any:  # noqa: ANN401 - an untyped library
    """A server with one slot on a loopback port."""
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx, params.n_parallel, params.verbosity = request["context"], 1, LOG_MEMORY
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, CACHES[request["cache"]])
    flash = "AUTO" if request["flash"] else "DISABLED"
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    params.warmup = params.fit_params = False
    return xllamacpp.Server(params)


def post(server: Any, path: str, content: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """What the Python binding has no method for goes over HTTP."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


def complete(server: Any, job: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Greedy tokens, the log-probabilities of the likeliest tokens at each, and llama.cpp's own timings."""
    answer = post(server, "/completion", {
        "prompt": job["prompt"], "n_predict": job["predict"], "temperature": 0.0, "n_probs": job["probs"],
        "cache_prompt": True, "ignore_eos": True, "return_tokens": True,
    })  # fmt: skip
    return {
        "ids": answer["tokens"],
        "top": [
            {top["id"]: top["logprob"] for top in token["top_logprobs"]}
            for token in answer.get("completion_probabilities", ())
        ],
        "timings": answer["timings"],
    }


def main() -> None:
    """One request."""
    request = json.load(sys.stdin)
    server = serve(request)
    answer = {
        "version": version("xllamacpp"),
        "completions": [complete(server, job) for job in request.get("completions", ())],
        "tokens": [
            post(server, "/tokenize", {"content": text, "add_special": True})["tokens"]
            for text in request.get("texts", ())
        ],
        "prompts": [
            post(server, "/apply-template", {"messages": messages})["prompt"]
            for messages in request.get("conversations", ())
        ],
    }
    print(json.dumps(answer), flush=True)
    # The server's own shutdown waits forever now and then.
    os._exit(0)


if __name__ == "__main__":
    main()
