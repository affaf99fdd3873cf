"""Calibration results on disk: one safetensors file a layer, the tokens, and a JSON that explains them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint import read_json
from ..errors import BadInput
from ..output import save_json, save_tensors
from ..types import LayerStats

EXPLANATION = "calibration.json"
TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class CalibrationInfo:
    """Where statistics come from: enough to repeat the run and to refuse the wrong source."""

    source: str
    fingerprint: str
    text: str
    num_windows: int
    window: int
    seed: int
    num_layers: int
    seconds: float
    context: int = 0
    """Window length on which attention distances were taken; 0 where they were not."""
    gradient_windows: int = 0
    """How many of the windows gradients were taken on."""
    also: tuple[str, ...] = ()
    """Further texts, of which as many windows were taken as of the first."""


@dataclass(frozen=True)
class Calibration:
    """Statistics of every layer, and the token windows (B, T) that they were taken on."""

    info: CalibrationInfo
    layers: Sequence[LayerStats]
    windows_BT: Tensor

    @property
    def provides(self) -> frozenset[str]:
        """The statistics that methods can ask for."""
        first = self.layers[0]
        optional = {"gradients": first.gradient_moment_EE, "distances": first.attention_HT}
        return frozenset({"inputs"} | {name for name, tensor in optional.items() if tensor is not None})


class _StoredLayers(Sequence[LayerStats]):
    """Layers read from disk one at a time."""

    def __init__(self, directory: Path, num_layers: int) -> None:
        self._directory = directory
        self._num_layers = num_layers

    def __len__(self) -> int:
        return self._num_layers

    @overload
    def __getitem__(self, index: int) -> LayerStats: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerStats]: ...
    def __getitem__(self, index: int | slice) -> LayerStats | list[LayerStats]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < self._num_layers:
            raise IndexError(index)
        return read_layer(self._directory / layer_name(index))


def layer_name(index: int) -> str:
    """The file of a layer's statistics."""
    return f"layer-{index:05d}.safetensors"


def read_layer(path: Path) -> LayerStats:
    """One layer's statistics."""
    tensors = _load(path)
    return LayerStats(
        int(tensors["num_tokens"]), tensors["input_moment"], tensors["input_magnitude"],
        tensors.get("gradient_moment"), tensors.get("attention"),
    )  # fmt: skip


def write_layer(path: Path, stats: LayerStats) -> None:
    """One layer's statistics; the file is complete or not there."""
    tensors = {
        "num_tokens": torch.tensor(stats.num_tokens),
        "input_moment": stats.input_moment_XX,
        "input_magnitude": stats.input_magnitude_X,
        "gradient_moment": stats.gradient_moment_EE,
        "attention": stats.attention_HT,
    }
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, {})


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is missing or damaged ({error}); calibrate again") from error


def is_calibration(path: Path) -> bool:
    """Whether a path is a directory of saved statistics."""
    return (path / EXPLANATION).is_file()


def finish_calibration(directory: Path, info: CalibrationInfo, windows_BT: Tensor) -> None:
    """Tokens and explanation, beside the layers that are there: what makes the directory statistics."""
    save_tensors(directory / TOKENS, {"windows": windows_BT}, {})
    save_json(directory / EXPLANATION, asdict(info))


def parse_info(content: Mapping[str, Any]) -> CalibrationInfo:
    """The explanation from JSON, of earlier versions too; TypeError if it is of another kind."""
    facts: dict[str, Any] = {**content, "also": tuple(content.get("also", ()))}
    return CalibrationInfo(**facts)


def load_calibration(directory: Path) -> Calibration:
    """Statistics from disk; layers are read when asked for."""
    content = read_json(directory / EXPLANATION)
    try:
        info = parse_info(content)
    except TypeError as error:
        raise BadInput(f"{directory / EXPLANATION} is not of this version of care; calibrate again") from error
    return Calibration(info, _StoredLayers(directory, info.num_layers), _load(directory / TOKENS)["windows"])
