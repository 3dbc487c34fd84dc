"""Reads the configuration of a job from TOML or JSON, with overrides from the command line."""

import dataclasses
import json
import pathlib
import tomllib
import typing
from collections.abc import Sequence
from typing import Any

import pydantic

from .config import JobConfig


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The job that a file describes.

    Args:
      path: a `.toml` or `.json` file.
      overrides: "a.b=c": the value c of key b of table a, in TOML's notation; what is none is text.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming every key that is wrong, its value and what is allowed.
    """
    path = pathlib.Path(path)
    values = _read(path)
    for override in overrides:
        _override(values, override)
    try:
        # As JSON, so that arrays become tuples while types stay strict: "8" is no number, nor is true.
        return pydantic.TypeAdapter(JobConfig).validate_json(json.dumps(values, default=str))
    except pydantic.ValidationError as e:
        lines = [f"  {_line(error)}" for error in e.errors()]
        raise ValueError(f"{path} is not a training configuration:\n" + "\n".join(lines)) from None


def _read(path: pathlib.Path) -> dict[str, Any]:
    parse = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix)
    if parse is None:
        raise ValueError(f"a configuration must be a .toml or .json file, got {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no configuration file at {path.absolute()}; examples/ in the source tree has some to start from."
        )
    try:
        values = parse(path.read_text("utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not {path.suffix[1:].upper()}: {e}.") from e
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}.")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"--set must be of the form a.b=c, got {override!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text.strip() in ("none", "null") else text
    for name in names[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {name!r} is a value, not a table; name an entry of a table.")
    values[names[-1]] = value


def _line(error: Any) -> str:
    """One error: key, what is allowed, and the value."""
    where = [str(part) for part in error["loc"]]
    allowed = error["msg"].removeprefix("Value error, ").rstrip(".")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys(where[:-1])
        allowed = f"there is no such key; those are {', '.join(known)}" if known else "there is no such key"
    if error["type"] in ("missing", "missing_argument"):
        return f"{'.'.join(where)}: must be given."
    allowed = allowed.replace("Input should be", "must be")
    return f"{'.'.join(where)}: {allowed}, got {_short(error['input'])}."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _keys(where: Sequence[str]) -> list[str]:
    """The keys of the configuration at this place; empty where it is free."""
    found: Any = JobConfig
    for name in where:
        options = {field.name: field.type for field in dataclasses.fields(found)}
        if name in options:
            classes = _classes(typing.get_type_hints(found)[name])
        else:  # below a choice by kind, pydantic names the kind
            continue
        kind = where[where.index(name) + 1] if where.index(name) + 1 < len(where) else None
        matching = [c for c in classes if getattr(c, "kind", None) == kind] or classes
        if not matching:
            return []
        found = matching[0]
    return [field.name for field in dataclasses.fields(found)]


def _classes(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [c for argument in typing.get_args(hint) for c in _classes(argument)]
