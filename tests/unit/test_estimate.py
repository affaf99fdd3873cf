"""Sizes against published models, disk against what conversions really put there."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from care.calibration import Stream
from care.conversion import run_conversion
from care.estimate import (
    BYTES_A_SECOND,
    Sizes,
    Speed,
    cache_per_gpu,
    calibration_bytes,
    conversion_bytes,
    estimate,
    result_bytes,
)
from care.recipe import load_recipe
from care.source import Source, open_source
from care.statistics import CalibrationRequest
from tiny import NUM_WINDOWS, WINDOW, TinyModels
from tolerances import assert_numbers

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

QWEN3_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936, "tie_word_embeddings": False,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "rms_norm_eps": 1e-6, "head_dim": 128, "rope_theta": 1e7, "dtype": "bfloat16",
}  # fmt: skip


def config_only(directory: Path, config: Mapping[str, object]) -> Source:
    """A source of which there is nothing but the config."""
    (directory / "config.json").write_text(json.dumps(config))
    return open_source(str(directory))


def test_sizes_of_a_mixture(tmp_path: Path) -> None:
    """Qwen3-30B-A3B: 30.5 billion parameters, of which a token goes through 3.3."""
    sizes = Sizes.of(config_only(tmp_path, QWEN3_MOE))
    assert sizes.total == 30532122624
    assert sizes.bytes_each == 2
    assert sizes.embeddings + 2048 == sizes.head == 151936 * 2048 + 2048
    expert = 3 * 2048 * 768
    assert sizes.layer - sizes.active == 120 * expert
    assert sizes.experts == 128 * expert
    assert round((48 * sizes.active + sizes.embeddings + sizes.head) / 1e9, 1) == 3.4


def test_heads_are_split_and_latents_are_not(tmp_path: Path) -> None:
    source = config_only(tmp_path, QWEN3_MOE)
    layer = 2 * 4 * 128
    assert [cache_per_gpu(source, None, n) // 48 for n in (1, 2, 4, 8)] == [layer, layer // 2, layer // 4, layer // 4]
    assert [cache_per_gpu(source, 0.5, n) // 48 for n in (1, 2, 4, 8)] == [layer // 2] * 4


@pytest.mark.parametrize("recipe", ["best", "care-u"])
def test_streams_take_no_more_than_was_said(
    tiny: TinyModels, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states on the disk whenever one more file of them is complete."""
    source, chosen = tiny.source("llama-gqa"), load_recipe(recipe)
    request = CalibrationRequest(str(tiny.text_file), NUM_WINDOWS, WINDOW, context=2 * WINDOW)
    real, found = Stream.write, [0]

    def write(self: Stream, batches: Iterable[Tensor]) -> None:
        real(self, batches)
        found.append(sum(file.stat().st_size for file in self.directory.glob("*.fp32")))

    monkeypatch.setattr(Stream, "write", write)
    run_conversion(source, chosen, 0.5, request, tmp_path / "out")
    spec, gradients = source.spec, recipe == "best"
    stats = 8 * spec.num_layers * (spec.feature_width**2 + (spec.cache_width**2 if gradients else 0))
    said = calibration_bytes(source, chosen.needs, request) - stats
    assert max(found) <= said < 1.5 * max(found)


def test_the_result_is_as_large_as_was_said(tiny: TinyModels, tmp_path: Path) -> None:
    """Tensors at the full budget are at most a few more than the source's."""
    source, recipe = tiny.source("llama-gqa"), load_recipe("palu")
    request = CalibrationRequest("python-help")
    run_conversion(source, recipe, 0.5, request, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    said = conversion_bytes(source, recipe, request, source.dtype)
    assert index["metadata"]["total_size"] <= said == result_bytes(source, source.dtype)


def test_more_of_anything_takes_more(tmp_path: Path) -> None:
    source, speed = config_only(tmp_path, QWEN3_MOE), Speed(1e10, 1e10)
    palu, inputs, everything = (
        estimate(source, load_recipe(name), CalibrationRequest("python-help"), speed)
        for name in ("palu", "care-u", "best")
    )
    assert palu.seconds < inputs.seconds < everything.seconds
    assert palu.disk_bytes < inputs.disk_bytes < everything.disk_bytes
    assert palu.memory_bytes <= inputs.memory_bytes <= everything.memory_bytes < 6e9
    halves = estimate(source, load_recipe("best"), CalibrationRequest("python-help"), Speed(2e10, 2e10))
    # What is left are four reads of the layers, the refit's among them, one more and one write.
    moved = 6 * 2 * Sizes.of(source).layers / BYTES_A_SECOND
    assert_numbers(2 * halves.seconds - everything.seconds, moved, "fp64 sums")


def recorded() -> list[Any]:
    """Every conversion of benchmarks/results whose memory was measured."""
    return [
        pytest.param(result["config"], result["recipe"], row, id=f"{path.stem}-{row['layers']}-{row['tokens']}")
        for path in sorted(RESULTS.glob("size-*.json"))
        for result in [json.loads(path.read_text())]
        for row in result["rows"]
    ]


@pytest.mark.parametrize(("config", "recipe", "row"), recorded())
def test_memory_was_what_is_said(config: dict[str, Any], recipe: str, row: dict[str, Any], tmp_path: Path) -> None:
    """At most a twentieth more, and not half of it."""
    source = config_only(tmp_path, {**config, "num_hidden_layers": row["layers"]})
    request = CalibrationRequest("python-help", row["tokens"] // 256, 256)
    said = estimate(source, load_recipe(recipe), request, Speed(1e10, 1e10)).memory_bytes
    taken = max(row[step]["peak_bytes"] for step in ("calibrate", "convert"))
    assert 0.95 < said / taken < 2
