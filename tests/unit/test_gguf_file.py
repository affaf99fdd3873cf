"""GGUF files read back: every key, every tensor, and what is refused. In llama.cpp itself: tests/engines."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from care.checkpoint import SafetensorsReader
from care.errors import BadInput, InvalidRecipe
from care.export import QUANTIZATIONS, export_gguf
from care.export.gguf_file import tensor_kind
from tiny import VOCABULARY, Case, TinyModels
from tolerances import assert_close

CASE = Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek")
H, N, P, R = 4, 8, 8, 8
ATTENTION = "model.layers.1.self_attn"

KEYS = {
    "general.architecture": "deepseek2", "deepseek2.block_count": 3, "deepseek2.context_length": 256,
    "deepseek2.embedding_length": 32, "deepseek2.feed_forward_length": 48, "deepseek2.vocab_size": VOCABULARY,
    "deepseek2.attention.head_count": H, "deepseek2.attention.head_count_kv": 1,
    "deepseek2.attention.q_lora_rank": 0, "deepseek2.attention.kv_lora_rank": R,
    "deepseek2.attention.key_length": R + P, "deepseek2.attention.value_length": R,
    "deepseek2.attention.key_length_mla": N + P, "deepseek2.attention.value_length_mla": N,
    "deepseek2.rope.dimension_count": P, "deepseek2.rope.freq_base": 10000.0,
    "deepseek2.leading_dense_block_count": 3, "deepseek2.expert_shared_count": 0,
    "deepseek2.expert_feed_forward_length": 48, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 257, "tokenizer.ggml.padding_token_id": 258,
    "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False, "general.file_type": 0,
}  # fmt: skip
"""All of what llama.cpp is told, but for its lists and the eps."""


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Kind]]:
    """Keys, tensors in fp32 and how they are stored, by the gguf package's own reader."""
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return keys, tensors, {t.name: t.tensor_type for t in reader.tensors}


@pytest.fixture(scope="module")
def checkpoint(tiny: TinyModels) -> Path:
    """A conversion in format deepseek."""
    return tiny.converted(CASE)


