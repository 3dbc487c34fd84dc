"""Optimizers by name, and their exact round trip through JSON-able dicts."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from jaxembed.names import unregistered
from jaxembed.optimizers.base import Optimizer
from jaxembed.optimizers.custom import CustomOptimizer
from jaxembed.optimizers.rules import RULES
from jaxembed.optimizers.schedules import CosineDecay, ExponentialDecay, PolynomialDecay
from jaxembed.stored_arguments import check_json, comes_back, fields_as_json, object_from_json

T = TypeVar("T")

_OPTIMIZERS: dict[str, Any] = {c.name: c for c in (*RULES, CustomOptimizer)}
_SCHEDULES: dict[str, Any] = {c.name: c for c in (PolynomialDecay, CosineDecay, ExponentialDecay)}
_FUNCTIONS: dict[str, Any] = {}


def optimizer_to_dict(optimizer: Optimizer) -> dict[str, Any]:
    """`Optimizer.to_dict`."""
    if _OPTIMIZERS.get(optimizer.name) is not type(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} cannot be stored: it has no registered name; register it with "
            "jaxembed.optimizers.register_optimizer."
        )
    fields = {
        field.name: getattr(optimizer, field.name) for field in dataclasses.fields(optimizer) if field.init
    }
    arguments = {name: _to_json(value, f"{optimizer.name}.{name}") for name, value in fields.items()}
    what = f"the optimizer {type(optimizer).__name__}"
    return {"name": optimizer.name, "arguments": check_json(arguments, what)}


def storable_arguments(optimizer: Optimizer) -> dict[str, Any]:
    """Those arguments of `Optimizer.to_dict` that can be stored, where others cannot."""
    found: dict[str, Any] = {}
    for field in filter(lambda field: field.init, dataclasses.fields(optimizer)):
        where = f"{optimizer.name}.{field.name}"
        with contextlib.suppress(ValueError):
            found |= check_json({field.name: _to_json(getattr(optimizer, field.name), where)}, where)
    return found


def optimizer_from_dict(data: dict[str, Any]) -> Optimizer:
    """The optimizer that `Optimizer.to_dict` described.

    Raises:
      UnregisteredError: if it names an unregistered class or function, or a class that does not take its arguments.
    """
    arguments = {name: _from_json(value) for name, value in data["arguments"].items()}
    return object_from_json(optimizer_class(data["name"]), "optimizer", arguments)


def optimizer_class(name: str) -> type[Optimizer]:
    """The registered optimizer of that name.

    Raises:
      UnregisteredError: if there is none.
    """
    return _find(_OPTIMIZERS, name, "optimizer")


def register_optimizer(cls: type[T]) -> type[T]:
    """Class decorator: makes a frozen dataclass, a subclass of Optimizer with a `name`, storable.

    Raises:
      ValueError: if it is no such class, or the name is taken by another class.
    """
    if not issubclass(cls, Optimizer):
        raise ValueError(f"{cls!r} must be a subclass of jaxembed.optimizers.Optimizer.")
    return _register_class(_OPTIMIZERS, cls, "optimizer")


def register_schedule(cls: type[T]) -> type[T]:
    """Class decorator: makes a frozen dataclass with a `name`, called with the step, storable.

    Raises:
      ValueError: if it is no such class, or the name is taken by another class.
    """
    return _register_class(_SCHEDULES, cls, "schedule")


def register_function(name: str) -> Callable[[T], T]:
    """Decorator: makes a function storable, as a `custom_computation`, learning rate or hyperparameter.

    Raises:
      ValueError: if the name is taken by another function.
    """

    def register(function: T) -> T:
        return _register(_FUNCTIONS, name, function, "function")

    return register


def _to_json(value: Any, where: str) -> Any:
    if type(value) is tuple:
        return [_to_json(item, where) for item in value]
    for name, cls in _SCHEDULES.items():
        if type(value) is cls:
            return {
                "schedule": name,
                "arguments": fields_as_json(value, f"{where}: the schedule {cls.__name__}"),
            }
    if not callable(value):
        if not comes_back(value):
            raise ValueError(
                f"{where} cannot be stored: it is {value!r:.200}; let it be a finite number, str, bool, None, a schedule "
                "or function that is registered, or a tuple of these."
            )
        return value
    for name, function in _FUNCTIONS.items():
        if function is value:
            return {"function": name}
    raise ValueError(
        f"{where} cannot be stored: {value!r} has no registered name; pass a float, a schedule of "
        "jaxembed.optimizers.schedules or your own under register_schedule, or a function under "
        "register_function."
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if isinstance(value, dict) and value.keys() == {"function"}:
        return _find(_FUNCTIONS, value["function"], "function")
    if isinstance(value, dict) and value.keys() == {"schedule", "arguments"}:
        schedule = _find(_SCHEDULES, value["schedule"], "schedule")
        return object_from_json(schedule, "schedule", value["arguments"])
    return value  # any other dict is refused with its field's name


def _find(registry: dict[str, Any], name: str, kind: str) -> Any:
    if name not in registry:
        raise unregistered(kind, name, registry, f"jaxembed.optimizers.register_{kind}")
    return registry[name]


def _register_class(registry: dict[str, Any], cls: Any, kind: str) -> Any:
    name = cls.__dict__.get("name")
    if not isinstance(name, str) or not dataclasses.is_dataclass(cls):
        raise ValueError(f"{cls!r} must be a frozen dataclass with a class attribute `name` of its own.")
    return _register(registry, name, cls, kind)


def _register(registry: dict[str, Any], name: str, value: Any, kind: str) -> Any:
    if registry.setdefault(name, value) is not value:
        raise ValueError(f"{kind} name {name!r} is taken by {registry[name]!r}; choose another.")
    return value
