"""The arguments of initializers, optimizers and schedules as JSON, and the objects that a class makes of them again."""

import dataclasses
import enum
import json
from typing import Any

from jaxembed.names import UnregisteredError


def check_json(arguments: dict[str, Any], what: str) -> dict[str, Any]:
    """The arguments, as they are.

    Raises:
      ValueError: if one is no value that JSON has; `what` says whose they are.
    """
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"{what} cannot be stored: {arguments!r:.200} are not all JSON ({e}); let the fields of the class be finite "
            "numbers, str, bool, None or tuples of these."
        ) from None
    return arguments


def fields_as_json(instance: Any, what: str) -> dict[str, Any]:
    """The fields of a dataclass, as `check_json` takes them.

    Raises:
      ValueError: if one is another dataclass, a list, a dict, a named tuple or an enum's, which would come back as something
        else, or no JSON.
    """
    fields = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.init}
    for name, value in fields.items():
        if not comes_back(value):
            raise ValueError(
                f"{what} cannot be stored: its field {name!r} is {value!r:.200}; let it be a finite number, str, bool, None "
                "or a tuple of these."
            )
    return check_json(fields, what)


def comes_back(value: Any) -> bool:
    """Whether what is read again is no other kind of value, as tuples are of lists."""
    if type(value) is tuple:
        return all(map(comes_back, value))
    return not isinstance(value, list | dict | tuple | enum.Enum) and not dataclasses.is_dataclass(value)


def object_from_json(cls: Any, kind: str, arguments: dict[str, Any]) -> Any:
    """`cls` called with arguments that were stored, of which lists were tuples.

    Raises:
      UnregisteredError: if it does not take them, or one holds a dict, as which earlier versions stored nested dataclasses.
    """
    arguments = {name: _as_tuples(value) for name, value in arguments.items()}
    for name, value in arguments.items():
        if _holds_dict(value):
            raise UnregisteredError(
                f"{kind} {cls.name!r} cannot be read: its field {name!r} is stored as {value!r:.200}, which no field comes "
                f"back from; let the fields of {cls.__module__}.{cls.__qualname__} be finite numbers, str, bool, None or "
                "tuples of these."
            )
    try:
        return cls(**arguments)
    except Exception as e:  # whatever a class of the user's own raises
        raise UnregisteredError(
            f"{kind} {cls.name!r} cannot be read: {cls.__module__}.{cls.__qualname__} does not take the arguments that "
            f"are stored, {arguments!r:.200} ({type(e).__name__}: {e}); let the class take them."
        ) from e


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _holds_dict(value: Any) -> bool:
    return any(map(_holds_dict, value)) if isinstance(value, tuple) else isinstance(value, dict)
