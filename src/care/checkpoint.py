"""Reading tensors lazily from a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import BadInput

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONVERSION_NAME = "conversion.json"
"""Provenance file of a converted checkpoint, beside its config.json."""


FINITE_CHUNK = 2**22
"""Values that are looked at together: an answer for each of a large tensor's would be as much memory again."""


class TensorReader(Protocol):
    """Named tensors of a checkpoint, read one at a time."""

    def names(self) -> tuple[str, ...]:
        """Every tensor name, in the checkpoint's order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor in the dtype it is stored in; BadInput if it holds NaN or Inf."""
        ...

    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        ...


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself, or BadInput that names it when a value is NaN or Inf."""
    parts = tensor.flatten().split(FINITE_CHUNK) if tensor.is_floating_point() else ()
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise BadInput(f"tensor {name} holds NaN or Inf; the source checkpoint is damaged, fetch it again")
    return tensor


class StateReader:
    """Tensors of a model that is already in memory."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def names(self) -> tuple[str, ...]:
        """Every tensor name."""
        return tuple(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._state[name].shape)

    def read(self, name: str) -> Tensor:
        """The tensor itself, not a copy."""
        return check_finite(name, self._state[name].detach())

    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.numel() * t.element_size() for t in self._state.values())


class SafetensorsReader:
    """Tensors of a directory of safetensors shards; only headers are read until a tensor is asked for."""

    def __init__(self, directory: Path) -> None:
        self._shard_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shards = _shards(directory)
        for shard in self._shards:
            self._read_header(shard)
        _check_index(directory, self._shard_of)

    def _read_header(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not iterable
                    self._shard_of[name] = shard
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{shard} is truncated or not a safetensors file ({error}); fetch it again") from error

    def names(self) -> tuple[str, ...]:
        """Every tensor name, shard by shard."""
        return tuple(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the shard's header."""
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """One tensor in the dtype it is stored in."""
        with safe_open(self._shard_of[name], framework="pt") as file:
            return check_finite(name, file.get_tensor(name))

    def num_bytes(self) -> int:
        """Bytes of all shards together."""
        return sum(shard.stat().st_size for shard in self._shards)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; BadInput names the file when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a JSON object")
    return content


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name to shard, from the index; empty where there is none."""
    index = directory / INDEX_NAME
    if not index.exists():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index} has no weight_map; fetch the index again")
    return {str(name): str(shard) for name, shard in cast("dict[object, object]", weight_map).items()}


def _shards(directory: Path) -> list[Path]:
    weight_map = _weight_map(directory)
    if weight_map:
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise BadInput(f"{directory} lacks {missing[0]}, which {INDEX_NAME} names; fetch the missing shard")
        return [directory / name for name in names]
    single = directory / SINGLE_NAME
    if single.is_file():
        return [single]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise BadInput(f"{directory} holds only pickled weights, which can run code; save it as safetensors first")
    raise BadInput(f"{directory} holds no safetensors weights ({SINGLE_NAME} or {INDEX_NAME})")


def _check_index(directory: Path, shard_of: Mapping[str, Path]) -> None:
    for name, shard in _weight_map(directory).items():
        if name not in shard_of:
            raise BadInput(f"tensor {name} is in {INDEX_NAME} but not in {shard}; fetch that shard again")


def read_header(shard: Path) -> dict[str, tuple[int, int]]:
    """Every tensor of a safetensors file, with its first byte and the one behind its last, from its header alone."""
    with shard.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
