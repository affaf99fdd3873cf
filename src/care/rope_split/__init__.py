"""Rope splits, by the name that a recipe uses. See docs/add-method.md."""

from .base import RopeSplit, whole_keys
from .keep_all import KeepAll
from .rorope import RoRope

ROPE_SPLITS: dict[str, type[RopeSplit]] = {"keep-all": KeepAll, "rorope": RoRope}

__all__ = ["ROPE_SPLITS", "KeepAll", "RoRope", "RopeSplit", "whole_keys"]
