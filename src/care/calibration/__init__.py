"""Texts, running moments, and their storage."""

from .distances import collect_distances
from .gradients import Tap, collect_gradients
from .layers import DecoderLayers
from .moments import MomentAccumulator, collect_moments
from .store import Calibration, CalibrationInfo, is_calibration, load_calibration, save_calibration
from .text import TEXTS, first_windows, load_text, sampled_windows

__all__ = [
    "TEXTS",
    "Calibration",
    "CalibrationInfo",
    "DecoderLayers",
    "MomentAccumulator",
    "Tap",
    "collect_distances",
    "collect_gradients",
    "collect_moments",
    "first_windows",
    "is_calibration",
    "load_calibration",
    "load_text",
    "sampled_windows",
    "save_calibration",
]
