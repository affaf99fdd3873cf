"""Measuring models: quality, live cache, text."""

from .cache import CacheUse, live_cache
from .generation import generate_text
from .quality import Quality, measure

__all__ = ["CacheUse", "Quality", "generate_text", "live_cache", "measure"]
