"""Optimizers that this process cannot make: kept as they are stored.

Whoever serves, converts or inspects has no use for them, and need not have the modules that define them.
"""

import dataclasses
import json
from typing import Any, ClassVar, Never

from jaxembed.names import UnregisteredError
from jaxembed.optimizers.base import Optimizer


@dataclasses.dataclass(frozen=True, repr=False)
class UnregisteredOptimizer(Optimizer):
    """An optimizer that can be stored again, and not be trained with.

    Args:
      stored: JSON of what `Optimizer.to_dict` gave.
      reason: why: it is not registered, or its class does not take the arguments.
    """

    name: ClassVar[str] = "unregistered"
    stored: str = ""
    reason: str = dataclasses.field(default="", compare=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.stored})"

    @property
    def is_elementwise(self) -> Never:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Raises:
        UnregisteredError: always: nobody knows.
        """
        raise UnregisteredError(self.reason)

    @property
    def slot_initial_values(self) -> Never:
        """Raises:
        UnregisteredError: always, as all that trains asks for it.
        """
        raise UnregisteredError(self.reason)

    def to_dict(self) -> dict[str, Any]:
        """As it was stored."""
        return json.loads(self.stored)
