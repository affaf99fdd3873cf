"""What a conversion will do, decided before it is done: every error that a user can cause is raised here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .allocation import Threshold, Uniform, predicted_loss
from .calibration import Calibration
from .errors import InvalidRecipe
from .factorization import Svd, layer_energies
from .folding import FoldingSearch, choose_folding
from .formats import FORMATS
from .progress import Track, silent
from .ranks import all_items, from_main, own_items
from .recipe import Recipe
from .rope_split import KeepAll, MeanPhase, RopeSplit, RoRope, whole_keys
from .source import Source
from .types import AttentionWeights, KeySplit, LayerRanks, LayerStats, Target

PARITY = 1.0
"""The budget at which an absorbed layer can keep every rotation and every value."""

ROUNDING = 1e-6
"""Added before a budget is cut to whole values, so that 0.7 * 10 is 7."""

DIMS_TRIED = 16
"""How many numbers of rotary dims are weighed against one another where there is one slot per frequency."""


@dataclass(frozen=True)
class Plan:
    """A conversion in which nothing is left to decide.

    `recipe` has its folding chosen and, at parity, its rope split replaced; `calibration` is None for a
    method that looks at weights only. `rounding_loss` is what an allocation in multiples is predicted to cost, in
    nats a token, beside the one in single values.
    """

    source: Source
    recipe: Recipe
    kv_budget: float
    target: Target
    ranks: tuple[LayerRanks, ...]
    calibration: Calibration | None
    folding: FoldingSearch | None
    rounding_loss: float | None = None

    def stats(self, index: int) -> LayerStats | None:
        """Statistics of a layer, where there are any."""
        return None if self.calibration is None else self.calibration.layers[index]

    @property
    def mean_width(self) -> float:
        """Values cached per token and layer, on average."""
        return sum(r.width for r in self.ranks) / len(self.ranks)


def check_request(source: Source, recipe: Recipe, kv_budget: float, dtype: torch.dtype | None = None) -> Target:
    """Refuse, before any work, what the budget, the recipe and the format cannot do together."""
    if not 0 < kv_budget <= 1:
        raise InvalidRecipe(f"kv budget {kv_budget} must lie in (0, 1]: it is the kept share of the source's cache")
    spec = source.spec
    recipe = at_budget(recipe, kv_budget)
    absorbed = recipe.mode == "absorbed"
    num_slots = recipe.rope.num_slots(spec) if absorbed else 0
    target = Target(
        config=source.config, spec=spec, mode=recipe.mode,
        slot_frequencies=recipe.rope.frequencies(spec) if absorbed else spec.shared_frequencies,
        deepseek_body=source.architecture.deepseek_body, dtype=dtype or source.dtype,
    )  # fmt: skip
    layout = FORMATS[recipe.format]
    layout.check(target)
    if layout.one_width and recipe.allocation.uses_spectra:
        raise InvalidRecipe(f"format {recipe.format} stores one width for all layers; use --format native")
    chooses = isinstance(recipe.allocation, Threshold)
    if isinstance(recipe.allocation, Threshold) and recipe.allocation.multiple > 1 and not recipe.factorization.joint:
        raise InvalidRecipe("allocation.multiple needs a joint latent; set factorization.joint = true")
    finds_dims = absorbed and needs_dims(recipe.rope)
    if num_slots is None and not (chooses or finds_dims):
        raise InvalidRecipe("rope.dims = 0 leaves the slots to the allocator; use allocation threshold, or set dims")
    if finds_dims and not recipe.factorization.joint:
        raise InvalidRecipe("rope.dims = 0 needs a joint latent; set factorization.joint = true, or dims")
    rope_dim = 2 * (num_slots or int(finds_dims))
    smallest = rope_dim + (1 if recipe.factorization.joint else 2)
    if not (absorbed and kv_budget == PARITY) and int(kv_budget * spec.cache_width) < smallest:
        raise InvalidRecipe(
            f"kv budget {kv_budget} leaves {kv_budget * spec.cache_width:.1f} values a layer; recipe {recipe.name} "
            f"needs at least {smallest} ({rope_dim} rotary); raise --kv-budget above {smallest / spec.cache_width:.3f}"
        )
    return target


def at_budget(recipe: Recipe, kv_budget: float) -> Recipe:
    """The recipe as it is carried out.

    At the full budget every rotary pair fits beside the whole value latent, so nothing is given up. Then no
    metric matters, hence plain SVD: parity needs no calibration.
    """
    if recipe.mode != "absorbed" or kv_budget != PARITY:
        return recipe
    return replace(recipe, rope=KeepAll(), factorization=Svd(joint=True), allocation=Uniform(), refit=None)


def plan_conversion(
    source: Source,
    recipe: Recipe,
    kv_budget: float,
    calibration: Calibration | None,
    *,
    dtype: torch.dtype | None = None,
    folding: FoldingSearch | None = None,
    track: Track = silent,
) -> Plan:
    """Decide everything: the folding (unless an earlier search is given), then each layer's ranks.

    Raises InvalidRecipe, BadInput or UnsupportedModel for whatever cannot be done.
    """
    target = check_request(source, recipe, kv_budget, dtype)
    recipe = at_budget(recipe, kv_budget)
    missing = recipe.needs - (frozenset[str]() if calibration is None else calibration.provides)
    if missing:
        raise InvalidRecipe(
            f"recipe {recipe.name} needs calibration of {', '.join(sorted(missing))}; "
            "give --calibration a text, or calibrate again for this recipe"
        )
    split = recipe.rope
    if recipe.mode == "absorbed" and isinstance(split, RoRope) and split.folding == "auto" and calibration:
        folding = folding or from_main(lambda: choose_folding(source, split, calibration, track=track))
        recipe = replace(recipe, rope=replace(split, folding=folding.best))
    else:
        folding = None
    plan = Plan(source, recipe, kv_budget, target, (), calibration, folding)
    if recipe.mode == "absorbed" and needs_dims(recipe.rope):
        plan = _with_best_dims(plan, track)
    return _allocated(plan, track)


def needs_dims(split: RopeSplit) -> bool:
    """Whether a split has one slot per frequency and leaves open how many."""
    return isinstance(split, MeanPhase) and split.one_per_frequency and not split.dims


def _with_best_dims(plan: Plan, track: Track) -> Plan:
    """The number of fastest frequencies, one slot each in every layer, at which all layers together lose least."""
    spec, split = plan.target.spec, plan.recipe.rope
    assert isinstance(split, MeanPhase)
    width = int(plan.kv_budget * spec.cache_width + ROUNDING)
    step = max(spec.num_pairs // DIMS_TRIED, 1)
    counts = [n for n in range(step, spec.num_pairs + 1, step) if 2 * n < width] or [1]
    losses: list[dict[int, float]] = []
    layers = own_items(range(spec.num_layers))
    for index in track(layers, label="weighing rope dims", total=len(layers)):
        weights, stats = plan.source.attention(index), plan.stats(index)
        slots = replace(split, dims=2 * spec.num_pairs)(weights, stats)
        losses.append({})
        for n in counts:
            keys = slots.split(n)
            assert keys.rope_loss is not None
            tail = layer_energies(plan.recipe.factorization, weights, keys, stats)[0][width - 2 * n :]
            losses[-1][n] = keys.rope_loss + float(tail.sum())
    losses = all_items(losses)
    best = min(counts, key=lambda n: sum(lost[n] for lost in losses))
    recipe = replace(plan.recipe, rope=replace(split, dims=2 * best))
    return replace(plan, recipe=recipe, target=check_request(plan.source, recipe, plan.kv_budget, plan.target.dtype))


def split_keys(plan: Plan, weights: AttentionWeights, stats: LayerStats | None, num_slots: int) -> KeySplit:
    """A layer's keys, split as the plan's mode and recipe say."""
    return _splitter(plan, weights, stats)(num_slots)


def _splitter(plan: Plan, weights: AttentionWeights, stats: LayerStats | None) -> Callable[[int], KeySplit]:
    """The split of a layer's keys for any number of slots."""
    if plan.target.mode == "rebuild":
        whole = whole_keys(weights)
        return lambda _: whole
    return plan.recipe.rope(weights, stats).split


