"""Llama 2, Llama 3.x, SmolLM2 and everything else that ships as `LlamaForCausalLM`."""

from .base import Architecture

LLAMA = Architecture(model_type="llama")
