"""Whole conversions of tiny models: parity, decode, padding, caches, reload, determinism."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from care.checkpoint import StateReader
from care.conversion import convert
from care.errors import BadInput
from care.evaluation import live_cache
from care.factorization import Svd, Whitened, factorize
from care.modeling.loading import Location, load_model
from care.plan import plan_conversion
from care.recipe import load_recipe, recipe_names
from care.rope_split import whole_keys
from care.source import open_source
from care.statistics import CalibrationRequest, calibrate
from care.types import MODES, LayerRanks, Mode
from tiny import CACHE_KEY, SLIDING_WINDOW, TINY, Case, TinyModels, random_tokens
from tolerances import VISIBLE, assert_close, assert_numbers

FLOAT_BYTES = 4
BARELY_LESS = 1 - 1e-9
"""A budget of every value that is not parity, so that the recipe's own rope split is used."""

CASES = [
    Case("llama-gqa", "care-mla", 1.0, "absorbed", "native"),
    Case("llama-gqa", "care-mla", 0.5, "absorbed", "native"),
    Case("llama-gqa", "care-mla", 0.5, "absorbed", "deepseek"),
    Case("llama-gqa", "palu", 0.5, "rebuild", "native"),
    Case("llama-gqa", "care-e", 0.5, "rebuild", "native"),
    Case("llama-gqa", "care-e", 0.625, "absorbed", "native"),
    Case("llama3-rope", "transmla", 0.5, "absorbed", "native"),
    Case("llama3-rope", "asvd", 0.5, "rebuild", "native"),
    Case("llama-wide", "transmla", 0.5, "absorbed", "native"),
    Case("llama-wide", "care-u", 0.5, "rebuild", "native"),
    Case("llama-mha", "mha2mla", 0.25, "rebuild", "native"),
    Case("llama-mha", "transmla", 0.5, "absorbed", "deepseek"),
    Case("llama-mqa", "care-u", 0.75, "absorbed", "native"),
    Case("llama-mqa", "care-mla", 0.75, "absorbed", "deepseek"),
    Case("mistral", "svd-llm", 0.5, "rebuild", "native"),
    Case("mistral", "care-mla", 0.5, "absorbed", "deepseek"),
    Case("mistral-window", "care-mla", 0.5, "absorbed", "native"),
    Case("mistral-window", "svd-llm", 0.5, "rebuild", "native"),
    Case("llama-bias", "mha2mla", 0.5, "rebuild", "native"),
    Case("qwen2-bias", "care-mla", 0.5, "absorbed", "native"),
    Case("qwen2-window", "svd-llm", 0.5, "rebuild", "native"),
    Case("qwen3-norm", "care-mla", 0.5, "absorbed", "native"),
    Case("qwen3-norm", "care-u", 0.5, "rebuild", "native"),
    Case("qwen3-norm-bias", "best", 0.5, "absorbed", "native"),
    Case("qwen3-moe", "care-u", 0.5, "rebuild", "native"),
    Case("gemma2-softcap", "care-mla", 0.5, "absorbed", "native"),
    Case("gemma2-softcap", "palu", 0.5, "rebuild", "native"),
    Case("gemma3-local", "best", 0.75, "absorbed", "native"),
    Case("gemma3-local", "svd-llm", 0.5, "rebuild", "native"),
    Case("mixtral", "care-mla", 0.5, "absorbed", "native"),
    Case("phi3-fused", "care-mla", 0.5, "absorbed", "native"),
    Case("olmo2-norm", "care-mla", 0.5, "absorbed", "native"),
    Case("olmo2-norm", "care-u", 0.5, "rebuild", "native"),
    Case("smollm3-nope", "best", 0.5, "absorbed", "native"),
    Case("smollm3-nope", "svd-llm", 0.5, "rebuild", "native"),
]
"""Every source, recipe family, mode and format at least once, below the source's width."""

EVERY = pytest.mark.parametrize("case", CASES, ids=str)
STATIC = pytest.mark.parametrize("case", [c for c in CASES if c.format == "native"], ids=str)
ABSORBED = pytest.mark.parametrize("case", [c for c in CASES if c.mode == "absorbed" and c.format == "native"], ids=str)


