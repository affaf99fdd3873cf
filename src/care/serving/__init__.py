"""Running converted models where people serve models: care's plugin for vLLM, and starting an engine's own server."""
