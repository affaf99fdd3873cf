"""The ridge refit against a plain least-squares solution over stored tokens, and the prefix that feeds it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from care.calibration import DecoderLayers, WholeModel
from care.conversion import convert_layers
from care.errors import InvalidRecipe
from care.factorization import Svd, factorize
from care.modeling.native import build_layer
from care.plan import plan_conversion
from care.prefix import Prefix
from care.recipe import load_recipe
from care.refit import OutputMoments, Ridge
from care.rope_split import whole_keys
from care.types import LatentAttention, LayerRanks
from tiny import TinyModels, random_tokens
from tolerances import assert_close


@pytest.fixture
def latent(tiny: TinyModels) -> LatentAttention:
    """A rebuilt layer at half of its rank."""
    weights = tiny.source("llama-gqa").attention(0)
    return factorize(Svd(), weights, whole_keys(weights), None, LayerRanks(0, 8, 8, joint=False)).latent


def read_and_wanted(latent: LatentAttention, tokens: int) -> tuple[Tensor, Tensor]:
    """What the projection reads, and targets that are not in its reach."""
    D, H, V = latent.out_DHV.shape
    generator = torch.Generator().manual_seed(5)
    return torch.randn(tokens, H * V, generator=generator), torch.randn(tokens, D, generator=generator)


def test_refit_is_ridge_regression_towards_the_start(latent: LatentAttention) -> None:
    """The same problem as least squares on the tokens with the damping written as more rows."""
    z_TZ, y_TD = read_and_wanted(latent, 100)
    moments = OutputMoments.of(latent)
    moments.add(z_TZ[:30], y_TD[:30])
    moments.add(z_TZ[30:], y_TD[30:])
    found_DHV = Ridge(ridge=0.03).output(latent, moments).out_DHV
    z_TZ, y_TD = z_TZ.double(), y_TD.double()
    Z = z_TZ.shape[1]
    damping = 0.03 * z_TZ.square().sum(0).mean()
    rows_ZZ = damping.sqrt() * torch.eye(Z, dtype=torch.float64)
    start_DZ = latent.out_DHV.flatten(1).double()
    stacked = torch.linalg.lstsq(torch.cat((z_TZ, rows_ZZ)), torch.cat((y_TD, rows_ZZ @ start_DZ.T))).solution
    assert_close(found_DHV.flatten(1), stacked.T, "fp32 refit")


def test_targets_that_the_start_gives_leave_it_as_it_is(latent: LatentAttention) -> None:
    z_TZ, _ = read_and_wanted(latent, 100)
    start_DZ = latent.out_DHV.flatten(1)
    moments = OutputMoments.of(latent)
    moments.add(z_TZ, z_TZ @ start_DZ.T)
    assert_close(Ridge().output(latent, moments).out_DHV.flatten(1), start_DZ, "fp32 refit")


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(InvalidRecipe, match=r"refit\.ridge is 0"):
        Ridge(ridge=0.0)
    with pytest.raises(InvalidRecipe, match=r"refit\.tokens is -1"):
        Ridge(tokens=-1)


def test_layers_run_apart_give_what_the_model_gives(tiny: TinyModels) -> None:
    source, tokens = tiny.source("llama-gqa"), random_tokens(20, batch=3)
    layers = DecoderLayers(source.model, source.layer_paths, WholeModel())
    hidden_BTD = next(layers.embed([tokens]))
    for index in range(source.spec.num_layers):
        hidden_BTD = layers.run(index, hidden_BTD)
    wanted = source.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    assert torch.equal(source.model.base_model.norm(hidden_BTD), wanted)


def test_a_layer_tells_what_its_attention_reads_and_gives(tiny: TinyModels) -> None:
    source = tiny.source("llama-gqa")
    layers = DecoderLayers(source.model, source.layer_paths, WholeModel())
    hidden_BTD = next(layers.embed([random_tokens(20, batch=2)]))
    path = source.attention_paths[0]
    read_BTD = layers.input_of(0, path, hidden_BTD)
    assert torch.equal(read_BTD, source.model.model.layers[0].input_layernorm(hidden_BTD))
    left_BTD, gave_BTD = layers.run_with_attention(0, path, hidden_BTD)
    assert torch.equal(left_BTD, layers.run(0, hidden_BTD))
    middle_BTD = hidden_BTD + gave_BTD
    layer = source.model.model.layers[0]
    assert_close(left_BTD, middle_BTD + layer.mlp(layer.post_attention_layernorm(middle_BTD)), "fp32 attention")


def test_prefix_at_full_rank_changes_nothing(tiny: TinyModels, tmp_path: Path) -> None:
    """Both streams stay together, so the source's own projection is the best one."""
    source = tiny.source("llama-gqa")
    plan = plan_conversion(source, load_recipe("svd-llm"), 1.0, tiny.calibration("llama-gqa"), dtype=torch.float32)
    prefix = Prefix(source, plan.target, Ridge(tokens=0), tiny.calibration("llama-gqa").windows_BT, tmp_path)
    for index, layer in enumerate(convert_layers(plan)):
        fitted = prefix.fitted(index, layer.latent)
        assert_close(fitted.out_DHV, layer.latent.out_DHV, "fp32 attention")


def test_refit_brings_the_first_layers_residual_stream_nearer(tiny: TinyModels, tmp_path: Path) -> None:
    source = tiny.source("llama-gqa")
    plan = plan_conversion(source, load_recipe("svd-llm"), 0.5, tiny.calibration("llama-gqa"), dtype=torch.float32)
    windows_BT = tiny.calibration("llama-gqa").windows_BT
    start = next(iter(convert_layers(plan))).latent
    fitted = Prefix(source, plan.target, Ridge(tokens=0, ridge=1e-6), windows_BT, tmp_path).fitted(0, start)
    layers = DecoderLayers(source.model, source.layer_paths, WholeModel())
    entering_BTD = next(layers.embed([windows_BT]))
    read_BTD = layers.input_of(0, source.attention_paths[0], entering_BTD)
    _, wanted_BTD = layers.run_with_attention(0, source.attention_paths[0], entering_BTD)

    def lost(latent: LatentAttention) -> float:
        with torch.inference_mode():
            given_BTD, _ = build_layer(latent, plan.target, 0)(read_BTD)
        return float((given_BTD - wanted_BTD).square().sum())

    assert lost(fitted) < 0.9 * lost(start)
