"""What a source's attention computes beside its linear maps: facts and tensors that conversion takes over as they are.

Letters are those of care.types.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


def moved(part: Part, device: torch.device, dtype: torch.dtype) -> Part:
    """A tensor, or a dataclass with all tensors in it, elsewhere or in another dtype; anything else as it is."""
    result: Any = part
    if isinstance(part, Tensor):
        result = part.to(device, dtype)
    elif is_dataclass(part) and not isinstance(part, type):
        result = replace(part, **{f.name: moved(getattr(part, f.name), device, dtype) for f in fields(part)})
    return result


@dataclass(frozen=True)
class QkNorm:
    """The norm on queries and on keys: RMSNorm over so many values, a head's or all heads'.

    The gain is `offset` + weight.
    """

    query_size: int
    key_size: int
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Norm:
    """RMSNorm over blocks of W consecutive values, one head or all of them, with gain `offset` + weight."""

    weight_W: Tensor
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class NormalizedKeys:
    """Keys that are not linear in the input: norm(proj_ED @ x + bias_E), all heads stacked, E = G * K."""

    proj_ED: Tensor
    bias_E: Tensor | None
    norm: Norm


@dataclass(frozen=True)
class Carried:
    """What attention computes beside its linear maps; conversion takes it over as it is.

    `keys` and `constant` say what the features are besides the input. q_bias_HK and then q_norm act on the
    queries before RoPE.
    """

    keys: NormalizedKeys | None = None
    constant: bool = False
    q_bias_HK: Tensor | None = None
    q_norm: Norm | None = None
    out_bias_D: Tensor | None = None
    softcap: float | None = None
    window: int | None = None

    def feature_width(self, hidden_size: int) -> int:
        """How many features an input of that size has: X."""
        return (len(self.keys.proj_ED) if self.keys else 0) + hidden_size + self.constant

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same elsewhere or in another dtype."""
        return moved(self, device, dtype)


PLAIN = Carried()
"""Nothing but linear maps, RoPE and softmax: Llama."""
