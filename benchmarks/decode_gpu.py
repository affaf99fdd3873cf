"""Decode attention on a GPU: a source's GQA in torch's fastest kernel against MLA in ours, beside what memory allows.

One step is the attention of all layers for one new token of every sequence, weights random, without what both models
share (projections of queries and outputs, MLPs). MLA includes absorbing queries and expanding values. Caches do not fit
the L2: layers lie side by side in memory, as many as there is room for, and are gone through in turn. The bound is the
bytes of the cache over the memory bandwidth measured in the same run, the faster of an addition and of a sum. What has
to be compiled is compiled first, by processes side by side, and timed afterwards by one.

Needs torch, Triton and this repository, nothing else:

    PYTHONPATH=src python benchmarks/decode_gpu.py run RESULT.json
    PYTHONPATH=src python benchmarks/decode_gpu.py plot RESULT.json PICTURE.png     (matplotlib)

`run RESULT.json --device cpu --smoke` goes through all of it on tiny sizes, in Triton's interpreter; its times mean
nothing.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from care.errors import first_line
from care.kernels import Cached, reference_decode

# Rope dims and ranks of SmolLM2-135M's layers by recipe `best` at half of its cache: how unlike real layers are.
PROFILE = [
    (56, 64), (120, 177), (80, 148), (96, 182), (72, 181), (48, 152), (40, 135), (40, 149), (40, 136), (56, 104),
    (72, 130), (56, 131), (40, 135), (48, 142), (40, 149), (40, 127), (32, 113), (40, 141), (32, 191), (48, 147),
    (32, 177), (40, 142), (40, 144), (48, 168), (40, 140), (32, 148), (32, 164), (32, 152), (32, 120), (32, 115),
]  # fmt: skip

ROUND = 16
"""Ranks and rope dims are multiples of it, as rows should start at multiples of 16 bytes."""

MEMORY_SHARE = 0.7
"""Share of the free memory that caches take."""

CHUNK = 1024
"""Slots of the cache are multiples of so many bytes."""

Step = Callable[[], Any]


@dataclass(frozen=True)
class Model:
    """Attention of a source, and the mean width of its latents: R + P."""

    layers: int
    H: int
    G: int
    K: int
    R: int
    P: int

    def uniform(self) -> list[tuple[int, int]]:
        """One width for all layers."""
        return [(self.R, self.P)] * self.layers

    def half(self) -> list[tuple[int, int]]:
        """Half of the source's cache, one width for all layers."""
        width = self.G * self.K
        return [(width - 128, 128)] * self.layers

    def by_layer(self) -> list[tuple[int, int]]:
        """Widths that vary over layers as in PROFILE, with means near R and P."""
        mean_P, mean_R = (sum(column) / len(PROFILE) for column in zip(*PROFILE, strict=True))

        def scaled(value: float) -> int:
            return max(round(value / ROUND), 1) * ROUND

        shares = [PROFILE[i * len(PROFILE) // self.layers] for i in range(self.layers)]
        return [(scaled(self.R * R / mean_R), min(scaled(self.P * P / mean_P), 128)) for P, R in shares]


MODELS = {"llama-3.1-8b": Model(32, 32, 8, 128, 512, 64), "qwen3-4b": Model(36, 32, 8, 128, 512, 64)}
CONTEXTS, BATCHES = (2048, 8192, 32768, 131072), (1, 4, 16, 64)
TIMED_SECONDS, MOST_REPEATS = 0.1, 20
"""A step is repeated for so long, or so often."""

FLEX_CONTEXT = 32768
"""Least context that flex attention is tried at: each size takes it seconds to compile."""

WORKERS = 14
"""Processes that compile."""

Size = tuple[int, int]
"""Context and batch."""

SMOKE_MODELS = {"tiny": Model(3, 4, 2, 96, 32, 16)}
SMOKE_CONTEXTS, SMOKE_BATCHES = (40, 64), (1, 2)


class Memory:
    """One block of memory that is cut into the caches of layers."""

    def __init__(self, num_bytes: int, device: str) -> None:
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter cannot multiply bf16
        self._block = torch.empty(num_bytes // CHUNK * CHUNK, dtype=torch.uint8, device=device)
        self._block.view(self.dtype).normal_()

    def slots(self, slot_bytes: int, count: int) -> list[Tensor]:
        """Bytes of `count` caches; they repeat where memory is short, and are none where there is not even one."""
        size = -(-slot_bytes // CHUNK) * CHUNK
        there = min(len(self._block) // size, count)
        return [self._block[i % there * size :][:slot_bytes] for i in range(count)] if there else []


def seconds(step: Step, device: str) -> float:
    """Time of a step: on a GPU from a recorded graph, so that starting kernels from Python is not what is timed."""
    step()
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    once = events(graph.replay, 1)
    return events(graph.replay, max(min(int(TIMED_SECONDS / once), MOST_REPEATS), 2))


def events(step: Step, repeats: int) -> float:
    """Time of a step by the GPU's own clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def bandwidth(device: str, num_values: int) -> float:
    """Bytes a second that memory allows: read and written by an addition, or read by a sum, whichever is more."""
    source = torch.randn(num_values, device=device)
    target = torch.empty_like(source)
    steps = {2: lambda: torch.add(source, 1, out=target), 1: source.sum}
    found: list[float] = []
    for passes, step in steps.items():
        step()
        took = events(step, 10) if device == "cuda" else seconds(step, device)
        found.append(4 * passes * num_values / took)
    return max(found)


@cache
def flex() -> Any:  # noqa: ANN401 - what torch.compile makes
    """Flex attention, compiled; once for all sizes."""
    dynamo: Any = import_module("torch._dynamo")
    dynamo.config.recompile_limit = 100
    return torch.compile(flex_attention, dynamic=False)


def gqa_steps(model: Model, slots: Sequence[Tensor], B: int, T: int, memory: Memory) -> dict[str, Step]:
    """The source's attention in every kernel of torch that can do it: heads of a group are queries of one key head."""
    G, K = model.G, model.K
    caches = [slot.view(memory.dtype).view(2, B, G, T, K) for slot in slots]
    query = torch.randn(B, G, model.H // G, K, dtype=memory.dtype, device=slots[0].device)

    def sdpa(backend: SDPBackend) -> Step:
        def step() -> None:
            with sdpa_kernel(backend):
                for keys, values in caches:
                    functional.scaled_dot_product_attention(query, keys, values)

        return step

    steps: dict[str, Step] = {"math": sdpa(SDPBackend.MATH)}
    if slots[0].is_cuda:
        fused, compiled = query.reshape(B, model.H, 1, K), flex()
        # The fourth backend, memory-efficient attention, took twice to thirty times as long as the best of these.
        steps = {"flash": sdpa(SDPBackend.FLASH_ATTENTION), "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)}
        if T >= FLEX_CONTEXT:
            steps["flex"] = lambda: [compiled(fused, keys, values, enable_gqa=True) for keys, values in caches]
    return steps


def mla_step(
    model: Model,
    widths: Sequence[tuple[int, int]],
    slots: Sequence[Tensor],
    B: int,
    T: int,
    memory: Memory,
    dtype: torch.dtype,
) -> Step:
    """Absorb, attend, expand, in every layer."""
    from care.kernels.decode import decode  # noqa: PLC0415 - needs Triton

    device, fp8, computed = slots[0].device, dtype == torch.float8_e4m3fn, memory.dtype
    lengths = torch.full((B,), T, dtype=torch.int32, device=device)
    q_nope = torch.randn(B, model.G, model.H // model.G, model.K, dtype=computed, device=device)
    layers: list[tuple[Tensor, Tensor, Tensor, Cached]] = []
    for slot, (R, P) in zip(slots, widths, strict=True):
        entries = slot.view(dtype)[: B * T * (R + P)].view(B, T, R + P)
        scales = torch.full((B, T, 2), 0.01, dtype=torch.bfloat16, device=device) if fp8 else None
        up_GKR = torch.randn(model.G, model.K, R, dtype=computed, device=device)
        q_rope = torch.randn(B, model.H, P, dtype=computed, device=device)
        layers.append((up_GKR, up_GKR.clone(), q_rope, Cached(entries, lengths, R, None, scales)))

    def step() -> None:
        for k_up_GKR, v_up_GKR, q_rope, cached in layers:
            absorbed = torch.einsum("bgak,gkr->bgar", q_nope, k_up_GKR).reshape(B, model.H, -1)
            mixed = decode(absorbed, q_rope, cached, model.K**-0.5)
            torch.einsum("bgar,gkr->bgak", mixed.view(B, model.G, -1, cached.rank), v_up_GKR)

    return step


@dataclass(frozen=True)
class Row:
    """One way of attending at one size; `bound` is the least time that its bytes take."""

    model: str
    context: int
    batch: int
    way: str
    bytes_per_token: float
    seconds: float | None
    bound_seconds: float
    note: str = ""


def measured(steps: dict[str, Step], device: str) -> tuple[float | None, str]:
    """The fastest of some kernels and its name, with what the others took or said."""
    found: dict[str, float] = {}
    notes: list[str] = []
    for name, step in steps.items():
        try:
            found[name] = seconds(step, device)
            notes.append(f"{name} {found[name]:.3g} s")
        except Exception as error:  # whatever a kernel cannot do, the others are measured
            notes.append(f"{name}: {first_line(error)[:100]}")
    return (min(found.values()) if found else None), "; ".join(notes)


def rows_of(name: str, model: Model, T: int, B: int, memory: Memory, speed: float) -> list[Row]:
    """The source and four kinds of MLA at one size."""
    device = str(memory.slots(CHUNK, 1)[0].device.type)
    size = memory.dtype.itemsize
    ways: list[tuple[str, list[int], Callable[[list[Tensor]], dict[str, Step]]]] = [
        ("gqa", [2 * model.G * model.K * size] * model.layers, lambda slots: gqa_steps(model, slots, B, T, memory))
    ]
    fp8 = torch.float8_e4m3fn
    kinds = {
        "mla-uniform": (model.uniform(), memory.dtype), "mla-by-layer": (model.by_layer(), memory.dtype),
        "mla-uniform-fp8": (model.uniform(), fp8), "mla-half": (model.half(), memory.dtype),
    }  # fmt: skip
    for kind, (widths, dtype) in kinds.items():
        step = partial(mla_step, model, widths, B=B, T=T, memory=memory, dtype=dtype)
        # fp8 entries have two scales of two bytes.
        layer_bytes = [(R + P) * dtype.itemsize + 4 * (dtype == fp8) for R, P in widths]
        ways.append((kind, layer_bytes, lambda slots, step=step: {"care": step(slots)}))
    rows: list[Row] = []
    for way, layer_bytes, make in ways:
        slots = memory.slots(max(layer_bytes) * B * T, model.layers)
        took, note = measured(make(slots), device) if slots else (None, "a layer's cache does not fit")
        bound = sum(layer_bytes) * B * T / speed
        rows.append(Row(name, T, B, way, sum(layer_bytes), took, bound, note))
    return rows


def hardware(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    triton: Any = import_module("triton")

    about: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
        }  # fmt: skip
    else:
        about |= {"device": platform.processor() or platform.machine(), "smoke": "interpreted: times mean nothing"}
    return about


def largest_error(memory: Memory) -> float:
    """Of the kernel beside plain torch, so that a fast wrong answer shows."""
    from care.kernels.decode import decode  # noqa: PLC0415 - needs Triton

    device = memory.slots(CHUNK, 1)[0].device
    entries = torch.randn(2, 300, 208, dtype=memory.dtype, device=device)
    cached = Cached(entries, torch.tensor([300, 77], dtype=torch.int32, device=device), 144)
    query = torch.randn(2, 9, 208, dtype=memory.dtype, device=device).split([144, 64], -1)
    (q_latent, q_rope), scale = query, 0.07
    found = decode(q_latent, q_rope, cached, scale).float()
    return float((found - reference_decode(q_latent, q_rope, cached, scale)).abs().max())


def compile_ahead(sizes: Sequence[Size]) -> None:
    """Fill the caches of compilers on the disk: flex attention of each size, our kernel at each width."""
    model = next(iter(MODELS.values()))
    widths = {pair for each in MODELS.values() for pair in (*each.uniform(), *each.by_layer(), *each.half())}
    jobs = [partial(compile_flex, (T, B)) for T, B in sizes if T >= FLEX_CONTEXT]
    jobs += [partial(compile_ours, model, pair, torch.bfloat16) for pair in sorted(widths)]
    jobs.append(partial(compile_ours, model, model.uniform()[0], torch.float8_e4m3fn))
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(job) for job in jobs]:
            error = future.exception()
            if error:
                print(f"not compiled: {str(error)[:200]}", flush=True)


def compile_flex(size: Size) -> None:
    """Of one context and batch; all models have the same heads."""
    model, (T, B) = next(iter(MODELS.values())), size
    keys, values = torch.empty(2, B, model.G, T, model.K, dtype=torch.bfloat16, device="cuda")
    flex()(keys.new_zeros(B, model.H, 1, model.K), keys, values, enable_gqa=True)
    torch.cuda.synchronize()
    del keys, values
    torch.cuda.empty_cache()


def compile_ours(model: Model, width: Size, dtype: torch.dtype) -> None:
    """At one width."""
    memory = Memory(2**24, "cuda")
    mla_step(model, [width], memory.slots(2**22, 1), 2, 1024, memory, dtype)()
    torch.cuda.synchronize()


def run(result: Path, device: str, *, smoke: bool) -> None:
    """All sizes; the result is written after each, as some take long."""
    models = SMOKE_MODELS if smoke else MODELS
    sizes = [(T, B) for T in (SMOKE_CONTEXTS if smoke else CONTEXTS) for B in (SMOKE_BATCHES if smoke else BATCHES)]
    if device == "cuda":
        compile_ahead(sizes)
    speed = bandwidth(device, 2**20 if smoke else 2**30)
    free = 2**24 if device == "cpu" else int(torch.cuda.mem_get_info()[0] * MEMORY_SHARE)
    memory = Memory(free, device)
    summary: dict[str, Any] = {
        "hardware": hardware(device), "bytes_per_second": speed, "largest_error": largest_error(memory),
        "models": {name: asdict(model) | {"by_layer": model.by_layer()} for name, model in models.items()}, "rows": [],
    }  # fmt: skip
    for name, model in models.items():
        for T, B in sizes:
            rows = rows_of(name, model, T, B, memory, speed)
            source = rows[0].seconds
            for row in rows:
                ratio = source / row.seconds if source and row.seconds else None
                speeds = {
                    "tokens_per_second": row.seconds and B / row.seconds, "speed_over_source": ratio,
                    "share_of_bound": row.seconds and row.bound_seconds / row.seconds,
                }  # fmt: skip
                summary["rows"].append(asdict(row) | speeds)
                shown = "  ".join(f"{key} {value:.3g}" for key, value in speeds.items() if value is not None)
                print(f"{name} {T:>7} x {B:<3} {row.way:<16} {shown}  {row.note}", flush=True)
            result.write_text(json.dumps(summary, indent=2) + "\n")


def plot(result: Path, picture: Path) -> None:
    """Speed over the source's by context, a row a model and a panel a batch; dotted is what bytes alone would give."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - optional

    summary = json.loads(result.read_text())
    rows = summary["rows"]
    models, batches = list(summary["models"]), sorted({row["batch"] for row in rows})
    figure, axes = plt.subplots(
        len(models), len(batches), figsize=(3 * len(batches), 3 * len(models)), squeeze=False, sharex=True, sharey=True
    )
    for axis, (model, batch) in zip(axes.flat, product(models, batches), strict=True):
        here = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        source = {row["context"]: row for row in here if row["way"] == "gqa"}
        ways = [way for way in dict.fromkeys(row["way"] for row in here) if way != "gqa"]
        for way, marker in zip(ways, "osv^", strict=False):
            mine = [row for row in here if row["way"] == way and row["speed_over_source"]]
            contexts = [row["context"] for row in mine]
            speeds = [row["speed_over_source"] for row in mine]
            (line,) = axis.plot(contexts, speeds, marker=marker, markersize=4, label=way)
            bounds = [source[c]["bound_seconds"] / row["bound_seconds"] for c, row in zip(contexts, mine, strict=True)]
            axis.plot(contexts, bounds, linestyle=":", linewidth=1, color=line.get_color())
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(source), [f"{context // 1024}k" for context in sorted(source)])
        axis.set_title(f"{model}, batch {batch}", fontsize=9)
    for row in axes:
        row[0].set_ylabel("speed over GQA")
    for axis in axes[-1]:
        axis.set_xlabel("context")
    axes[0][0].legend(fontsize=7)
    about = summary["hardware"]
    figure.suptitle(f"Decode attention of all layers, {about['device']}; dotted: by bytes alone", fontsize=10)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("result", type=Path)
    runs.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    runs.add_argument("--smoke", action="store_true", help="tiny sizes")
    plots = commands.add_parser("plot")
    plots.add_argument("result", type=Path)
    plots.add_argument("picture", type=Path)
    given = parser.parse_args()
    if given.command == "plot":
        plot(given.result, given.picture)
        return
    if given.device == "cpu":
        if not given.smoke:
            parser.error("--device cpu runs in Triton's interpreter: add --smoke")
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif not torch.cuda.is_available():
        parser.error("no CUDA device here: --device cpu --smoke goes through all of it in Triton's interpreter")
    run(given.result, given.device, smoke=given.smoke)


if __name__ == "__main__":
    main()
