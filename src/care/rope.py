"""Rotary position embedding: frequency tables, the two layouts, and the rotation itself.

Frequencies follow RoFormer (arXiv 2104.09864): theta_m = base^(-2m/d). Scalings that leave the table fixed
("linear", "llama3") are baked into it; scalings that depend on the running length are refused.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedModel

STATIC_ROPE_TYPES = ("default", "linear", "llama3")


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope settings of a config.json, whether in `rope_parameters` or in the older keys."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    settings.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    settings.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    settings["rope_type"] = settings.get("rope_type") or settings.pop("type", None) or "default"
    return settings


def inverse_frequencies(base: float, rotary_dim: int) -> Tensor:
    """The unscaled table base^(-2m/d), computed in fp32 exactly as transformers does."""
    exponent_F = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    return 1.0 / (base**exponent_F)


def _llama3_scaled(frequencies_F: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's scaling: slow frequencies divided, fast ones kept, a linear blend between."""
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    context = settings["original_max_position_embeddings"]
    wavelength_F = 2 * math.pi / frequencies_F
    smooth_F = (context / wavelength_F - low) / (high - low)
    blended_F = (1 - smooth_F) * frequencies_F / factor + smooth_F * frequencies_F
    scaled_F = torch.where(wavelength_F > context / low, frequencies_F / factor, frequencies_F)
    between_F = (wavelength_F >= context / high) & (wavelength_F <= context / low)
    return torch.where(between_F, blended_F, scaled_F)


def rope_frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Radians per position of each rotary pair of a source head, scaling baked in.

    Raises UnsupportedModel for a scaling whose table is not fixed.
    """
    settings = rope_settings(config)
    kind = settings["rope_type"]
    if kind not in STATIC_ROPE_TYPES:
        raise UnsupportedModel(
            f"rope type {kind!r} changes with the running length; supported: {', '.join(STATIC_ROPE_TYPES)}"
        )
    if settings["partial_rotary_factor"] != 1.0:
        raise UnsupportedModel(
            f"partial_rotary_factor {settings['partial_rotary_factor']}: heads that rotate in part are not supported"
        )
    frequencies_F = inverse_frequencies(float(settings["rope_theta"]), head_dim)
    if kind == "linear":
        frequencies_F = frequencies_F / settings["factor"]
    if kind == "llama3":
        frequencies_F = _llama3_scaled(frequencies_F, settings)
    return tuple(frequencies_F.tolist())


def rotation(positions_T: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency, shape (..., T, F), in the dtype of `frequencies`."""
    angle_TF = positions_T[..., None].to(frequencies.dtype) * frequencies
    return angle_TF.cos(), angle_TF.sin()


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i + 1) of the last dim."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (m, m + d/2) of the last dim, Llama's order in transformers."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def pair_dims(pairs: Tensor, head_dim: int) -> Tensor:
    """Half-split dims of rotary pairs, interleaved: (m, m + d/2) for each pair m, shape (2 * len,)."""
    return torch.stack((pairs, pairs + head_dim // 2), dim=-1).flatten()
