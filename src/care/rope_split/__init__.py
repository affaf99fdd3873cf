"""Rope splits, by the name that a recipe uses. See docs/add-method.md."""

from .base import RopeSplit, Slots, whole_keys
from .keep_all import KeepAll
from .mean_phase import MeanPhase
from .rorope import RoRope

ROPE_SPLITS: dict[str, type[RopeSplit]] = {"keep-all": KeepAll, "rorope": RoRope, "mean-phase": MeanPhase}

__all__ = ["ROPE_SPLITS", "KeepAll", "MeanPhase", "RoRope", "RopeSplit", "Slots", "whole_keys"]
