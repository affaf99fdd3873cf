"""Models of a command: loaded under a spinner, and refused where what is asked needs them to be alike."""

from collections.abc import Mapping
from typing import Any

from ..conversion import DTYPES
from ..errors import BadInput
from ..modeling.loading import Location, load_model
from .console import working


def load_models(locations: Mapping[str, Location], dtype: str | None, device: str) -> dict[str, Any]:
    """Every model by its name, in fp32 unless another type is asked for."""
    with working("loading " + " and ".join(locations)):
        wanted = DTYPES[dtype or "float32"]
        return {name: load_model(at, dtype=wanted, device=device) for name, at in locations.items()}


def refuse_other_tokenizers(tokenizers: Mapping[str, Any], consequence: str) -> None:
    """Tokens can be compared only where all models have the same."""
    refuse_other("tokenizer", {name: t.get_vocab() for name, t in tokenizers.items()}, consequence)


def refuse_other(what: str, found: Mapping[str, object], consequence: str) -> None:
    """BadInput for the first model that is not like the first of all; `consequence`: what fails, and the remedy."""
    (first, expected), *others = found.items()
    for name, value in others:
        if value != expected:
            raise BadInput(f"{name} has another {what} than {first}, so {consequence}")
