"""Rank allocators, by the name that a recipe uses. See docs/add-allocator.md."""

from .base import Allocator
from .greedy import Greedy
from .uniform import Uniform

ALLOCATORS: dict[str, type[Allocator]] = {"uniform": Uniform, "greedy": Greedy}

__all__ = ["ALLOCATORS", "Allocator", "Greedy", "Uniform"]