def test_keys(checkpoint: Path, tmp_path: Path) -> None:
    export_gguf(checkpoint, tmp_path / "f.gguf")
    keys, _, _ = read(tmp_path / "f.gguf")
    assert {key: keys.get(key) for key in KEYS} == KEYS
    assert keys["deepseek2.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6, rel=1e-6)
    # llama.cpp takes a count of experts for a mixture, and a scaling type for a scaling.
    assert not {key for key in keys if "expert_count" in key or "expert_used" in key or "rope.scaling" in key}


def test_tensors_are_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    """Scores and values through the split up-projections, everything else as it lies."""
    made = export_gguf(checkpoint, tmp_path / "f.gguf", "f32")
    _, tensors, kinds = read(tmp_path / "f.gguf")
    source = SafetensorsReader(checkpoint)
    assert made.tensors == len(tensors) == len(source.names()) + 3
    assert set(kinds.values()) == {Kind.F32}
    assert_close(tensors["blk.1.attn_q.weight"], source.read(f"{ATTENTION}.q_proj.weight"), "exact")
    assert_close(tensors["blk.1.attn_kv_a_mqa.weight"], source.read(f"{ATTENTION}.kv_a_proj_with_mqa.weight"), "exact")
    assert_close(tensors["blk.1.attn_kv_a_norm.weight"], source.read(f"{ATTENTION}.kv_a_layernorm.weight"), "exact")
    assert_close(tensors["blk.1.attn_output.weight"], source.read(f"{ATTENTION}.o_proj.weight"), "exact")
    assert_close(tensors["blk.2.ffn_down.weight"], source.read("model.layers.2.mlp.down_proj.weight"), "exact")
    assert_close(tensors["token_embd.weight"], source.read("model.embed_tokens.weight"), "exact")
    assert_close(tensors["output.weight"], source.read("lm_head.weight"), "exact")
    up_HXR = source.read(f"{ATTENTION}.kv_b_proj.weight").view(H, 2 * N, R).double()
    q_HN, latent_R = torch.randn(H, N).double(), torch.randn(R).double()
    expanded_HX = up_HXR @ latent_R
    # llama.cpp multiplies by rows: absorbed_HR = sum over the last dim of attn_k_b with the query.
    absorbed_HR = (tensors["blk.1.attn_k_b.weight"].double() * q_HN[:, None]).sum(-1)
    assert_close(absorbed_HR @ latent_R, (q_HN * expanded_HX[:, :N]).sum(-1), "fp64")
    assert_close(tensors["blk.1.attn_v_b.weight"].double() @ latent_R, expanded_HX[:, N:], "fp64")


LARGEST_ERROR = {
    "f32": 0.0,
    "bf16": 2e-3,
    "f16": 3e-4,
    "q8_0": 0.01,
    "q5_1": 0.05,
    "q5_0": 0.06,
    "q4_1": 0.1,
    "q4_0": 0.1,
}
"""Relative error of a normal tensor: half a step of each type, over the size of normal values, generously."""


@pytest.mark.parametrize("quantization", list(QUANTIZATIONS))
def test_quantized_tensors_are_near(checkpoint: Path, tmp_path: Path, quantization: str) -> None:
    """No tensor is lost, the scaled-down latent least of all."""
    export_gguf(checkpoint, tmp_path / "f32.gguf", "f32")
    export_gguf(checkpoint, tmp_path / "small.gguf", quantization)
    _, expected, _ = read(tmp_path / "f32.gguf")
    keys, tensors, _ = read(tmp_path / "small.gguf")
    assert keys["general.file_type"] == QUANTIZATIONS[quantization][1]
    for name, tensor in expected.items():
        parts = [(tensor, tensors[name])]
        if "attn_kv_a_mqa" in name:
            parts = [(tensor[:R], tensors[name][:R]), (tensor[R:], tensors[name][R:])]
        for whole, small in parts:
            assert float((small - whole).norm()) <= LARGEST_ERROR[quantization] * float(whole.norm()), name


@pytest.mark.parametrize(
    ("name", "shape", "wanted", "kind"),
    [
        ("blk.0.attn_norm.weight", (64,), Kind.Q8_0, Kind.F32),
        ("blk.0.attn_kv_a_norm.weight", (64,), Kind.F16, Kind.F32),
        ("blk.0.attn_kv_a_mqa.weight", (64, 64), Kind.F16, Kind.F32),
        ("blk.0.attn_kv_a_mqa.weight", (64, 64), Kind.BF16, Kind.BF16),
        ("blk.0.attn_kv_a_mqa.weight", (64, 64), Kind.Q4_0, Kind.BF16),
        ("blk.0.attn_v_b.weight", (4, 64, 144), Kind.Q8_0, Kind.F16),
        ("blk.0.attn_k_b.weight", (4, 144, 64), Kind.Q8_0, Kind.Q8_0),
        ("output.weight", (99, 64), Kind.Q4_0, Kind.Q8_0),
        ("token_embd.weight", (99, 64), Kind.BF16, Kind.BF16),
        ("blk.0.ffn_up.weight", (96, 64), Kind.Q4_0, Kind.Q4_0),
    ],
)
def test_how_tensors_are_stored(name: str, shape: tuple[int, ...], wanted: Kind, kind: Kind) -> None:
    assert tensor_kind(name, shape, wanted) == kind


def test_the_default_keeps_the_checkpoints_bits(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    assert export_gguf(copy, tmp_path / "a.gguf").quantization == "f32"
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert export_gguf(copy, tmp_path / "b.gguf").quantization == "bf16"


def damaged(checkpoint: Path, to: Path, name: str, tensor: Tensor | None) -> Path:
    """A copy with one tensor of the last shard added, changed or removed."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(checkpoint, to / "model")
    (copy / "model.safetensors.index.json").unlink()
    merged: dict[str, Tensor] = {}
    for shard in sorted(copy.glob("*.safetensors")):
        merged |= load_file(shard)
        shard.unlink()
    merged.pop(name, None)
    save_file(merged | ({} if tensor is None else {name: tensor}), copy / "model.safetensors", {"format": "pt"})
    return copy


def test_values_beyond_fp16_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for value in (1e6, 1e-9):
        copy = damaged(checkpoint, tmp_path / str(value), name, torch.full((48, 32), value))
        with pytest.raises(InvalidRecipe, match=f"{name} does not fit fp16; use --quantize bf16"):
            export_gguf(copy, tmp_path / "f.gguf", "f16")
        assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.layers.2.mlp.up_proj.weight", None, "lacks tensor: model.layers.2.mlp.up_proj.weight"),
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(64), "not of the format: .*q_proj.bias"),
    ],
)
def test_checkpoints_with_other_tensors_are_refused(
    checkpoint: Path, tmp_path: Path, name: str, tensor: Tensor | None, words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        export_gguf(damaged(checkpoint, tmp_path, name, tensor), tmp_path / "f.gguf")


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the header and some tensors are on disk."""
    real, written = gguf.GGUFWriter.write_tensor_data, []

    def write(self: Any, tensor: Any) -> None:
        if written:
            assert list(tmp_path.glob("*.partial"))
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(True)
        real(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write)
    with pytest.raises(BadInput, match="the disk is full"):
        export_gguf(checkpoint, tmp_path / "f.gguf")
    assert written
    assert list(tmp_path.iterdir()) == []
