"""What a plan decides: rotary dims where a recipe leaves them open, and what multiples cost."""

from dataclasses import replace

import pytest
import torch

from care.allocation import Threshold
from care.conversion import convert_layers
from care.errors import InvalidRecipe
from care.factorization import TwoSided, layer_energies
from care.plan import check_request, plan_conversion
from care.recipe import Recipe, load_recipe
from care.rope_split import MeanPhase, whole_keys
from tiny import TinyModels
from tolerances import TOLERANCES, assert_numbers

NAME = "llama-gqa"


def one_per_frequency(dims: int) -> Recipe:
    """The deepseek recipe without a refit, with so many rotary dims; 0 leaves them open."""
    rope = MeanPhase(dims=dims, one_per_frequency=True)
    return replace(load_recipe("best-deepseek"), rope=rope, refit=None)


def lost(tiny: TinyModels, recipe: Recipe, kv_budget: float) -> float:
    """Two-sided loss of a conversion, from the factors that it makes."""
    source, calibration = tiny.source(NAME), tiny.calibration(NAME)
    plan = plan_conversion(source, recipe, kv_budget, calibration, dtype=torch.float32)
    method, total = recipe.factorization, 0.0
    assert isinstance(method, TwoSided)
    for index, layer in enumerate(convert_layers(plan)):
        weights, stats = source.attention(index), calibration.layers[index]
        keys = plan.recipe.rope(weights, stats).split(plan.ranks[index].rope_dim // 2)
        assert keys.rope_loss is not None
        values_EX, E = weights.v_GKX.flatten(0, 1).double(), weights.v_GKX.shape[0] * weights.v_GKX.shape[1]
        felt = torch.block_diag(keys.error_EM, torch.eye(E, dtype=torch.float64))
        a, moment = method.gradient_shrinkage, stats.gradient_moment_EE
        assert moment is not None
        sizes = torch.cat([half.mean().expand(E) for half in moment.diagonal().split(E)])
        output = felt.T @ ((1 - a) * moment + a * sizes.diag()) @ felt
        down, latent = layer.latent.kv_down_RX, layer.latent
        # The latent's own up-projection of the keys' share is not kept; least squares gives it back.
        up_keys = torch.linalg.lstsq(keys.expand_GNM.flatten(0, 1), latent.k_up_GNR.flatten(0, 1)).solution
        error = torch.cat((keys.rest_MX - up_keys @ down, values_EX - latent.v_up_GVR.flatten(0, 1) @ down))
        total += keys.rope_loss + float(torch.trace(output @ error @ method.metric(stats) @ error.T))
    return total


@pytest.mark.parametrize("kv_budget", [0.3, 0.6])
def test_open_rope_dims_become_those_that_lose_least(tiny: TinyModels, kv_budget: float) -> None:
    source = tiny.source(NAME)
    plan = plan_conversion(source, one_per_frequency(0), kv_budget, tiny.calibration(NAME), dtype=torch.float32)
    width = int(kv_budget * source.spec.cache_width)
    assert {ranks.width for ranks in plan.ranks} == {width}
    choices = [2 * n for n in range(1, source.spec.num_pairs + 1) if 2 * n < width]
    losses = {dims: lost(tiny, one_per_frequency(dims), kv_budget) for dims in choices}
    assert len(losses) > 1
    assert isinstance(plan.recipe.rope, MeanPhase)
    assert plan.recipe.rope.dims == min(losses, key=lambda dims: losses[dims])
    assert plan.target.slot_frequencies == source.spec.rope_frequencies[0][: plan.recipe.rope.dims // 2]


def test_open_rope_dims_need_a_joint_latent(tiny: TinyModels) -> None:
    recipe = replace(one_per_frequency(0), factorization=TwoSided(joint=False))
    with pytest.raises(InvalidRecipe, match="needs a joint latent"):
        check_request(tiny.source(NAME), recipe, 0.5)


def test_layers_report_nats_that_add_up_to_the_loss(tiny: TinyModels) -> None:
    """With separate latents there are no cross terms, and the tails of both spectra are what is lost."""
    recipe = replace(load_recipe("best-rebuild"), factorization=TwoSided(joint=False), refit=None)
    recipe = replace(recipe, allocation=load_recipe("care-u").allocation)
    plan = plan_conversion(tiny.source(NAME), recipe, 0.5, tiny.calibration(NAME), dtype=torch.float32)
    for layer in convert_layers(plan):
        assert layer.report.rope_loss is None
        assert layer.report.key_loss is not None
        assert layer.report.value_loss is not None
        assert layer.report.key_loss > 0 < layer.report.value_loss


def test_methods_without_gradients_report_no_nats(tiny: TinyModels) -> None:
    plan = plan_conversion(tiny.source(NAME), load_recipe("care-u"), 0.5, tiny.calibration(NAME))
    assert {layer.report.key_loss for layer in convert_layers(plan)} == {None}


def test_multiples_cost_and_what_they_cost_is_said(tiny: TinyModels) -> None:
    source, calibration = tiny.source(NAME), tiny.calibration(NAME)
    recipe = replace(load_recipe("best-rebuild"), refit=None)
    plain = plan_conversion(source, recipe, 0.5, calibration)
    rounded = plan_conversion(source, replace(recipe, allocation=Threshold(multiple=8)), 0.5, calibration)
    assert plain.rounding_loss is None
    assert rounded.rounding_loss is not None
    assert {ranks.value_rank % 8 for ranks in rounded.ranks} == {0}

    def nats(plan: object) -> float:
        reports = [layer.report for layer in convert_layers(plan)]  # type: ignore[arg-type]
        return sum(r.key_loss + r.value_loss for r in reports)  # type: ignore[operator]

    assert rounded.rounding_loss > TOLERANCES["fp64"].absolute
    assert nats(rounded) > nats(plain)


@pytest.mark.parametrize("kv_budget", [0.1, 0.5])
def test_one_threshold_weighs_separate_keys_against_values(tiny: TinyModels, kv_budget: float) -> None:
    """Of all layers' energies, keys' and values', the largest are kept; every latent keeps its largest in any case."""
    source, calibration = tiny.source(NAME), tiny.calibration(NAME)
    recipe = replace(load_recipe("best-rebuild"), factorization=TwoSided(joint=False), refit=None)
    plan = plan_conversion(source, recipe, kv_budget, calibration, dtype=torch.float32)
    assert all(not ranks.joint and min(ranks.key_rank, ranks.value_rank) >= 1 for ranks in plan.ranks)
    budget = int(kv_budget * source.spec.cache_width * source.spec.num_layers)
    assert sum(ranks.width for ranks in plan.ranks) == budget
    certain, others, kept = 0.0, [], 0.0
    for index, ranks in enumerate(plan.ranks):
        weights, stats = source.attention(index), calibration.layers[index]
        sides = layer_energies(recipe.factorization, weights, whole_keys(weights), stats)
        certain += sum(float(side[0]) for side in sides)
        others += [float(energy) for side in sides for energy in side[1:]]
        kept += sum(float(s[:r].sum()) for s, r in zip(sides, (ranks.key_rank, ranks.value_rank), strict=True))
    best = certain + sum(sorted(others, reverse=True)[: budget - 2 * source.spec.num_layers])
    assert_numbers(kept, best, "fp64")
    assert len(list(convert_layers(plan))) == source.spec.num_layers


def test_separate_latents_are_converted_with_slots_chosen(tiny: TinyModels) -> None:
    source = tiny.source(NAME)
    recipe = replace(load_recipe("best"), factorization=TwoSided(joint=False), refit=None)
    plan = plan_conversion(source, recipe, 0.5, tiny.calibration(NAME), dtype=torch.float32)
    for ranks, layer in zip(plan.ranks, convert_layers(plan), strict=True):
        assert layer.latent.width == ranks.width
        assert (layer.latent.k_rank, layer.latent.v_rank) == (ranks.key_rank, ranks.value_rank)


def test_multiples_need_a_joint_latent(tiny: TinyModels) -> None:
    recipe = replace(load_recipe("best-rebuild"), factorization=TwoSided(joint=False), allocation=Threshold(multiple=8))
    with pytest.raises(InvalidRecipe, match=r"allocation\.multiple needs a joint latent"):
        check_request(tiny.source(NAME), recipe, 0.5)
