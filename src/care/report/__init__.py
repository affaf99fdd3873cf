"""A conversion on one page, and as a model card: what was made, what it costs and how it compares."""

from .card import model_card
from .page import render

__all__ = ["model_card", "render"]
