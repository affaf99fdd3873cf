"""A source's cache and a converted model's at 16, 8 and 4 bits: perplexity and bytes of a token.

Weights and arithmetic are fp32; what is cached is rounded when it is written, before anything attends to it.

Usage: python benchmarks/latent_quantization.py SRC CONVERTED TEXT RESULT.json [WINDOWS]
"""

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from care import open_source
from care.calibration import first_windows, load_text
from care.evaluation import measure
from care.evaluation.cache import live_layers
from care.kernels import QUANTIZERS
from care.modeling.cache import quantized_cache
from care.modeling.loading import load_model, locate
from care.progress import Item

WINDOW, WINDOWS = 1024, 8

CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this version of transformers calls a model's cache."""

MakeCache = Callable[[Any], Cache]


class Bf16Layer(DynamicLayer):
    """A cache in bf16 beside a model in fp32."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Round what comes in."""
        keys, values = super().update(key_states.bfloat16(), value_states.bfloat16(), *args, **kwargs)
        return keys.type_as(key_states), values.type_as(value_states)


CACHES: dict[str, MakeCache] = {
    "fp32": lambda _config: Cache(layer_class_to_replicate=DynamicLayer),
    "bf16": lambda _config: Cache(layer_class_to_replicate=Bf16Layer),
} | {
    name: lambda config, quantizer=quantizer: quantized_cache(config, quantizer)
    for name, quantizer in QUANTIZERS.items()
}  # fmt: skip


class Run:
    """A model on one kind of cache; remembers how many bytes the last window took."""

    def __init__(self, model: Any, make: MakeCache) -> None:  # noqa: ANN401 - a transformers model
        self._model, self._make = model, make
        self.bytes_per_token = 0.0

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """Logits (1, T, vocabulary)."""
        output = self._model(input_ids=tokens_BT, use_cache=True, **{CACHE: self._make(self._model.config)})
        tensors = [t for layer in live_layers(output) for t in (layer.keys, layer.values)]
        self.bytes_per_token = sum(t.numel() * t.element_size() for t in tensors) / tokens_BT.shape[1]
        return output.logits


def log(items: Iterable[Item], *, label: str, total: int) -> Iterable[Item]:
    """Say how far it is."""
    for done, item in enumerate(items):
        print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)
        yield item


def main(source_name: str, converted_name: str, text: str, result: Path, num_windows: int) -> None:
    """Measure every kind of cache of both models on the same windows."""
    source = open_source(source_name)
    models = {"source": source.model, "converted": load_model(locate(converted_name), dtype=torch.float32)}
    runs = {f"{name} {kind}": Run(model, make) for name, model in models.items() for kind, make in CACHES.items()}
    windows_BT = first_windows(source.tokens(load_text(text)), WINDOW, num_windows)
    quality = measure(runs, windows_BT, reference="source fp32", track=log)
    base = quality["source fp32"]
    conversion = json.loads((Path(converted_name) / "conversion.json").read_text())
    rows = [
        {
            "model": name.split()[0], "cache": name.split()[1], "bytes_per_token": runs[name].bytes_per_token,
            "perplexity": q.perplexity, "nll_standard_error": q.nll_error,
            "excess": math.log(q.perplexity / base.perplexity), "kl": q.kl, "top1_agreement": q.top1_agreement,
        }
        for name, q in quality.items()
    ]  # fmt: skip
    summary = {
        "source": Path(source_name).name, "recipe": conversion["recipe"]["name"], "kv_budget": conversion["kv_budget"],
        "text": Path(text).name, "window": WINDOW, "windows": num_windows, "torch": torch.__version__,
        "transformers": transformers.__version__, "rows": rows,
    }  # fmt: skip
    result.write_text(json.dumps(summary, indent=2) + "\n")
    print("| model | cache | bytes/token | perplexity | excess | KL |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['model']} | {row['cache']} | {row['bytes_per_token']:,.0f} | {row['perplexity']:.2f} "
            f"| {row['excess']:.3f} | {row['kl']:.3f} |"
        )


if __name__ == "__main__":
    count = int(sys.argv[5]) if len(sys.argv) > 5 else WINDOWS
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), count)
