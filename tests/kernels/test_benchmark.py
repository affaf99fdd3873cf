"""The GPU benchmark goes through all of its rows, on tiny sizes in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the benchmark needs Triton: make test-kernels")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "decode_gpu.py"


def test_smoke(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARK), "run", str(result), "--device", "cpu", "--smoke"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    found = json.loads(result.read_text())
    rows = found["rows"]
    # Values of a token in all three layers: keys and values of two heads, or latents; fp32, fp8 with two bf16 scales.
    widths = {
        "gqa": 3 * 2 * 2 * 96 * 4,
        "mla-uniform": 3 * 48 * 4,
        "mla-uniform-fp8": 3 * (48 + 4),
        "mla-half": 3 * 192 * 4,
    }
    assert {row["way"]: row["bytes_per_token"] for row in rows if row["way"] in widths} == widths
    sizes = {(row["context"], row["batch"]) for row in rows}
    assert len(rows) == 5 * len(sizes) == 20
    assert all(row["seconds"] for row in rows), [row["note"] for row in rows]
    assert found["largest_error"] < 1e-5
