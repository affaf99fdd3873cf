"""A source model, opened: its facts, its tensors, and the loaded model when something must be run."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .architectures import architecture_for
from .architectures.base import Architecture
from .calibration import DecoderLayers, Observed, Tap, WholeModel
from .carried import Carried
from .checkpoint import SafetensorsReader, StateReader, TensorReader
from .errors import BadInput, UnsupportedModel
from .licenses import stated_license
from .modeling import loading
from .modeling.loading import Location, check_device, expected_shapes, load_config, load_model, load_tokenizer, locate
from .modeling.streaming import StreamedWeights
from .types import AttentionSpec, AttentionWeights

SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
              "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
              "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE")  # fmt: skip
"""Files of a source directory that belong to the converted model too."""


@dataclass(frozen=True)
class Source:
    """A model to convert. Weights are read when asked for; the whole model is loaded only where `model` is used."""

    name: str
    location: Location
    config: dict[str, Any]
    architecture: Architecture
    spec: AttentionSpec
    device: str = "cpu"

    @cached_property
    def model(self) -> Any:  # noqa: ANN401 - a transformers model
        """The running model, fp32."""
        return load_model(self.location, dtype=torch.float32, device=self.device)

    @cached_property
    def layers(self) -> DecoderLayers:
        """The model's layers, to be run one at a time; only a GGUF file's are all in memory, fp32."""
        if self.location.gguf_file is not None:
            return DecoderLayers(self.model, self.layer_paths, WholeModel(), self.device)
        weights = StreamedWeights(self.location, self.reader, self.layer_paths, self.device)
        return DecoderLayers(weights.model, self.layer_paths, weights, self.device)

    @property
    def observed(self) -> Observed:
        """The model as calibration sees it."""
        return Observed(self.layers, self.attention_paths, self.key_value_taps, self.carried, self.attention)

    @cached_property
    def tokenizer(self) -> Any:  # noqa: ANN401 - a transformers tokenizer
        """The model's tokenizer."""
        return load_tokenizer(self.location)

    @cached_property
    def reader(self) -> TensorReader:
        """The checkpoint's tensors; those of a GGUF file are de-quantized by loading the model."""
        if self.location.gguf_file is None:
            reader: TensorReader = SafetensorsReader(self.location.directory)
            self.architecture.check_tensors(reader, self.spec, self.expected_shapes)
        else:
            reader = StateReader(self.model.state_dict())
        return reader

    @property
    def layer_paths(self) -> list[str]:
        """Module paths of the decoder layers."""
        return [self.architecture.layer.format(i=i) for i in range(self.spec.num_layers)]

    @property
    def attention_paths(self) -> list[str]:
        """Module paths of the attention layers."""
        return [self.architecture.attention.format(i=i) for i in range(self.spec.num_layers)]

    @property
    def key_value_taps(self) -> list[tuple[Tap, Tap]]:
        """Where each layer's keys, after any norm and before RoPE, and its values are found in the running model."""
        facts, width, queries = self.architecture, self.spec.kv_width, self.spec.num_heads * self.spec.head_dim
        keys, values = Tap(facts.k), Tap(facts.v)
        if facts.qkv:
            keys, values = (Tap(facts.qkv, first, width) for first in (queries, queries + width))
        if facts.norms:
            keys = Tap(facts.norms.k, heads_first=facts.norms.heads_first)
        return [
            (replace(keys, path=f"{path}.{keys.path}"), replace(values, path=f"{path}.{values.path}"))
            for path in self.attention_paths
        ]

    def carried(self, index: int) -> Carried:
        """What a layer computes beside its linear maps."""
        return self.architecture.read_carried(self.reader, index, self.spec)

    @cached_property
    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that the config promises."""
        return expected_shapes(self.location)

    @property
    def stated_dtype(self) -> torch.dtype:
        """What the config says that weights are stored in; fp32 where it says nothing, as transformers does."""
        stated = self.config.get("dtype") or self.config.get("torch_dtype")
        return getattr(torch, str(stated).removeprefix("torch."), torch.float32)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the attention weights are stored in."""
        name = next(iter(self.architecture.attention_shapes(0, self.spec)))
        dtype = self.reader.read(name).dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise BadInput(f"tensor {name} is {dtype}; convert quantized weights to bfloat16 first")
        return dtype

    def attention(self, index: int) -> AttentionWeights:
        """One layer's attention weights."""
        return self.architecture.read_attention(self.reader, index, self.spec)

    def tokens(self, text: str) -> torch.Tensor:
        """A text as one sequence of token ids, without special tokens: (T,)."""
        return loading.tokenize(self.tokenizer, text)

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, vocabulary) of the loaded model, whatever attention it has at the moment."""
        return loading.logits(self.model, tokens_BT)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the attention facts and the first layer's keys: tells one source from another."""
        table = self.spec.shared_frequencies or self.spec.rope_frequencies
        weights = self.attention(0)
        keys = weights.carried.keys.proj_ED if weights.carried.keys else weights.k_GKX
        digest = hashlib.sha256(json.dumps([self.spec.num_layers, table]).encode())
        digest.update(keys.float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Tells a source from itself after any of its files was written again; its tensors are not read for it."""
        directory, gguf_file = self.location.directory, self.location.gguf_file
        files = [directory / gguf_file] if gguf_file else sorted(directory.glob("*.safetensors"))
        stated = {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
        return {"fingerprint": self.fingerprint, "files": stated, "config": self.config}

    @property
    def hub_id(self) -> str | None:
        """The name on a hub; None for a source that lies on this machine."""
        return None if Path(self.name).exists() else self.name

    @cached_property
    def license(self) -> dict[str, str] | None:
        """What the model's own card, config or header states as its license; None where they state none."""
        return stated_license(self.location.directory, self.location.gguf_file)

    def copy_side_files(self, directory: Path) -> None:
        """Tokenizer, generation settings and license, next to converted weights."""
        if self.location.gguf_file is not None:
            self.tokenizer.save_pretrained(directory)
            self.model.generation_config.save_pretrained(directory)
            return
        for name in SIDE_FILES:
            file = self.location.directory / name
            if file.is_file():
                (directory / name).write_bytes(file.read_bytes())


def open_source(name: str, device: str = "cpu") -> Source:
    """Open a directory, a hub id or a GGUF file as a source; every misfit is reported now."""
    location = locate(name)
    config = load_config(location)
    if location.gguf_file is None and config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown method")
        raise UnsupportedModel(f"{name} is quantized ({method}); convert the 16-bit checkpoint that it was made from")
    architecture = architecture_for(config)
    return Source(name, location, config, architecture, architecture.spec(config), check_device(device))
