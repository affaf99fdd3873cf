"""How long work reports itself: a wrapper around an iterable that the caller chooses."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Track(Protocol):
    """Wrap `items` so that a person sees `label`, how many of `total` are done, and when it ends."""

    def __call__(self, items: Iterable[Item], *, label: str, total: int) -> Iterable[Item]:
        """Yield every item, reporting as it goes."""
        ...


def silent(items: Iterable[Item], *, label: str, total: int) -> Iterable[Item]:
    """Report nothing: the default of every library function."""
    del label, total
    return items
