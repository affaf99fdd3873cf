"""What a conversion will take, before it is begun: memory, disk and time, from the config alone.

Nothing is read but config.json; sizes come from the model built without weights. Each figure is a formula over the
parts that are in memory, on the disk or computed, written out below; `benchmarks/size.py` measures them.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .calibration import is_calibration
from .calibration.streams import BATCH_TOKENS
from .recipe import Recipe
from .source import Source
from .statistics import CalibrationRequest

IMPORTS_BYTES = 450_000_000
"""Resident memory of Python with torch and transformers."""

FP32, FP64 = 4, 8

MOMENTS_HELD = 6
"""Square fp64 matrices as wide as the features that are in memory at once: a moment, its factors and workspace."""

DECOMPOSITION = 25.0
"""Operations of a symmetric eigendecomposition, over the cube of its size."""

BYTES_A_SECOND = 150e6
"""How fast weights are read, widened to fp32 and written: what the rows of benchmarks/results/size-*.json take beyond
their products, on a disk that is not fast."""

PROBE = 768
"""Size of the matrices by which this machine's speed is measured."""

SERVING_GPUS = (1, 2, 4, 8)
"""Tensor-parallel sizes at which the cache of one GPU is stated."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: of all, of all layers, of the largest layer and other parts.

    `active` are those of a layer that one token goes through, `experts` those of its experts, which are fused when they
    are read; `widest` is the most outputs of a projection.
    """

    total: int
    layers: int
    layer: int
    active: int
    experts: int
    embeddings: int
    head: int
    widest: int
    bytes_each: int

    @classmethod
    def of(cls, source: Source) -> "Sizes":
        """From the names and shapes that the config promises."""
        config, shapes = source.config, source.expected_shapes
        layers: dict[str, int] = {}
        experts, head, embeddings, widest = 0, 0, 0, source.spec.hidden_size
        pattern = re.compile(re.escape(source.architecture.layer).replace(r"\{i\}", r"\d+") + r"(?=\.)")
        for name, shape in shapes.items():
            size, layer = math.prod(shape), pattern.match(name)
            if layer is None:
                head, embeddings = (head, embeddings + size) if "embed" in name else (head + size, embeddings)
                continue
            layers[layer[0]] = layers.get(layer[0], 0) + size
            experts += size if ".experts." in name else 0
            widest = max(widest, shape[0])
        num_experts = config.get("num_experts") or config.get("num_local_experts") or 1
        idle = experts / len(layers) * (1 - config.get("num_experts_per_tok", 1) / num_experts)
        total = sum(math.prod(shape) for shape in shapes.values())
        largest = max(layers.values())
        tied = source.config.get("tie_word_embeddings")
        return cls(
            total=total, layers=sum(layers.values()), layer=largest, active=round(largest - idle),
            experts=experts // len(layers), embeddings=embeddings, head=head + (embeddings if tied else 0),
            widest=widest, bytes_each=source.stated_dtype.itemsize,
        )  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Peak resident memory, disk beside the source, and seconds on this machine."""

    memory_bytes: int
    disk_bytes: int
    seconds: float


def estimate(
    source: Source,
    recipe: Recipe,
    request: CalibrationRequest,
    speed: "Speed",
    dtype: torch.dtype | None = None,
) -> Estimate:
    """Calibrating and converting a source by a recipe."""
    sizes = Sizes.of(source)
    return Estimate(
        memory_bytes=_memory(source, sizes, recipe), disk_bytes=conversion_bytes(source, recipe, request, dtype),
        seconds=_seconds(source, sizes, recipe, request, speed),
    )  # fmt: skip


def _memory(source: Source, sizes: Sizes, recipe: Recipe) -> int:
    """The largest of the steps: a part of the model that becomes fp32 beside its mapped shard, and what is computed.

    Experts are there twice as they are stored, mapped and fused. The last step is writing the largest shard, whose
    tensors are mapped from those of the source.
    """
    spec, each = source.spec, FP32 + sizes.bytes_each
    moments = MOMENTS_HELD * FP64 * spec.feature_width**2
    running = BATCH_TOKENS * FP32 * (8 * spec.hidden_size + 4 * sizes.widest)
    logits = 4 * BATCH_TOKENS * FP32 * (sizes.embeddings // spec.hidden_size) if "gradients" in recipe.needs else 0
    steps = [
        each * sizes.embeddings,
        each * sizes.layer + sizes.bytes_each * sizes.experts if recipe.needs else 0,
        FP32 * sizes.layer + moments + running if recipe.needs else moments,
        each * sizes.head + logits if logits else 0,
        moments + sizes.bytes_each * max(sizes.layer, sizes.total - sizes.layers),
    ]
    return IMPORTS_BYTES + max(steps)


def result_bytes(source: Source, dtype: torch.dtype | None) -> int:
    """The converted checkpoint on the disk, at most."""
    size = (dtype or source.stated_dtype).itemsize
    return size * sum(math.prod(shape) for shape in source.expected_shapes.values())


def calibration_bytes(source: Source, needs: frozenset[str], request: CalibrationRequest) -> int:
    """Statistics of all layers, and the most that hidden states take at a time."""
    if not needs or is_calibration(Path(request.text)):
        return 0
    spec, gradients = source.spec, "gradients" in needs
    stats = FP64 * spec.num_layers * (spec.feature_width**2 + (spec.cache_width**2 if gradients else 0))
    tokens = 2 * request.num_windows * request.window
    tokens += (spec.num_layers + 1) * request.gradient_windows * request.window if gradients else 0
    tokens += 2 * max(request.num_contexts, len(request.texts)) * request.context if "distances" in needs else 0
    return stats + FP32 * spec.hidden_size * tokens


def conversion_bytes(
    source: Source, recipe: Recipe, request: CalibrationRequest, dtype: torch.dtype | None = None
) -> int:
    """Everything that is on the disk at the same time."""
    refit = 0
    if recipe.refit:
        tokens = request.num_windows * request.window
        refit = 4 * FP32 * source.spec.hidden_size * min(tokens, recipe.refit.tokens or tokens)
    return result_bytes(source, dtype) + calibration_bytes(source, recipe.needs, request) + refit


def _seconds(source: Source, sizes: Sizes, recipe: Recipe, request: CalibrationRequest, speed: "Speed") -> float:
    """Passes through layers and head at the speed of products, decompositions at theirs, and reading and writing."""
    spec = source.spec
    tokens = request.num_windows * request.window if recipe.needs else 0
    back = request.gradient_windows * request.window if "gradients" in recipe.needs else 0
    passes = tokens + 3 * back
    passes += request.num_contexts * request.context if "distances" in recipe.needs else 0
    passes += 3 * min(tokens, recipe.refit.tokens or tokens) if recipe.refit else 0
    logits = 3 * back * sizes.head
    products = spec.num_layers * (2 * passes * sizes.active + 2 * tokens * spec.feature_width**2) + 2 * logits
    tries = 1 + (spec.kv_width // 2 // max(getattr(recipe.allocation, "slot_step", spec.kv_width), 1))
    decompositions = spec.num_layers * (tries + 2) * DECOMPOSITION * spec.cache_width**3
    reads = 1 + bool(recipe.needs) + 2 * ("gradients" in recipe.needs) + bool(recipe.refit)
    moved = (reads + 1) * sizes.bytes_each * sizes.layers
    return products / speed.products + decompositions / speed.decompositions + moved / BYTES_A_SECOND


@dataclass(frozen=True)
class Speed:
    """Operations a second of this machine: fp32 products, and fp64 eigendecompositions by their formula."""

    products: float
    decompositions: float

    @classmethod
    def measured(cls) -> "Speed":
        """In less than a second."""
        a, b = (torch.randn(PROBE, PROBE) for _ in range(2))
        symmetric = (a @ a.T).double()
        return cls(
            2 * PROBE**3 / _fastest(lambda: a @ b),
            DECOMPOSITION * PROBE**3 / _fastest(lambda: torch.linalg.eigh(symmetric)),
        )


def _fastest(run: Callable[[], object], rounds: int = 3) -> float:
    seconds: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def cache_per_gpu(source: Source, kept: float | None, num_gpus: int) -> int:
    """Values cached per token on one of several GPUs: the source's heads are split, a latent is on every one."""
    spec = source.spec
    if kept is None:
        return 2 * spec.head_dim * math.ceil(spec.num_kv_heads / num_gpus) * spec.num_layers
    return round(kept * spec.cache_width * spec.num_layers)
