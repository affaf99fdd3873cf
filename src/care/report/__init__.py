"""A conversion on one page: what was made, what it costs and how it compares."""

from .page import render

__all__ = ["render"]
