"""A checkpoint in format deepseek as one GGUF file of llama.cpp's architecture deepseek2.

llama.cpp decodes latent attention as multi-query attention over the cached latents, and wants the up-projection of
keys and values split and the key's half transposed, so that queries are absorbed by one product per head. Its rotary
pairs are interleaved, as the format's are, and it has one eps for all norms: nothing else is changed.

Matrices are stored as asked for, with three exceptions; vectors are always fp32:

* the down-projection of the latent is scaled so far down (formats/deepseek.py) that fp16, and the fp16 scales of the
  block types, would make it zero: it stays in bf16, or in fp32 beside fp16 weights;
* rows that are not whole blocks of 32 stay in fp16, as in llama.cpp's own converter;
* embedding and head stay in q8_0 beside smaller types.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from torch import Tensor

from ..checkpoint import SafetensorsReader, read_json
from ..engines import ENGINES
from ..errors import BadInput, InvalidRecipe
from ..output import check_space, writing
from ..progress import Track, silent
from ..rope import rope_settings
from .gguf_tokenizer import read_tokenizer

Array = npt.NDArray[Any]

ARCHITECTURE = "deepseek2"

QUANTIZATIONS: dict[str, tuple[Kind, LlamaFileType]] = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Kind.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Kind.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Kind.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
"""What the gguf package quantizes to in Python. The k-quants it can only read."""

OF_DTYPE = {"float32": "f32", "bfloat16": "bf16"}
"""The type that keeps a checkpoint's own bits."""

HALF_LOSS = 1e-2
"""Largest relative error of a tensor in fp16; rounding alone is 5e-4, more is underflow or overflow."""

MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
UP_PROJECTION = "self_attn.kv_b_proj"
SMALL = "attn_kv_a_mqa"
"""The down-projection of the latent."""
VOCABULARY_TENSORS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: where it comes from, what is done to it, and how it is stored."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: Kind
    change: Callable[[Tensor], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, without padding."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


@dataclass(frozen=True)
class Export:
    """What was written."""

    file: str
    quantization: str
    tensors: int
    num_bytes: int
    kinds: dict[str, int]
    pre_tokenizer: str


def export_gguf(directory: Path, file: Path, quantization: str | None = None, *, track: Track = silent) -> Export:
    """Write a GGUF file; tensors pass through memory one at a time, and FILE appears when it is complete.

    `quantization` is a key of QUANTIZATIONS; None keeps the checkpoint's own type.
    """
    if file.exists():
        raise BadInput(f"{file} exists; name a new file or remove it")
    config = read_json(directory / "config.json")
    if (reason := ENGINES["llama.cpp"].rule(config)) is not None:
        raise InvalidRecipe(f"llama.cpp cannot take {directory}: {reason}")
    name = quantization or OF_DTYPE.get(str(config.get("dtype")), "f32")
    kind, file_type = QUANTIZATIONS[checked_quantization(name)]
    reader = SafetensorsReader(directory)
    entries = list(tensor_entries(reader, config, kind))
    tokenizer = read_tokenizer(directory, config["vocab_size"])
    num_bytes = sum(entry.num_bytes for entry in entries)
    check_space(file, num_bytes)
    partial = file.with_name(file.name + ".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE)
    add_metadata(writer, config, file.stem)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokenizer.add_to(writer)
    with writing(file):
        try:
            _write(writer, reader, entries, track)
            os.replace(partial, file)
        finally:
            writer.close()
            partial.unlink(missing_ok=True)
    kinds = {k.name: sum(entry.kind == k for entry in entries) for k in Kind if any(e.kind == k for e in entries)}
    return Export(str(file), name, len(entries), file.stat().st_size, kinds, tokenizer.pre)


def checked_quantization(name: str) -> str:
    """A key of QUANTIZATIONS, or InvalidRecipe that says how the type can be had."""
    if name in QUANTIZATIONS:
        return name
    known = ", ".join(QUANTIZATIONS)
    if f"MOSTLY_{name.upper()}" in LlamaFileType.__members__:
        raise InvalidRecipe(
            f"--quantize {name} needs llama.cpp's own program: export with --quantize bf16, then run "
            f"llama-quantize FILE FILE2 {name.upper()} --tensor-type attn_kv_a_mqa=bf16 (here: {known})"
        )
    raise InvalidRecipe(f"--quantize {name!r} is unknown (known: {known})")


def _write(writer: gguf.GGUFWriter, reader: SafetensorsReader, entries: list[Entry], track: Track) -> None:
    for entry in entries:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.num_bytes, entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in track(entries, label="writing", total=len(entries)):
        writer.write_tensor_data(stored(entry, entry.change(reader.read(entry.source))))


def stored(entry: Entry, tensor: Tensor) -> Array:
    """A tensor in the file's type; InvalidRecipe when fp16 cannot hold it."""
    data = np.ascontiguousarray(tensor.float().numpy())
    if entry.kind == Kind.F16:
        with np.errstate(over="ignore"):
            half = data.astype(np.float16)
        lost = np.linalg.norm(half.astype(np.float32) - data)
        if not lost <= HALF_LOSS * np.linalg.norm(data):
            raise InvalidRecipe(f"{entry.source} does not fit fp16; use --quantize bf16")
        return half
    return gguf.quantize(data, entry.kind)


def tensor_entries(reader: SafetensorsReader, config: Mapping[str, Any], wanted: Kind) -> Iterator[Entry]:
    """Every tensor of the checkpoint under llama.cpp's names; BadInput for one that is missing or unknown."""
    renamed = dict(MODEL_NAMES)
    split: dict[str, int] = {}
    for i in range(config["num_hidden_layers"]):
        renamed |= {f"model.layers.{i}.{k}.weight": f"blk.{i}.{v}.weight" for k, v in LAYER_NAMES.items()}
        split[f"model.layers.{i}.{UP_PROJECTION}.weight"] = i
    if strange := set(reader.names()) ^ (renamed.keys() | split.keys()):
        name = min(strange)
        word = "has a tensor that is not of the format" if name in reader.names() else "lacks tensor"
        raise BadInput(f"the checkpoint {word}: {name}")
    for source in reader.names():
        if source in split:
            yield from _up_projections(source, split[source], config, wanted)
        else:
            name, shape = renamed[source], reader.shape(source)
            yield Entry(name, source, shape, tensor_kind(name, shape, wanted), lambda tensor: tensor)


def _up_projections(source: str, layer: int, config: Mapping[str, Any], wanted: Kind) -> Iterator[Entry]:
    """kv_b_proj (H * (N + V), R) as attn_k_b (H, R, N) and attn_v_b (H, V, R)."""
    H, N, V, R = (
        config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    )  # fmt: skip
    changes = {
        f"blk.{layer}.attn_k_b.weight": ((H, R, N), lambda tensor: tensor.view(H, N + V, R)[:, :N].mT),
        f"blk.{layer}.attn_v_b.weight": ((H, V, R), lambda tensor: tensor.view(H, N + V, R)[:, N:]),
    }
    for name, (shape, change) in changes.items():
        yield Entry(name, source, shape, tensor_kind(name, shape, wanted), change)


def tensor_kind(name: str, shape: tuple[int, ...], wanted: Kind) -> Kind:
    """How a tensor is stored in a file of some type; see the module's text."""
    if len(shape) == 1 or wanted == Kind.F32:
        return Kind.F32
    if SMALL in name:
        return Kind.F32 if wanted == Kind.F16 else Kind.BF16
    if wanted not in (Kind.F16, Kind.BF16):
        if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            return Kind.F16
        if name in VOCABULARY_TENSORS:
            return Kind.Q8_0
    return wanted


def add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any], name: str) -> None:
    """The keys that llama.cpp reads for deepseek2, all of them written out."""
    rank, rope, nope, value = (
        config[key] for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )  # fmt: skip
    layers = config["num_hidden_layers"]
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope_settings(config)["rope_theta"])
    writer.add_rope_dimension_count(rope)
    # Without this key, models of most depths do not load; 0 says that queries have one projection.
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(rank)
    # One key head as wide as the cache, and what each query head amounts to when expanded.
    writer.add_head_count_kv(1)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(value)
    # Every layer is dense; the mixture's keys are required all the same, and a count of experts must be left out.
    writer.add_leading_dense_block_count(layers)
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_shared_count(0)
    writer.add_expert_weights_scale(1.0)
