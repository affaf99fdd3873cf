"""vLLM in a process of its own, where `make engines-vllm` has put it."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("CARE_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
SECONDS = 1500
"""It starts in half a minute on an idle machine, and far more slowly on a busy one."""
POLL_SECONDS = 1.0


def environment(**more: str) -> dict[str, str]:
    """Few threads, bound to no core, no hub, and the package of this checkout; refuses to go on without vLLM."""
    if not PYTHON.exists():
        pytest.skip(f"vLLM is not installed in {PYTHON.parents[1].name}; make engines-vllm")
    own = {
        "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(ROOT / "src"),
    }  # fmt: skip
    return {**os.environ, **own, **more}


def ask_vllm(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All requests in one process, as most of its time is imports (benchmarks/vllm_worker.py)."""
    done = subprocess.run(
        [str(PYTHON), str(ROOT / "benchmarks" / "vllm_worker.py")], input=json.dumps(requests), capture_output=True,
        text=True, errors="replace", check=False, timeout=SECONDS, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)["runs"]


def load_error(model: Path) -> str:
    """What vLLM says on its way to refusing a checkpoint."""
    code = (
        "import sys; from vllm.engine.arg_utils import EngineArgs; EngineArgs(model=sys.argv[1]).create_engine_config()"
    )
    done = subprocess.run(
        [str(PYTHON), "-c", code, str(model)], capture_output=True, text=True, errors="replace", check=False,
        timeout=SECONDS, env=environment(),
    )  # fmt: skip
    assert done.returncode != 0
    return done.stderr


@contextmanager
def served(model: Path, log: Path) -> Generator[str]:
    """`care serve` on a free port: the address, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(PYTHON), "-m", "care", "serve", str(model), "--engine", "vllm", "--port", str(port)]
    limits = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(**limits))
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, log)
        yield address
    finally:
        process.terminate()
        process.wait(SECONDS)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < SECONDS:
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=POLL_SECONDS):
                return
        except OSError:
            time.sleep(POLL_SECONDS)
    pytest.fail(f"no answer in {SECONDS} s: {log.read_text(errors='replace')[-4000:]}")


def post(address: str, path: str, content: dict[str, Any]) -> dict[str, Any]:
    """A request to the server, and its answer."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)
