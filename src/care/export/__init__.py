"""Files that other engines read, made from a converted checkpoint."""

from .gguf_file import QUANTIZATIONS, export_gguf

__all__ = ["QUANTIZATIONS", "export_gguf"]