def _allocated(plan: Plan, track: Track) -> Plan:
    """Spread the budget over layers; separate latents get half each, as far as they can use it."""
    spec, absorbed = plan.target.spec, plan.target.mode == "absorbed"
    budget = int(plan.kv_budget * spec.cache_width * spec.num_layers + ROUNDING)
    num_slots = plan.recipe.rope.num_slots(spec) if absorbed else 0
    if isinstance(plan.recipe.allocation, Threshold):
        open_counts = plan.recipe.allocation.slot_counts(spec.kv_width // 2)
        return _choose_slots(plan, open_counts if num_slots is None else [num_slots], budget, track)
    assert num_slots is not None, "refused by check_request"
    if FORMATS[plan.recipe.format].one_width:
        budget -= budget % spec.num_layers
    budget -= 2 * num_slots * spec.num_layers
    spectra = _spectra(plan, num_slots, track) if plan.recipe.allocation.uses_spectra else []
    allocate = _joint_ranks if plan.recipe.factorization.joint else _separate_ranks
    return replace(plan, ranks=allocate(plan, spectra, 2 * num_slots, budget))


Spectra = Sequence[Sequence[torch.Tensor]]


def _joint_ranks(plan: Plan, spectra: Spectra, rope_dim: int, budget: int) -> tuple[LayerRanks, ...]:
    spec = plan.target.spec
    num_keys = spec.kv_width - rope_dim
    ranks = _side(plan, spectra, 0, min(num_keys + spec.kv_width, spec.feature_width), budget)
    return tuple(LayerRanks(rope_dim, r if num_keys else 0, r, joint=True) for r in ranks)


def _separate_ranks(plan: Plan, spectra: Spectra, rope_dim: int, budget: int) -> tuple[LayerRanks, ...]:
    spec, L = plan.target.spec, plan.target.spec.num_layers
    key_cap, value_cap = min(spec.kv_width - rope_dim, spec.feature_width), min(spec.kv_width, spec.feature_width)
    half = budget // 2
    if FORMATS[plan.recipe.format].one_width:
        half -= half % L
    for_keys = min(max(half, budget - value_cap * L), key_cap * L)
    key_ranks = _side(plan, spectra, 0, key_cap, for_keys)
    value_ranks = _side(plan, spectra, 1, value_cap, budget - for_keys)
    return tuple(LayerRanks(rope_dim, k, v, joint=False) for k, v in zip(key_ranks, value_ranks, strict=True))


def _side(plan: Plan, spectra: Spectra, side: int, cap: int, budget: int) -> tuple[int, ...]:
    """Ranks of one latent in every layer; a budget beyond the cap stays unspent."""
    L = plan.target.spec.num_layers
    return plan.recipe.allocation([layer[side] for layer in spectra], [cap] * L, min(budget, cap * L))


def _spectra(plan: Plan, num_slots: int, track: Track) -> list[tuple[torch.Tensor, ...]]:
    spectra: list[tuple[torch.Tensor, ...]] = []
    layers = own_items(range(plan.target.spec.num_layers))
    for index in track(layers, label="reading spectra", total=len(layers)):
        weights, stats = plan.source.attention(index), plan.stats(index)
        sides = layer_energies(plan.recipe.factorization, weights, split_keys(plan, weights, stats, num_slots), stats)
        spectra.append(sides)
    return all_items(spectra)


def _choose_slots(plan: Plan, counts: Sequence[int], budget: int, track: Track) -> Plan:
    """Numbers of rope slots out of `counts`, and joint ranks, of all layers against one another."""
    allocation, spec = plan.recipe.allocation, plan.target.spec
    assert isinstance(allocation, Threshold)
    joint = plan.recipe.factorization.joint
    choices: list[dict[int, tuple[float, torch.Tensor]]] = []
    owners: list[dict[int, torch.Tensor]] = []
    layers = own_items(range(spec.num_layers))
    for index in track(layers, label="weighing slots", total=len(layers)):
        weights, stats = plan.source.attention(index), plan.stats(index)
        split = _splitter(plan, weights, stats)
        choices.append({})
        owners.append({})
        for n in counts:
            keys = split(n)
            energy_S, owners[-1][n] = _merged(layer_energies(plan.recipe.factorization, weights, keys, stats))
            choices[-1][n] = (keys.rope_loss or 0.0, energy_S)
    choices, owners = all_items(choices), all_items(owners)
    chosen = allocation.choose(choices, budget, least=1 if joint else 2)
    num_pairs = spec.kv_width // 2
    if joint:
        ranks = tuple(LayerRanks(2 * n, rank if n < num_pairs else 0, rank, joint=True) for n, rank in chosen)
    else:
        of_keys = [int((owner[n][:rank] == 0).sum()) for owner, (n, rank) in zip(owners, chosen, strict=True)]
        ranks = tuple(LayerRanks(2 * n, k, rank - k, joint=False) for k, (n, rank) in zip(of_keys, chosen, strict=True))
    if allocation.multiple == 1:
        return replace(plan, ranks=ranks)
    unrounded = replace(allocation, multiple=1).choose(choices, budget)
    rounding = predicted_loss(choices, chosen) - predicted_loss(choices, unrounded)
    return replace(plan, ranks=ranks, rounding_loss=rounding / 2)


def _merged(sides: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies of all latents of a layer in one order, and of which latent each is.

    The largest of each latent comes first, whatever its size, and counts as large as any: every latent gets a value.
    """
    energy_S = torch.cat(list(sides))
    owner_S = torch.cat([torch.full((len(side),), index) for index, side in enumerate(sides)])
    leading = [int((owner_S < index).sum()) for index, side in enumerate(sides) if len(side)]
    energy_S[leading] = energy_S.max()
    order = energy_S.argsort(descending=True, stable=True)
    return energy_S[order], owner_S[order]
