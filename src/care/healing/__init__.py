"""Healing: a short distillation that gives a converted model its source's accuracy back."""

from .curve import plot_curve
from .journal import HeldOut, Step
from .objective import Objective
from .request import HealingRequest
from .run import heal

__all__ = ["HealingRequest", "HeldOut", "Objective", "Step", "heal", "plot_curve"]
