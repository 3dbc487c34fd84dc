"""Which array of a file is which table or slot: as the user says, else guessed, and shown."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxembed.checkpoint.files import read_named
from jaxembed.checkpoint.layout import decode_name, encode_name
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.interface import Options, Place
from jaxembed.serialization import strict_json

TABLES, SLOTS = "tables", "slots"
SHOWN = 40
MAX_KEYS = 64 << 20


def keys_from_json(text: str | bytes) -> dict[str, Place]:
    """The mapping that a user wrote: {"key": "table"} for tables, {"key": ["table", "slot"]} for slots.

    Raises:
      ValueError: if it is no such JSON, or gives two keys one place.
    """
    data = strict_json(text)
    if not isinstance(data, dict):
        raise ValueError(f"keys must be a JSON object, got {type(data).__name__}.")
    keys: dict[str, Place] = {}
    for key, value in data.items():
        place = (value, None) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
        if (
            len(place) != 2
            or not isinstance(place[0], str)
            or not isinstance(place[1], str | None)
            or "" in place
        ):
            raise ValueError(f'keys[{key!r}] must be "table" or ["table", "slot"], got {value!r:.80}.')
        if place in keys.values():
            raise ValueError(f"keys has {show_place(place)} twice.")
        keys[key] = place
    return keys


def keys_in_file(file: str | pathlib.Path) -> dict[str, Place]:
    """As `keys_from_json`, of a file.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: as `keys_from_json`, naming the file, or if it cannot be read.
    """
    content = read_named(file, MAX_KEYS)
    try:
        return keys_from_json(content)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e


def own_key(place: Place) -> str:
    """The name that jaxembed gives an array in a file of named arrays."""
    table, slot = place
    return (
        f"{TABLES}/{encode_name(table)}"
        if slot is None
        else f"{SLOTS}/{encode_name(table)}/{encode_name(slot)}"
    )


def own_place(key: str) -> Place | None:
    """The inverse of `own_key`; None for any other key."""
    kind, *names = key.split("/")
    if kind == TABLES and len(names) == 1 and names[0]:
        return decode_name(names[0]), None
    if kind == SLOTS and len(names) == 2 and all(names):
        return decode_name(names[0]), decode_name(names[1])
    return None


def key_for(options: Options, place: Place) -> str | None:
    """The name that the user gives an array in the file that is written, or None."""
    return next((key for key, given in (options.keys or {}).items() if given == place), None)


def place_arrays(
    where: Any,
    arrays: Mapping[str, StoredArray],
    options: Options,
    guess: Callable[[str, StoredArray], Place | None],
    others: Sequence[str] = (),
) -> tuple[dict[str, StoredArray], dict[str, dict[str, StoredArray]], tuple[str, ...]]:
    """Tables, slots, and notes about what was guessed or left out.

    Args:
      where: the file, for errors.
      arrays: by the names they have in it.
      options: whose `keys` go before any guess.
      guess: the place of an array, None to leave it out.
      others: its arrays of types that no table has, each as "NAME (TYPE)"; they are left out.

    Raises:
      ValueError: if a key is not there, or the arrays cannot be tables and slots.
    """
    if options.keys is None:
        found = {key: place for key, array in arrays.items() if (place := guess(key, array)) is not None}
    else:
        missing = [key for key in options.keys if key not in arrays]
        if missing:
            of_type = {name: kind for name, _, kind in (other.rpartition(" (") for other in others)}
            if missing[0] in of_type:
                raise ValueError(
                    f"{where}: {missing[0]!r} has a type that no table has: {of_type[missing[0]].removesuffix(')')}; leave it "
                    "out of keys."
                )
            raise ValueError(
                f"{where} has no array {missing[0]!r}; it has {_some(sorted(arrays))}. Keys name arrays of the source; to "
                "name those of a target, convert from a checkpoint."
            )
        unnamed = [key for key, place in options.keys.items() if "" in place]
        if unnamed:
            raise ValueError(
                f"keys[{unnamed[0]!r}] must name a table, and a slot if it is one, got an empty name."
            )
        found = dict(options.keys)
    tables: dict[str, StoredArray] = {}
    for key, (table, slot) in found.items():
        if slot is None:
            if table in tables:
                raise ValueError(f"{where}: two arrays are the table {table!r}; say which one with keys.")
            _check_table(where, key, arrays[key])
            tables[table] = arrays[key]
    slots: dict[str, dict[str, StoredArray]] = {}
    for key, (table, slot) in found.items():
        if slot is not None:
            if slot in slots.get(table, {}):
                raise ValueError(
                    f"{where}: two arrays are {show_place((table, slot))}; say which one with keys."
                )
            _check_slot(where, key, arrays[key], (table, slot), tables)
            slots.setdefault(table, {})[slot] = arrays[key]
    if not tables:
        shown = [*(f"{key} {array.dtype.name}{list(array.shape)}" for key, array in arrays.items()), *others]
        raise ValueError(
            f"{where} has no table that jaxembed recognizes; say which array is which table with keys. "
            f"It has {_some(shown)}."
        )
    how = "guessed" if options.keys is None else "as given"
    told = [f"{key} -> {show_place(place)} ({how})" for key, place in found.items() if own_place(key) != place]
    notes = [*told[:SHOWN], *([f"... and {len(told) - SHOWN} more"] if told[SHOWN:] else [])]
    left_out = [key for key in arrays if key not in found]
    if left_out:
        notes.append(f"left out: {_some(left_out)}")
    if others:
        notes.append(f"left out, of types that no table has: {_some(others)}")
    return {name: tables[name] for name in sorted(tables)}, slots, tuple(notes)


def is_table(array: StoredArray) -> bool:
    """Whether an array may be a table: [V, D] floats."""
    return len(array.shape) == 2 and bool(jnp.issubdtype(array.dtype, np.floating)) and min(array.shape) > 0


def _check_table(where: Any, key: str, array: StoredArray) -> None:
    if not is_table(array):
        raise ValueError(
            f"{where}: {key!r} must be floats [rows, dim] to be a table, got {array.dtype.name}{list(array.shape)}."
        )


def _check_slot(
    where: Any, key: str, array: StoredArray, place: tuple[str, str], tables: Mapping[str, StoredArray]
) -> None:
    table = tables.get(place[0])
    if table is None:
        raise ValueError(f"{where}: {key!r} is {show_place(place)}, but there is no such table.")
    if array.shape not in (table.shape, table.shape[:1]) or not jnp.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{where}: {key!r}, {show_place(place)}, must be floats {list(table.shape)} or {list(table.shape[:1])}, "
            f"got {array.dtype.name}{list(array.shape)}."
        )


def show_place(place: Place) -> str:
    """As errors and notes name it."""
    return f"table {place[0]!r}" if place[1] is None else f"slot {place[1]!r} of table {place[0]!r}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
