"""What conversions cost beside the bare forward passes over the same tokens, and beside each other.

Usage: python benchmarks/cost.py SRC TEXT RESULT.json [ROUNDS]

Each row runs in a process of its own and reports wall time without loading, and peak memory of the process.
The rows alternate ROUNDS times (3), so that a noisy machine disturbs both; medians are compared.
"""

import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from care import CalibrationRequest, __version__, calibrate, convert, load_recipe, open_source, plan_conversion
from care.calibration import load_text, sampled_windows
from care.calibration.streams import BATCH_TOKENS
from care.source import Source

DEFAULT_ROUNDS = 3
REQUEST: dict[str, Any] = {"num_windows": 128, "window": 256, "seed": 42}
KV_BUDGET = 0.5
BASELINE, OURS = "care-u", "best"


def forward_passes(source: Source, text: str) -> dict[str, float]:
    """The model's body, then the whole model with logits, over the calibration tokens."""
    windows_BT = sampled_windows(
        source.tokens(load_text(text)), REQUEST["window"], REQUEST["num_windows"], REQUEST["seed"]
    )
    batches = windows_BT.split(BATCH_TOKENS // REQUEST["window"])
    seconds = {}
    with torch.inference_mode():
        for name, run in (("body", source.model.base_model), ("with_logits", source.model)):
            start = time.perf_counter()
            for batch in batches:
                run(input_ids=batch, use_cache=False)
            seconds[name] = time.perf_counter() - start
    return seconds


def conversion(recipe_name: str, source: Source, text: str) -> dict[str, float]:
    """Calibrate, plan, factorize and write."""
    recipe, start = load_recipe(recipe_name), time.perf_counter()
    stats = calibrate(source, CalibrationRequest(text, **REQUEST), recipe.needs)
    calibrated = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        convert(plan_conversion(source, recipe, KV_BUDGET, stats), Path(directory) / "model")
    end = time.perf_counter()
    return {"calibrate": calibrated - start, "factorize_and_write": end - calibrated, "total": end - start}


ROWS = {"forward": forward_passes, BASELINE: partial(conversion, BASELINE), OURS: partial(conversion, OURS)}


def run_row(row: str, source_name: str, text: str) -> None:
    """One row in this process; the result goes to stdout as JSON."""
    source = open_source(source_name)
    _ = source.reader, source.tokenizer
    if row == "forward":
        _ = source.model
    seconds = ROWS[row](source, text)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = 4 * sum(math.prod(source.reader.shape(name)) for name in source.reader.names())
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "model_bytes": model}))


def spawn(row: str, source_name: str, text: str) -> dict[str, Any]:
    """One row in a fresh process."""
    command = [sys.executable, __file__, "--row", row, source_name, text]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main(source_name: str, text: str, result: Path, rounds: int) -> None:
    """Alternate the rows and print both ratios."""
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for _ in range(rounds):
        for row in ROWS:
            runs[row].append(spawn(row, source_name, text))
    medians = {
        row: {name: statistics.median(r["seconds"][name] for r in done) for name in done[0]["seconds"]}
        for row, done in runs.items()
    }
    peaks = {row: max(r["peak_bytes"] for r in done) for row, done in runs.items()}
    model_bytes = runs[BASELINE][0]["model_bytes"]
    summary: dict[str, Any] = {
        "care": __version__,
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
        "kv_budget": KV_BUDGET,
        "calibration": REQUEST,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "median_seconds": medians,
        "time_ratio": {
            f"{BASELINE} to body": medians[BASELINE]["total"] / medians["forward"]["body"],
            f"{BASELINE} to forward": medians[BASELINE]["total"] / medians["forward"]["with_logits"],
            f"{OURS} to {BASELINE}": medians[OURS]["total"] / medians[BASELINE]["total"],
        },
        "model_bytes": model_bytes,
        "peak_bytes": peaks,
        "peak_over_model_bytes": {name: peaks[name] - model_bytes for name in (BASELINE, OURS)},
    }
    result.write_text(json.dumps(summary, indent=2) + "\n")
    for name, ratio in summary["time_ratio"].items():
        print(f"time of {name}: {ratio:.2f}")
    for name, peak in summary["peak_over_model_bytes"].items():
        print(f"peak memory of {name}: the model plus {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    if sys.argv[1] == "--row":
        run_row(*sys.argv[2:5])
    else:
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else DEFAULT_ROUNDS)
