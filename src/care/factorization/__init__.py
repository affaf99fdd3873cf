"""Factorization methods, by the name that a recipe uses. See docs/add-method.md."""

from .asvd import Asvd
from .base import Factorizer, Factors, Lost, Problem, Solved, factorize, layer_energies
from .svd import Svd
from .two_sided import TwoSided
from .whitened import Whitened

FACTORIZERS: dict[str, type[Factorizer]] = {"svd": Svd, "asvd": Asvd, "whitened": Whitened, "two-sided": TwoSided}

__all__ = [
    "FACTORIZERS",
    "Asvd",
    "Factorizer",
    "Factors",
    "Lost",
    "Problem",
    "Solved",
    "Svd",
    "TwoSided",
    "Whitened",
    "factorize",
    "layer_energies",
]
