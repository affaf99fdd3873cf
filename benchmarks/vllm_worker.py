"""Run checkpoints in vLLM: requests as JSON on stdin, answers as JSON on the descriptor that was stdout.

For the Python of an environment with vLLM and care (`make engines-vllm` makes one). A request has: model, dtype,
max_model_len, cache_bytes, any other `options` of vLLM's LLM class, and jobs. A job has prompts as token ids;
new_tokens; and logprobs, how many of the likeliest tokens to report at each position of prompt and answer, 0 for none.
Answered are the cache as it was really allocated, and by job the CPU seconds it took and per prompt ids and logprobs.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

# One process: every start of one costs its imports again, and the cache's tensors can be looked at.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]


def cache_use(llm: Any) -> dict[str, Any]:  # noqa: ANN401 - vLLM's
    """Widths of the pages by layer in values, and bytes per token of all storage that was allocated for them."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    caches = worker.model_runner.kv_caches
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in caches}
    tokens = caches[0].shape[0] * caches[0].shape[2]
    return {
        "widths": [cache.shape[1] * cache.shape[3] for cache in caches],
        "bytes_per_token": sum(storages.values()) / tokens,
        "tokens": tokens,
    }


def run(request: dict[str, Any]) -> dict[str, Any]:
    """One checkpoint: load, look at the cache, do the jobs, and stop."""
    llm = LLM(
        model=request["model"], dtype=request.get("dtype", "float32"), max_model_len=request["max_model_len"],
        kv_cache_memory_bytes=request["cache_bytes"], max_logprobs=-1, **request.get("options", {}),
    )  # fmt: skip
    answer = {"cache": cache_use(llm), "jobs": [_generate(llm, job) for job in request["jobs"]]}
    del llm
    cleanup_dist_env_and_memory()
    return answer


def _generate(llm: Any, job: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - vLLM's
    wanted = job.get("logprobs") or None
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=wanted, prompt_logprobs=wanted,
        detokenize=False,
    )  # fmt: skip
    begin = time.process_time()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    seconds = time.process_time() - begin
    completions = [
        {
            "ids": list(output.outputs[0].token_ids),
            "logprobs": _plain(output.outputs[0].logprobs),
            "prompt_logprobs": _plain(output.prompt_logprobs),
        }
        for output in outputs
    ]
    return {"cpu_seconds": seconds, "completions": completions}


def _plain(positions: Any) -> list[dict[int, float] | None] | None:  # noqa: ANN401 - vLLM's
    if positions is None:
        return None
    return [p and {token: float(entry.logprob) for token, entry in p.items()} for p in positions]


if __name__ == "__main__":
    # What vLLM prints on stdout is its log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    requests = json.load(sys.stdin)
    json.dump({"version": version("vllm-cpu"), "runs": [run(request) for request in requests]}, answers)
    answers.close()
