"""A decode step of one native attention layer on a GPU, called from Python: our kernel against torch's attention.

    PYTHONPATH=src python benchmarks/native_step.py RESULT.json

Weights and cache are random bf16. The layer decides by `kernel_fits` which of the two it takes; here it takes both.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from care.modeling import attention
from care.modeling.attention import LatentAttentionModule
from care.modeling.shape import LatentShape

WARM_UP, REPEATS = 3, 5
SIZES = ((1, 8192), (16, 8192), (16, 32768))
"""Batch and context."""


@dataclass(frozen=True)
class Heads:
    """A source's attention."""

    H: int
    G: int
    K: int
    D: int


SMOLLM2, LLAMA = Heads(9, 3, 64, 576), Heads(32, 8, 128, 4096)
LAYERS = [(SMOLLM2, 131, 56), (SMOLLM2, 136, 56), (SMOLLM2, 128, 64), (LLAMA, 512, 64), (LLAMA, 896, 128)]
"""Heads, rank and rope dim; the first has rows that are not of 16 bytes."""


class FullCache:
    """A cache whose tokens are all there."""

    def __init__(self, entry_B1UC: Tensor) -> None:
        self._entry = entry_B1UC

    def update(self, _keys: Tensor, values: Tensor, _layer: int) -> tuple[Tensor, Tensor]:
        """All of them, whatever comes in."""
        return self._entry, values


def step_seconds(module: LatentAttentionModule, batch: int, context: int) -> tuple[float, Tensor]:
    """Time of one step by the GPU's clock, and what it gives."""
    shape = module.shape
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    cache: Any = FullCache(torch.randn(batch, 1, context, shape.rope_dim + shape.kv_lora_rank, **options))
    hidden = torch.randn(batch, 1, shape.hidden_size, **options)
    positions = torch.tensor([[context - 1]], device="cuda")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    output = hidden
    with torch.no_grad():
        for repeat in range(WARM_UP + REPEATS):
            if repeat == WARM_UP:
                begin.record()
            output, _ = module(hidden, cache=cache, position_ids=positions)
        end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / REPEATS, output


def main(result: Path) -> None:
    """Every layer at every size, both ways."""
    rows: list[dict[str, Any]] = []
    for heads, rank, rope_dim in LAYERS:
        shape = LatentShape(
            mode="absorbed", hidden_size=heads.D, num_heads=heads.H, num_kv_heads=heads.G, head_dim=heads.K,
            nope_dim=heads.K, v_head_dim=heads.K, rope_dim=rope_dim, kv_lora_rank=rank, key_rank=rank, value_rank=rank,
            frequencies=tuple(1 / (i + 1) for i in range(rope_dim // 2)), scale=heads.K**-0.5,
        )  # fmt: skip
        module = LatentAttentionModule(shape, 0).to("cuda", torch.bfloat16)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.03)
        for batch, context in SIZES:
            found: dict[str, tuple[float, Tensor]] = {}
            for way in ("kernel", "torch"):
                attention.kernel_fits = lambda *_, way=way: way == "kernel"
                found[way] = step_seconds(module, batch, context)
            difference = (found["kernel"][1].float() - found["torch"][1].float()).norm() / found["torch"][
                1
            ].float().norm()
            rows.append({
                "heads": asdict(heads), "rank": rank, "rope_dim": rope_dim, "batch": batch, "context": context,
                **{f"{way}_seconds": seconds for way, (seconds, _) in found.items()}, "difference": float(difference),
            })  # fmt: skip
            print(rows[-1], flush=True)
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result.write_text(json.dumps({"hardware": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("native_step.py needs a CUDA device")
    main(Path(sys.argv[1]))
