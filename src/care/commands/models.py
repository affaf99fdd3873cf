"""Models of a command, loaded under a spinner."""

from collections.abc import Mapping
from typing import Any

from ..conversion import DTYPES
from ..modeling.loading import Location, load_model
from .console import working


def load_models(locations: Mapping[str, Location], dtype: str | None, device: str) -> dict[str, Any]:
    """Every model by its name, in fp32 unless another type is asked for."""
    with working("loading " + " and ".join(locations)):
        wanted = DTYPES[dtype or "float32"]
        return {name: load_model(at, dtype=wanted, device=device) for name, at in locations.items()}
