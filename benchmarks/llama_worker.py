"""Run one GGUF file in llama.cpp: a request as JSON on stdin, the answer as JSON on stdout, llama.cpp's log on stderr.

For the Python of an environment with xllamacpp (`make engines-llama` makes one), which needs nothing of care.
Request: model, context, cache (f32, f16, q8_0), threads, jobs; a job has prompt (token ids), predict, probs.
"""

import json
import sys
from importlib.metadata import version
from typing import Any

import xllamacpp  # pyright: ignore[reportMissingImports]

CACHES = {"f32": "GGML_TYPE_F32", "f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0"}
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
    params.warmup = params.fit_params = False
    return xllamacpp.Server(params)


def run(server: Any, job: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Greedy tokens, the log-probabilities of the likeliest tokens at each, and llama.cpp's own timings."""
    answer = server.handle_completions({
        "prompt": job["prompt"], "n_predict": job["predict"], "temperature": 0.0, "n_probs": job["probs"],
        "cache_prompt": True, "ignore_eos": True,
    })  # fmt: skip
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp refused the request: {answer}")
    logprobs = answer["choices"][0].get("logprobs") or {"content": []}
    return {
        "ids": [token["id"] for token in logprobs["content"]],
        "top": [{top["id"]: top["logprob"] for top in token["top_logprobs"]} for token in logprobs["content"]],
        "timings": answer["timings"],
    }


def main() -> None:
    """One request."""
    request = json.load(sys.stdin)
    server = serve(request)
    print(json.dumps({"version": version("xllamacpp"), "jobs": [run(server, job) for job in request["jobs"]]}))


if __name__ == "__main__":
    main()
