"""Output formats, by the name that a recipe uses. See docs/add-format.md."""

from .base import Format
from .deepseek import Deepseek
from .native import Native

FORMATS: dict[str, Format] = {"deepseek": Deepseek(), "native": Native()}

__all__ = ["FORMATS", "Deepseek", "Format", "Native"]
