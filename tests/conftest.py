"""What every test shares: a seed, few threads, no network, warnings as errors, and the tiny models."""

import os

# Before transformers is imported by anything.
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false"
)  # fmt: skip

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tiny import TinyModels

NUM_THREADS = 1  # the models are so small that threads only wait for one another

settings.register_profile("care", deadline=None, max_examples=20, derandomize=True, database=None)
settings.load_profile("care")


def pytest_configure(config: pytest.Config) -> None:
    """Turn every warning into a failure."""
    config.addinivalue_line("filterwarnings", "error")
    torch.set_num_threads(NUM_THREADS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Any:
    """Refuse every outgoing connection except to this machine's own sockets."""
    real = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or address[0] == "127.0.0.1":
            return real(self, address)
        raise AssertionError(f"a test tried to connect to {address}")

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", refuse)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """All tiny checkpoints, made when first asked for."""
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text_file(tiny: TinyModels) -> Path:
    """A text long enough for every calibration in the tests."""
    return tiny.text_file