def logits_of(model: Any, tokens_BT: Tensor, **arguments: Any) -> Tensor:
    """One pass without a cache."""
    with torch.inference_mode():
        return model(input_ids=tokens_BT, use_cache=False, **arguments).logits


def step_through(model: Any, chunks: Sequence[Tensor], cache: Any = None) -> Tensor:
    """Logits of a text that is fed piece by piece into one cache."""
    logits = []
    with torch.inference_mode():
        for chunk in chunks:
            output = model(input_ids=chunk, use_cache=True, **({} if cache is None else {CACHE_KEY: cache}))
            cache = output[CACHE_KEY]
            logits.append(output.logits)
    return torch.cat(logits, 1)


def kind_of(case: Case) -> str:
    """The row of the tolerance table."""
    return "deepseek logits" if case.format == "deepseek" else "fp32 logits"


FULL = [
    (source, recipe)
    for source in TINY for recipe in recipe_names()
    if source in ("llama-gqa", "llama-wide") or recipe in ("care-mla", "best-rebuild", "palu")
]  # fmt: skip
"""Every recipe on two sources, and on every source a recipe of each kind."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("source", "recipe"), FULL)
def test_full_budget_is_lossless(tiny: TinyModels, source: str, recipe: str, mode: Mode) -> None:
    """The paper's KV parity: the source's logits at no more than the source's cache."""
    case = Case(source, recipe, 1.0, mode, "native")
    tokens = random_tokens(40, batch=2)
    expected = logits_of(tiny.source_model(source), tokens)
    assert_close(logits_of(tiny.model(case), tokens), expected, "fp32 logits")
    spec = tiny.source(source).spec
    assert all(r.width <= spec.cache_width for r in tiny.plan(case).ranks)


@EVERY
def test_below_the_full_budget_something_is_lost(tiny: TinyModels, case: Case) -> None:
    """The test above would pass for a conversion that copies the source."""
    tokens = random_tokens(40)
    difference = logits_of(tiny.model(case), tokens) - logits_of(tiny.source_model(case.source), tokens)
    assert (float(difference.abs().max()) > VISIBLE) == (case.budget < 1)


@EVERY
def test_live_cache_is_the_budget(tiny: TinyModels, case: Case) -> None:
    """Formula, plan, provenance and the tensors of a running model agree."""
    spec, plan = tiny.source(case.source).spec, tiny.plan(case)
    values = case.budget * spec.cache_width * spec.num_layers
    assert sum(r.width for r in plan.ranks) == values
    used = live_cache(tiny.model(case), SLIDING_WINDOW - 1)
    assert used.values_per_token == values
    assert used.bytes_per_token == values * FLOAT_BYTES
    report = json.loads((tiny.converted(case) / "conversion.json").read_text())
    assert sum(layer["width"] for layer in report["layers"]) == values
    assert report["kept_share"] == case.budget
    assert live_cache(tiny.source_model(case.source), SLIDING_WINDOW - 1).values_per_token * case.budget == values


def test_odd_budgets_are_spent_to_the_last_value(tiny: TinyModels) -> None:
    spec = tiny.source("llama-gqa").spec
    for budget in (0.53, 0.7, 0.91):
        plan = tiny.plan(Case("llama-gqa", "care-u", budget))
        assert sum(r.width for r in plan.ranks) == int(budget * spec.cache_width * spec.num_layers)


def test_dynamic_ranks_differ_by_layer(tiny: TinyModels) -> None:
    ranks = tiny.plan(Case("llama-gqa", "care-e", 0.5, "rebuild", "native")).ranks
    assert len({r.key_rank for r in ranks} | {r.value_rank for r in ranks}) > 1


@EVERY
def test_decode_by_token_is_the_full_forward_pass(tiny: TinyModels, case: Case) -> None:
    model, tokens = tiny.model(case), random_tokens(24)
    assert_close(step_through(model, tokens.split(1, 1)), logits_of(model, tokens), kind_of(case))


@EVERY
def test_decode_after_chunked_prefill_is_the_full_forward_pass(tiny: TinyModels, case: Case) -> None:
    model, tokens = tiny.model(case), random_tokens(24, batch=2)
    stepped = step_through(model, tokens.split([9, 1, 6, 1, 1, 6], 1))
    assert_close(stepped, logits_of(model, tokens), kind_of(case))


