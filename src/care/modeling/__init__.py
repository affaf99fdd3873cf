"""Running converted models with transformers: attention modules, native classes, loading."""
