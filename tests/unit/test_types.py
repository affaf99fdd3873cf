"""The waist types refuse shapes that do not fit, and count what is cached."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from care.types import AttentionSpec, DecoupledRope, LayerRanks, LayerStats, block_identity
from tiny import LayerSize, random_inputs, random_layer, stats_of

SIZE = LayerSize(H=4, G=2, K=6, D=20)


@pytest.mark.parametrize("field", ["k_GKX", "v_GKX", "out_DHK"])
def test_weights_of_another_shape_are_refused(field: str) -> None:
    weights = random_layer(SIZE)
    with pytest.raises(ValueError, match=field):
        replace(weights, **{field: getattr(weights, field)[..., :-1]})


def test_heads_that_do_not_divide_are_refused() -> None:
    weights = random_layer(SIZE)
    with pytest.raises(ValueError, match="4 query heads do not divide into 3"):
        replace(weights, k_GKX=torch.zeros(3, 6, 20), v_GKX=torch.zeros(3, 6, 20))


def test_a_table_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rope frequencies for a head dim of 6"):
        replace(random_layer(SIZE), rope_frequencies=(1.0, 0.5))
    with pytest.raises(ValueError, match="1 frequencies for 4 rotary dims"):
        DecoupledRope(torch.zeros(2, 4, 6), torch.zeros(2, 6, 6), torch.zeros(4, 20), (1.0,))


def test_stats_of_another_size_are_refused() -> None:
    stats = stats_of(random_inputs(5, 8))
    with pytest.raises(ValueError, match="input_moment_XX"):
        LayerStats(5, stats.input_moment_XX[:7], stats.input_magnitude_X)


def test_types_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        random_layer(SIZE).scale = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_spec_counts() -> None:
    spec = AttentionSpec(3, 20, 4, 2, 6, ((1.0, 0.5, 0.1),) * 3, 6**-0.5)
    assert (spec.kv_width, spec.cache_width, spec.num_pairs) == (12, 24, 3)


def test_ranks_count() -> None:
    separate, joint = LayerRanks(8, 3, 5, joint=False), LayerRanks(8, 5, 5, joint=True)
    assert (separate.latent_rank, separate.width) == (8, 16)
    assert (joint.latent_rank, joint.width) == (5, 13)


def test_block_identity_selects_blocks() -> None:
    x = torch.arange(6, dtype=torch.float64)
    assert (block_identity(3, 2) @ x).tolist() == [[0, 1], [2, 3], [4, 5]]