@STATIC
def test_static_cache_is_the_dynamic_cache(tiny: TinyModels, case: Case) -> None:
    model, tokens = tiny.model(case), random_tokens(20)
    chunks = tokens.split([11, *[1] * 9], 1)
    static = transformers.StaticCache(config=model.config, max_cache_len=32)
    assert_close(step_through(model, chunks, static), step_through(model, chunks), "fp32 logits")


def padded_batch(tokens: Sequence[Tensor]) -> dict[str, Tensor]:
    """Texts of unequal length, padded on the left, with their mask."""
    longest = max(t.shape[1] for t in tokens)
    ids = torch.full((len(tokens), longest), 258)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(tokens):
        ids[row, longest - text.shape[1] :] = text[0]
        mask[row, longest - text.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@EVERY
def test_left_padding_changes_nothing(tiny: TinyModels, case: Case) -> None:
    """Logits of each text, and of the same texts in one batch; with and without explicit positions."""
    model, texts = tiny.model(case), [random_tokens(n, seed=n) for n in (5, 13)]
    batch = padded_batch(texts)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for extra in ({}, {"position_ids": positions}):
        with torch.inference_mode():
            logits = model(**batch, use_cache=False, **extra).logits
        for row, text in enumerate(texts):
            assert_close(logits[row, -text.shape[1] :], logits_of(model, text)[0], kind_of(case))


@EVERY
def test_left_padded_generation_is_unpadded_generation(tiny: TinyModels, case: Case) -> None:
    """Greedy decode with a cache, where pads stay in the cache."""
    model, texts = tiny.model(case), [random_tokens(n, seed=n) for n in (5, 13)]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 258, "eos_token_id": None}
    together = model.generate(**padded_batch(texts), **options)
    for row, text in enumerate(texts):
        alone = model.generate(input_ids=text, attention_mask=torch.ones_like(text), **options)
        assert together[row, -12:].tolist() == alone[0, -12:].tolist()


@EVERY
def test_generation_is_greedy_over_full_passes(tiny: TinyModels, case: Case) -> None:
    """transformers' generate against arg-max over uncached passes, token by token."""
    model, tokens = tiny.model(case), random_tokens(6)
    expected = tokens
    for _ in range(10):
        expected = torch.cat((expected, logits_of(model, expected)[:, -1:].argmax(-1)), 1)
    made = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False,
        pad_token_id=258, eos_token_id=None,
    )  # fmt: skip
    assert made.tolist() == expected.tolist()


@pytest.mark.parametrize("case", [c for c in CASES if c.format == "deepseek"], ids=str)
def test_deepseek_is_native(tiny: TinyModels, case: Case) -> None:
    """The same conversion in both formats: equal logits and equal greedy tokens."""
    native = tiny.model(Case(case.source, case.recipe, case.budget, case.mode, "native"))
    stock, tokens = tiny.model(case), random_tokens(16)
    assert_close(logits_of(stock, tokens), logits_of(native, tokens), "deepseek logits")
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 258, "eos_token_id": None}
    made = [m.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options) for m in (stock, native)]
    assert made[0].tolist() == made[1].tolist()


