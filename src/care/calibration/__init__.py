"""Texts, running moments, and their storage."""

from .collection import Collection, Observed, Wanted
from .gradients import Tap
from .layers import DecoderLayers, WholeModel
from .moments import MomentAccumulator
from .store import (
    EXPLANATION,
    Calibration,
    CalibrationInfo,
    finish_calibration,
    is_calibration,
    load_calibration,
    parse_info,
)
from .streams import Stream, batches_of, num_batches, own_windows
from .text import (
    MOST_WINDOWS,
    TEXTS,
    equal_shares,
    first_windows,
    load_text,
    sampled_windows,
    taken_in_turn,
    whole_windows,
)

__all__ = [
    "EXPLANATION",
    "MOST_WINDOWS",
    "TEXTS",
    "Calibration",
    "CalibrationInfo",
    "Collection",
    "DecoderLayers",
    "MomentAccumulator",
    "Observed",
    "Stream",
    "Tap",
    "Wanted",
    "WholeModel",
    "batches_of",
    "equal_shares",
    "finish_calibration",
    "first_windows",
    "is_calibration",
    "load_calibration",
    "load_text",
    "num_batches",
    "own_windows",
    "parse_info",
    "sampled_windows",
    "taken_in_turn",
    "whole_windows",
]
