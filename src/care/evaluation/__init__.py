"""Measuring models: quality, live cache, text."""

from .bits import BitsPerByte, Span, bits_per_byte, common_spans, measure_bits, predicted_bytes
from .cache import CacheUse, live_cache
from .generation import Continuation, continue_prompt, continue_prompts, encode_prompt, has_template, same_tokens
from .quality import Bucket, Quality, measure
from .tasks import Row, TaskScore, load_task, log_probabilities, score

__all__ = [
    "BitsPerByte",
    "Bucket",
    "CacheUse",
    "Continuation",
    "Quality",
    "Row",
    "Span",
    "TaskScore",
    "bits_per_byte",
    "common_spans",
    "continue_prompt",
    "continue_prompts",
    "encode_prompt",
    "has_template",
    "live_cache",
    "load_task",
    "log_probabilities",
    "measure",
    "measure_bits",
    "predicted_bytes",
    "same_tokens",
    "score",
]