class _Widest(TorchDispatchMode):
    """The most values a token of the cache has in any tensor that an operation makes."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.values = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and self.num_tokens in tensor.shape:
                self.values = max(self.values, tensor.numel() / self.num_tokens)
        return result


def widest_in_decode(model: Any, num_tokens: int) -> float:
    """Run one decode step after a prefill, and watch it."""
    tokens = random_tokens(num_tokens)
    with torch.inference_mode():
        cache = model(input_ids=tokens[:, :-1], use_cache=True)[CACHE_KEY]
        with _Widest(num_tokens) as watch:
            model(input_ids=tokens[:, -1:], use_cache=True, **{CACHE_KEY: cache})
    return watch.values


@ABSORBED
def test_absorbed_decode_rebuilds_nothing(tiny: TinyModels, case: Case) -> None:
    """No tensor of a decode step has more values per cached token than the cache has."""
    model = tiny.model(case)
    num_tokens = SLIDING_WINDOW if case.source == "mistral-window" else 61
    assert widest_in_decode(model, num_tokens) <= max(r.width for r in tiny.plan(case).ranks)


def test_rebuilding_decode_is_seen(tiny: TinyModels) -> None:
    """The test above would see it."""
    case = Case("llama-gqa", "palu", 0.25, "rebuild", "native")
    assert widest_in_decode(tiny.model(case), 61) > max(r.width for r in tiny.plan(case).ranks)


@ABSORBED
def test_absorbed_decode_calls_no_up_projection(tiny: TinyModels, case: Case) -> None:
    """Prefill may expand; one new token may not."""
    model, tokens = tiny.model(case), random_tokens(9)
    names = ("k_b_proj", "v_b_proj")
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if name.endswith(names)
    ]
    try:
        with torch.inference_mode():
            cache = model(input_ids=tokens[:, :8], use_cache=True)[CACHE_KEY]
            assert calls
            calls.clear()
            model(input_ids=tokens[:, 8:], use_cache=True, **{CACHE_KEY: cache})
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == []


@EVERY
def test_reload_is_bit_identical(tiny: TinyModels, case: Case) -> None:
    tokens = random_tokens(20)
    again = load_model(Location(tiny.converted(case)), dtype=torch.float32)
    assert_close(logits_of(again, tokens), logits_of(tiny.model(case), tokens), "exact")


@EVERY
def test_saved_again_and_reloaded_is_bit_identical(tiny: TinyModels, case: Case, tmp_path: Path) -> None:
    """Through transformers' own save_pretrained."""
    tokens, model = random_tokens(20), tiny.model(case)
    model.save_pretrained(tmp_path)
    again = load_model(Location(tmp_path), dtype=torch.float32)
    assert_close(logits_of(again, tokens), logits_of(model, tokens), "exact")


@pytest.mark.parametrize("recipe", ["care-mla", "transmla", "care-e"])
def test_same_seed_gives_same_bytes(tiny: TinyModels, recipe: str, tmp_path: Path) -> None:
    """From opening the source on; only the clock may differ."""
    outs = [tmp_path / "first", tmp_path / "second"]
    for out in outs:
        source = open_source(str(tiny.directory("llama-gqa")))
        calibration = calibrate(source, CalibrationRequest(str(tiny.text_file), 8, 32, seed=5))
        convert(plan_conversion(source, load_recipe(recipe), 0.5, calibration), out)
    first, second = ({p.name: p.read_bytes() for p in sorted(out.iterdir())} for out in outs)
    reports = [json.loads(files.pop("conversion.json")) for files in (first, second)]
    for report in reports:
        report["seconds"] = report["calibration"]["seconds"] = None
    assert reports[0] == reports[1]
    assert first == second


def test_another_seed_gives_other_bytes(tiny: TinyModels, tmp_path: Path) -> None:
    source, windows = tiny.source("llama-gqa"), []
    for seed in (1, 2):
        calibration = calibrate(source, CalibrationRequest(str(tiny.text_file), 8, 32, seed=seed))
        windows.append(calibration.windows_BT)
    assert not torch.equal(windows[0], windows[1])


@EVERY
def test_the_tokenizer_comes_along(tiny: TinyModels, case: Case) -> None:
    source, out = tiny.directory(case.source), tiny.converted(case)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded.decode(loaded("any bytes: \u00e9")["input_ids"]) == "any bytes: \u00e9"


@EVERY
def test_nothing_but_attention_changes_in_native(tiny: TinyModels, case: Case) -> None:
    """Carried tensors are the source's; in deepseek those that write to the residual stream are scaled alike."""
    source, converted = tiny.source_model(case.source).state_dict(), tiny.model(case).state_dict()
    eps = tiny.source(case.source).config["rms_norm_eps"]
    scale = (1e-6 / eps) ** 0.5 if case.format == "deepseek" else 1.0
    for name, tensor in source.items():
        if "self_attn" not in name:
            scaled = name.endswith(("embed_tokens.weight", "down_proj.weight"))
            assert_close(converted[name], tensor * (scale if scaled else 1.0), "fp32 table")


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "gemma3-local", "phi3-fused", "qwen2-bias"])
def test_a_model_in_memory_converts_as_its_checkpoint(tiny: TinyModels, name: str, tmp_path: Path) -> None:
    """Sources from GGUF files have transformers' own names and layouts: experts are fused there."""
    source = open_source(str(tiny.directory(name)))
    source.__dict__["reader"] = StateReader(tiny.source_model(name).state_dict())
    convert(plan_conversion(source, load_recipe("palu"), 1.0, None), tmp_path / "out")
    tokens = random_tokens(20)
    loaded = load_model(Location(tmp_path / "out"), dtype=torch.float32)
    assert_close(logits_of(loaded, tokens), logits_of(tiny.source_model(name), tokens), "fp32 logits")


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-norm"])
def test_the_fingerprint_is_that_of_the_keys(tiny: TinyModels, name: str) -> None:
    """Statistics must not be taken for those of a model of the same shape; with normalized keys k_GKX is a constant."""
    source, other = open_source(str(tiny.directory(name))), open_source(str(tiny.directory(name)))
    state = dict(tiny.source_model(name).state_dict())
    key = "model.layers.0.self_attn.k_proj.weight"
    other.__dict__["reader"] = StateReader({**state, key: state[key] * 1.5})
    assert source.fingerprint == open_source(str(tiny.directory(name))).fingerprint != other.fingerprint


