"""Where a model lies, and loading it with transformers: a directory, a hub id or a GGUF file."""

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers.core_model_loading import revert_weight_conversion

from ..checkpoint import read_json
from ..errors import BadInput, first_line
from .native import register

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt", "README.md",
             "LICENSE*", "NOTICE*")  # fmt: skip
"""What is fetched from a hub: never pickles, never code."""

UNREADABLE = (ValueError, OSError, RuntimeError, LookupError, TypeError)
"""What transformers raises for files that are damaged, incomplete or not of its kind."""


@dataclass(frozen=True)
class Location:
    """A directory, and the GGUF file in it when that is the model."""

    directory: Path
    gguf_file: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of from_pretrained."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def locate(model: str) -> Location:
    """Find a model by path or hub id; a hub model is fetched into the hub's own cache."""
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadInput(f"{model} is neither a directory nor a .gguf file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadInput(f"{path.name} is not a GGUF file")
        return Location(path.parent, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{model} holds no config.json; is it a model?")
        return Location(path)
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(model):
        raise BadInput(f"no such path: {model}")
    try:
        return Location(Path(snapshot_download(model, allow_patterns=list(HUB_FILES))))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise BadInput(f"{model} is neither a local path nor a model that the hub gave ({reason})") from error


def load_config(location: Location) -> dict[str, Any]:
    """The model's config.json, or its equivalent from a GGUF header."""
    if location.gguf_file is None:
        return read_json(location.directory / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(location.directory, **location.arguments())
    except (*UNREADABLE, struct.error) as error:
        raise BadInput(f"cannot read {location.gguf_file}: {first_line(error)}") from error
    return config.to_dict()


def check_device(device: str) -> str:
    """The device's name, or BadInput when this machine does not have it."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"no device {device!r} here ({first_line(error)}); use --device cpu") from error
    return device


def load_model(location: Location, *, dtype: torch.dtype, device: str = "cpu") -> Any:  # noqa: ANN401
    """A causal language model in eval mode: a source, a deepseek output or a native one."""
    register()
    check_device(device)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            location.directory, dtype=dtype, trust_remote_code=False, output_loading_info=True,
            **_weights_argument(location),
        )  # fmt: skip
    except (*UNREADABLE, struct.error, SafetensorError) as error:
        raise BadInput(f"cannot load {location.directory}: {first_line(error)}") from error
    model, report = loaded
    if report["missing_keys"]:
        # transformers would go on with random weights in their place.
        raise BadInput(f"{location.directory} lacks tensor {min(report['missing_keys'])}; the checkpoint is damaged")
    if location.gguf_file is not None:
        # De-quantized already: a saved config must not say otherwise.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
    return model.to(device).eval()


def _weights_argument(location: Location) -> dict[str, Any]:
    """Never pickles: a directory must hold safetensors."""
    return location.arguments() or {"use_safetensors": True}


def expected_shapes(location: Location) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the config promises, without allocating any; tied ones left out."""
    try:
        return checkpoint_shapes(transformers.AutoConfig.from_pretrained(location.directory, **location.arguments()))
    except UNREADABLE as error:
        named = location.directory / (location.gguf_file or "config.json")
        raise BadInput(f"cannot make sense of {named}: {first_line(error)}") from error


def checkpoint_shapes(config: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401 - a transformers config
    """The same from a config, by their names in checkpoints: in memory, experts are fused into one tensor."""
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tuple(tensor.shape) for name, tensor in checkpoint_layout(model, state).items()}


def checkpoint_layout(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """A model's tensors by their names in checkpoints."""
    return revert_weight_conversion(model, state)


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:  # noqa: ANN401
    """A text as one sequence of token ids, without special tokens: (T,)."""
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def logits(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Logits (B, T, vocabulary) without a cache, on the model's device."""
    return model(input_ids=tokens_BT.to(model.device), use_cache=False).logits


def load_tokenizer(location: Location) -> Any:  # noqa: ANN401
    """The tokenizer that belongs to a model."""
    register()
    try:
        return transformers.AutoTokenizer.from_pretrained(location.directory, **location.arguments())
    except UNREADABLE as error:
        raise BadInput(f"no usable tokenizer in {location.directory}: {first_line(error)}") from error
