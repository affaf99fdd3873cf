"""Measuring models: quality, live cache, text."""

from .cache import CacheUse, live_cache
from .generation import generate_text
from .quality import Quality, measure
from .tasks import Row, TaskScore, load_task, log_probabilities, score

__all__ = [
    "CacheUse",
    "Quality",
    "Row",
    "TaskScore",
    "generate_text",
    "live_cache",
    "load_task",
    "log_probabilities",
    "measure",
    "score",
]