def test_a_checkpoint_that_lacks_a_tensor_is_not_run(tiny: TinyModels, tmp_path: Path) -> None:
    """transformers would draw it at random."""
    shutil.copytree(tiny.converted(Case("mixtral", "care-mla", 0.5, "absorbed", "native")), tmp_path / "out")
    shard = tmp_path / "out" / "model-00002-of-00004.safetensors"
    lost = "model.layers.1.self_attn.v_b_proj.weight"
    save_file({name: t for name, t in load_file(shard).items() if name != lost}, shard, {"format": "pt"})
    with pytest.raises(BadInput, match=f"lacks tensor {lost}"):
        load_model(Location(tmp_path / "out"), dtype=torch.float32)


def test_care_u_keeps_more_of_the_activations_than_palu(tiny: TinyModels) -> None:
    """On the activations themselves, unshrunk, in every layer and at every rank."""
    source, calibration = tiny.source("llama-gqa"), tiny.calibration("llama-gqa")
    for index, stats in enumerate(calibration.layers):
        weights = source.attention(index)
        split = whole_keys(weights)
        values_ED = weights.v_GKX.flatten(0, 1).double()
        for rank in range(1, source.spec.kv_width):
            ranks = LayerRanks(0, rank, rank, joint=False)
            errors = []
            for method in (Whitened(), Svd()):
                latent = factorize(method, weights, split, stats, ranks).latent
                kept_ED = latent.v_up_GVR.flatten(0, 1) @ latent.kv_down_RX[rank:]
                lost_ED = values_ED - kept_ED
                errors.append(float(torch.einsum("md,de,me->", lost_ED, stats.input_moment_XX, lost_ED)))
            assert errors[0] <= errors[1]


def test_folding_is_the_best_of_those_tried(tiny: TinyModels) -> None:
    """The plan holds a number, and the report says why."""
    plan = tiny.plan(Case("llama-gqa", "transmla", 0.5, "absorbed", "native"))
    assert plan.folding is not None
    tried = plan.folding.perplexity
    assert list(tried) == [1, 2, 4][: len(tried)]
    assert plan.folding.best == min(tried, key=lambda folding: tried[folding])
    assert getattr(plan.recipe.rope, "folding") == plan.folding.best  # noqa: B009


def test_folding_one_costs_what_its_conversion_costs(tiny: TinyModels, tmp_path: Path) -> None:
    """The search's perplexity is that of a checkpoint with this folding and the latent at full rank."""
    plan = tiny.plan(Case("llama-gqa", "transmla", 0.5, "absorbed", "native"))
    assert plan.folding is not None
    assert plan.calibration is not None
    recipe = tmp_path / "fold.toml"
    recipe.write_text(
        'mode = "absorbed"\n[factorization]\nmethod = "svd"\n[rope]\nmethod = "rorope"\ndims = 8\nfolding = 1\n'
    )
    made = plan_conversion(plan.source, load_recipe(str(recipe)), BARELY_LESS, plan.calibration)
    convert(made, tmp_path / "out")
    model = load_model(Location(tmp_path / "out"), dtype=torch.float32)
    nll = [
        torch.nn.functional.cross_entropy(logits_of(model, window[None])[0, :-1], window[1:])
        for window in plan.calibration.windows_BT
    ]
    assert_numbers(math.log(plan.folding.perplexity[1]), float(torch.stack(nll).mean()), "fp32 nats")
