"""Memory and time against the number of layers and tokens: a random checkpoint of a real model's shape.

    python benchmarks/size.py RESULT.json [--config DIR] [--layers 1,2] [--tokens 2048,4096] [--recipe care-u]

Without --config the shape is Llama-3.1-8B's. Every command runs in a fresh process, on one thread; the random
checkpoint is written with as many layers as the row says, and what `--dry-run` expects is kept beside what happens.
Peak memory is the process's resident set, of which mapped shards are a part. The whole model: --layers 32, 16 GB of
disk for the source, as much for the result.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
WINDOW = 256
CONTEXT = 256
"""Attention distances are taken on contexts this long, so that rows differ in the tokens that they say."""

SPREAD = 0.02
"""Standard deviation of random weights."""


def write_checkpoint(directory: Path, config: dict[str, Any], num_layers: int) -> None:
    """A random bf16 checkpoint, one shard a layer, with a tokenizer of one token a byte."""
    import torch  # noqa: PLC0415 - not in the process whose children are measured
    from safetensors.torch import save_file  # noqa: PLC0415

    from care.checkpoint import INDEX_NAME  # noqa: PLC0415
    from care.modeling.loading import Location, expected_shapes  # noqa: PLC0415

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    weight_map: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    shapes = expected_shapes(Location(directory))
    for name in shapes:
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else "outside"
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    torch.manual_seed(0)
    for shard, names in shards.items():
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16) if "norm" in name
            else torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=SPREAD)
            for name in names
        }  # fmt: skip
        save_file(tensors, directory / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """One token a byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def measured(*arguments: object) -> dict[str, float]:
    """One care command in a process of its own: seconds and peak resident bytes."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "care", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return {"seconds": time.perf_counter() - start, "peak_bytes": usage.ru_maxrss * 1024}


def row(config: dict[str, Any], num_layers: int, tokens: int, recipe: str, work: Path) -> dict[str, Any]:
    """Inspect, calibrate and convert a checkpoint of so many layers on so many tokens."""
    source, stats, out = (work / f"{name}-{num_layers}-{tokens}" for name in ("source", "stats", "out"))
    # In a process of its own: a child's peak counts from its parent's size.
    writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(source, config, num_layers))
    writer.start()
    writer.join()
    source_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    sampling = ("--samples", tokens // WINDOW, "--length", WINDOW, "--context", CONTEXT)
    commands = {
        "inspect": ("inspect", source),
        "calibrate": ("calibrate", source, stats, "--recipes", recipe, *sampling),
        "convert": ("convert", source, out, "--recipe", recipe, "--calibration", stats),
    }
    result: dict[str, Any] = {"layers": num_layers, "tokens": tokens, "source_bytes": source_bytes}
    planned = work / "plan.json"
    measured("convert", source, out, "--recipe", recipe, *sampling, "--dry-run", "--json", planned)
    result["estimate"] = json.loads(planned.read_text())["effort"]
    for name, arguments in commands.items():
        result[name] = measured(*arguments)
        print(num_layers, tokens, name, result[name], flush=True)
    for directory in (source, stats, out):
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    return result


def numbers(text: str) -> list[int]:
    """A comma-separated option."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Every number of layers on the fewest tokens, then the most layers on more tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--config", type=Path, help="directory with another model's config.json")
    parser.add_argument("--layers", type=numbers, default=[1, 2])
    parser.add_argument("--tokens", type=numbers, default=[2048, 4096])
    parser.add_argument("--recipe", default="care-u")
    options = parser.parse_args()
    config = json.loads((options.config / "config.json").read_text()) if options.config else LLAMA_8B
    pairs = [(layers, options.tokens[0]) for layers in options.layers]
    pairs += [(options.layers[-1], tokens) for tokens in options.tokens[1:]]
    result: dict[str, Any] = {
        "care": version("care-mla"), "torch": version("torch"), "machine": platform.machine(), "cores": os.cpu_count(),
        "threads": 1, "recipe": options.recipe, "config": config, "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        for layers, tokens in pairs:
            result["rows"].append(row(config, layers, tokens, options.recipe, Path(work)))
            options.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
