"""llama.cpp in a process of its own, where `make engines-llama` has put it."""

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("CARE_LLAMA_PYTHON", ROOT / ".venv-llama" / "bin" / "python"))
SECONDS = 300


@dataclass(frozen=True)
class Answer:
    """What llama.cpp computed, and the size of its KV buffer as it says itself."""

    completions: list[dict[str, Any]]
    tokens: list[list[int]]
    prompts: list[str]
    kv_mib: float


def ask_llama(model: Path, *, context: int = 256, cache: str = "f16", flash: bool = False, **request: Any) -> Answer:
    """Load a file, answer `completions`, `texts` and `conversations` (benchmarks/llama_worker.py), and stop."""
    if not PYTHON.exists():
        pytest.skip(f"llama.cpp is not installed in {PYTHON.parents[1].name}; make engines-llama")
    content = {"model": str(model), "context": context, "cache": cache, "flash": flash, "threads": 1, **request}
    done = subprocess.run(
        [str(PYTHON), str(ROOT / "benchmarks" / "llama_worker.py")], input=json.dumps(content), capture_output=True,
        text=True, errors="replace", check=False, timeout=SECONDS, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    said = re.search(r"KV buffer size = *([\d.]+) MiB", done.stderr)
    assert said, done.stderr
    return Answer(answer["completions"], answer["tokens"], answer["prompts"], float(said[1]))
