"""Mistral: Llama's layout; early releases attend within a sliding window."""

from .base import Architecture

MISTRAL = Architecture(model_type="mistral", no_bias_keys=())
