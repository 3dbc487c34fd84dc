"""Names that stand for functions and classes of the user's own in configurations that are stored."""

from collections.abc import Iterable
from typing import Any


class UnregisteredError(ValueError):
    """A name for which nothing is registered in this process, or a class that does not take what is stored of it."""


def unregistered(kind: str, name: Any, known: Iterable[str], decorator: str) -> UnregisteredError:
    """The error for a name that is not known.

    Args:
      kind: of what it names.
      name: as stored.
      known: the names that are registered.
      decorator: that registers others.
    """
    return UnregisteredError(
        f"unknown {kind} {name!r}; known: {sorted(known)}. Import the module that registers it with {decorator} "
        "before loading; commands do so with --import MODULE."
    )
