"""What every output format must do: load in transformers with the source's logits, or refuse before any work."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from care.carried import QkNorm
from care.checkpoint import SafetensorsReader
from care.errors import InvalidRecipe
from care.formats import FORMATS
from care.formats.deepseek import LATENT_HEADROOM, LATENT_NORM_EPS, latent_scale
from care.modeling.native import register
from care.plan import check_request, plan_conversion
from care.recipe import load_recipe
from care.types import MODES, Mode, Target
from tiny import CACHE_KEY, TINY, Case, TinyModels, random_tokens
from tolerances import assert_close, assert_numbers

EXPRESSIBLE = {
    ("deepseek", "absorbed"): {"llama-mqa", "llama-mqa-tied"},
    ("native", "absorbed"): set(TINY),
    ("native", "rebuild"): set(TINY),
}
"""Sources whose every rotary pair fits a format; all other combinations must be refused."""

LOGITS = {"deepseek": "deepseek logits", "native": "fp32 logits"}
COMBINATIONS = [
    pytest.param(name, format, mode, id=f"{name}-{format}-{mode}")
    for name in TINY for format in FORMATS for mode in MODES
]  # fmt: skip


def target_of(tiny: TinyModels, name: str, **changes: Any) -> Target:
    """What a format is asked to express: one slot per source frequency."""
    source = tiny.source(name)
    target = Target(source.config, source.spec, "absorbed", source.spec.shared_frequencies, True, torch.float32)
    return replace(target, **changes)


@pytest.mark.parametrize(("name", "format", "mode"), COMBINATIONS)
def test_full_rank_is_the_source_or_refused(tiny: TinyModels, name: str, format: str, mode: Mode) -> None:
    """Written, loaded by the Auto classes without remote code, compared with the source's own logits."""
    case = Case(name, "care-mla", 1.0, mode, format)
    if name not in EXPRESSIBLE.get((format, mode), set()):
        recipe = load_recipe(case.recipe, mode=mode, format=format)
        with pytest.raises(InvalidRecipe, match="--format native"):
            check_request(tiny.source(name), recipe, case.budget)
        return
    register()
    loaded = load_strictly(tiny.converted(case))
    tokens = random_tokens(40, batch=2)
    with torch.inference_mode():
        expected = tiny.source_model(name)(input_ids=tokens, use_cache=False).logits
        assert_close(loaded(input_ids=tokens, use_cache=False).logits, expected, LOGITS[format])


