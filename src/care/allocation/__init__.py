"""Rank allocators, by the name that a recipe uses. See docs/add-allocator.md."""

from .base import Allocator
from .greedy import Greedy
from .threshold import Threshold, predicted_loss
from .uniform import Uniform

ALLOCATORS: dict[str, type[Allocator]] = {"uniform": Uniform, "greedy": Greedy, "threshold": Threshold}

__all__ = ["ALLOCATORS", "Allocator", "Greedy", "Threshold", "Uniform", "predicted_loss"]
