"""Decode attention over latents: the Triton kernel, its reference, and how latents are quantized."""

from .cached import Cached
from .quantization import QUANTIZERS, Quantizer
from .reference import reference_decode

__all__ = ["QUANTIZERS", "Cached", "Quantizer", "reference_decode"]