def load_strictly(directory: Path) -> Any:
    """Every tensor of the file has a place in the model, and the other way round."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, report = load(directory, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@pytest.mark.parametrize("format", list(FORMATS))
def test_config_names_the_class_that_loads(tiny: TinyModels, format: str) -> None:
    directory = tiny.converted(Case("llama-gqa", "care-mla", 0.5, "absorbed", format))
    config = json.loads((directory / "config.json").read_text())
    assert type(load_strictly(directory)).__name__ == config["architectures"][0]
    assert "auto_map" not in config


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("format", list(FORMATS))
def test_what_is_written_shares_no_memory(tiny: TinyModels, format: str, eps: float) -> None:
    """Safetensors refuses it; a tied head that becomes one of its own is a copy, scaled or not."""
    target = target_of(tiny, "llama-gqa")
    target = replace(target, config={**target.config, "rms_norm_eps": eps})
    embeddings = torch.randn(5, 4)
    written = FORMATS[format].carried_tensors("model.embed_tokens.weight", embeddings, target)
    assert len({tensor.data_ptr() for tensor in written.values()}) == len(written)


@pytest.mark.parametrize("format", list(FORMATS))
def test_index_names_every_tensor(tiny: TinyModels, format: str) -> None:
    directory = tiny.converted(Case("llama-gqa", "care-mla", 0.5, "absorbed", format))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    reader = SafetensorsReader(directory)
    assert set(index["weight_map"]) == set(reader.names())
    sizes = (reader.read(n).numel() * reader.read(n).element_size() for n in reader.names())
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_have_the_wanted_dtype(tiny: TinyModels, format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from care.conversion import convert

    recipe = load_recipe("care-mla", format=format)
    plan = plan_conversion(tiny.source("llama-gqa"), recipe, 0.5, tiny.calibration("llama-gqa"), dtype=dtype)
    convert(plan, tmp_path / "out")
    reader = SafetensorsReader(tmp_path / "out")
    assert {reader.read(n).dtype for n in reader.names()} == {dtype}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "rebuild"}, "cannot rebuild keys"),
        ({"deepseek_body": False}, "cannot hold a llama body"),
        ({"dtype": torch.float16}, "underflows in float16"),
        ({"slot_frequencies": (1.0, 0.5, 0.1)}, "not the table of these 3 rope slots"),
        ({"slot_frequencies": (0.9, 0.81)}, "not the table of these 2 rope slots"),
    ],
)
def test_deepseek_refuses_what_it_cannot_express(tiny: TinyModels, changes: dict[str, Any], words: str) -> None:
    FORMATS["deepseek"].check(target_of(tiny, "llama-gqa"))
    with pytest.raises(InvalidRecipe, match=words):
        FORMATS["deepseek"].check(target_of(tiny, "llama-gqa", **changes))


@pytest.mark.parametrize(("key", "value", "words"), [("hidden_act", "gelu", "silu"), ("mlp_bias", True, "llama body")])
def test_deepseek_refuses_configs_it_cannot_express(tiny: TinyModels, key: str, value: object, words: str) -> None:
    target = target_of(tiny, "llama-gqa")
    with pytest.raises(InvalidRecipe, match=words):
        FORMATS["deepseek"].check(replace(target, config={**target.config, key: value}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qkv_bias": True}, "no biases in attention"),
        ({"out_bias": True}, "no biases in attention"),
        ({"qk_norm": QkNorm(8, 8, 1e-6)}, "no norm on queries and keys"),
        ({"softcap": 30.0}, "no soft cap on scores"),
        ({"windows": (None, 8, None)}, "no sliding window"),
    ],
)
def test_deepseek_refuses_attention_it_cannot_express(tiny: TinyModels, changes: dict[str, Any], words: str) -> None:
    target = target_of(tiny, "llama-gqa")
    with pytest.raises(InvalidRecipe, match=f"{words}, which this source uses; use --format native"):
        FORMATS["deepseek"].check(replace(target, spec=replace(target.spec, **changes)))


def test_deepseek_refuses_layers_with_tables_of_their_own(tiny: TinyModels) -> None:
    recipe = load_recipe("transmla", format="deepseek")
    with pytest.raises(InvalidRecipe, match="one table of rope slots for all layers; use --format native"):
        check_request(tiny.source("smollm3-nope"), recipe, 0.5)


def test_one_width_formats_refuse_allocations_by_layer(tiny: TinyModels) -> None:
    recipe = load_recipe("care-e", mode="absorbed", format="deepseek")
    with pytest.raises(InvalidRecipe, match="one width for all layers"):
        check_request(tiny.source("llama-gqa"), recipe, 0.5)


@pytest.mark.parametrize("budget", [0.5, 0.6, 0.77])
def test_one_width_formats_get_one_width(tiny: TinyModels, budget: float) -> None:
    case = Case("llama-gqa", "care-mla", budget, "absorbed", "deepseek")
    spec, ranks = tiny.source("llama-gqa").spec, tiny.plan(case).ranks
    assert {r.width for r in ranks} == {int(budget * spec.cache_width)}


def test_deepseek_latent_norm_is_linear(tiny: TinyModels) -> None:
    """The stock norm on the stock cache entry, against the plain product with its weight."""
    model = tiny.model(Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek"))
    tokens, seen = random_tokens(30), []
    norms = [layer.self_attn.kv_a_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_hook(lambda m, a, out: seen.append((m, a[0], out))) for norm in norms]
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(norms)
    for norm, latent, result in seen:
        assert float(latent.square().mean(-1).max()) < LATENT_HEADROOM * LATENT_NORM_EPS
        with torch.inference_mode():
            linear = latent * (norm.weight / LATENT_NORM_EPS**0.5)
        assert_close(result, linear, "fp32 attention")


def test_deepseek_norm_weight_is_exact_in_every_dtype() -> None:
    for size in (1e-3, 1.0, 300.0):
        factor, weight = latent_scale(torch.full((4, 6), size, dtype=torch.float64))
        assert float(torch.tensor(weight).bfloat16()) == weight
        assert_numbers(factor * weight / LATENT_NORM_EPS**0.5, 1.0, "fp64")


def test_deepseek_cache_holds_only_latents(tiny: TinyModels) -> None:
    """Stock transformers keeps rank + rope values a token."""
    case = Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek")
    model, ranks = tiny.model(case), tiny.plan(case).ranks
    with torch.inference_mode():
        cache = model(input_ids=random_tokens(10), use_cache=True)[CACHE_KEY]
    for layer, rank in zip(cache.layers, ranks, strict=True):
        assert layer.keys.numel() + layer.values.numel() == 10 * rank.width
