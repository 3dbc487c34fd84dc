"""Opens one table of a bundle: a file of all of it, or the version below with the rows that changed."""

import pathlib
import re
from typing import Any

import numpy as np

from jaxembed.checkpoint.delta import apply_delta, arrays_of
from jaxembed.checkpoint.digests import CheckpointError, Digests
from jaxembed.checkpoint.safetensors_file import map_tensors
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.checkpoint.table_form import CODES, ROWS
from jaxembed.config import TableConfig
from jaxembed.quantized_table import QuantizedTable


def open_table(
    directory: pathlib.Path, name: str, entry: dict[str, Any], config: TableConfig, base: Any
) -> tuple[np.ndarray | QuantizedTable, dict[str, StoredArray]]:
    """A table, and its arrays by name with what they must be.

    Args:
      directory: of the bundle.
      name: of the table.
      entry: the table's, in the manifest.
      config: of the table.
      base: the Bundle that this one is a delta of, or None.

    Raises:
      CheckpointError: if it is damaged, or `base` is not what it is a delta of.
    """
    what, quantized = f"bundle {directory}: table {name!r}", entry.get("quantized")
    stored = {ROWS: entry["rows"]} if quantized is None else {CODES: entry["rows"], **quantized["arrays"]}
    wanted = {} if quantized is None else QuantizedTable.array_shapes(quantized["kind"], *_shape(config))
    digests: dict[str, Digests] = {}
    for part in wanted or [ROWS]:
        where = f"{what}, {part}" if wanted else what
        found = digests[part] = Digests.from_json(stored[part], where)
        if not wanted and found.shape != _shape(config):
            raise CheckpointError(f"{where} must be {list(_shape(config))}, got {list(found.shape)}.")
        if wanted and (found.shape, found.dtype) != (wanted[part][0], wanted[part][1].name):
            raise CheckpointError(
                f"{where} must be {wanted[part][1].name}{list(wanted[part][0])}, got {found.dtype}{list(found.shape)}."
            )
    arrays, what = _arrays(directory, what, name, entry, base)
    parts = {
        part: fitting(f"{what}, {part}" if wanted else what, arrays.get(part), found)
        for part, found in digests.items()
    }
    if quantized is None:
        return parts[ROWS].source, parts
    sources = {part: array.source for part, array in parts.items()}
    return QuantizedTable(quantized["kind"], config.dim, **sources, dtype=config.dtype), parts


def _arrays(
    directory: pathlib.Path, what: str, name: str, entry: dict[str, Any], base: Any
) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a table by name, and how errors name it, with the file to replace."""
    file, tensors = entry["file"] or entry.get("delta"), {}
    if file is not None:
        place = directory / _file(what, file)
        what = f"bundle {place}: table {name!r}"
        tensors = map_part(what, place)
        if entry["file"] is not None:
            return tensors, what
    if base is None:
        raise CheckpointError(f"{what} has no file, and the bundle is not a delta.")
    below = base.tables.get(name)
    kind, found = (entry.get("quantized") or {}).get("kind"), getattr(below, "kind", None)
    if below is None or kind != found:
        reason = "has no such table" if below is None else f"stores {f'{found} codes' if found else 'rows'}"
        raise CheckpointError(f"{what} has no file with all of it, and the version below {reason}.")
    if file is None:
        return arrays_of(below), next(iter(base.parts[name].values())).what.removesuffix(f", {CODES}")
    return apply_delta(what, arrays_of(below), tensors), what


def map_part(what: str, file: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file.

    Raises:
      CheckpointError: as `map_tensors`, naming `what` too.
    """
    try:
        return map_tensors(file)
    except CheckpointError as e:
        raise CheckpointError(f"{what}: {e}") from e


def fitting(what: str, array: Any, digests: Digests) -> StoredArray:
    """An array with its digests.

    Raises:
      CheckpointError: if it is not of their shape and type.
    """
    found = "nothing" if array is None else f"{array.dtype.name}{list(array.shape)}"
    if found != f"{digests.dtype}{list(digests.shape)}":
        raise CheckpointError(
            f"{what} is damaged: saved as {digests.dtype}{list(digests.shape)}, the file has {found}."
        )
    return StoredArray(what, array, digests)


def _shape(config: TableConfig) -> tuple[int, int]:
    return config.vocabulary_size, config.dim


def _file(what: str, file: str) -> str:
    if not re.fullmatch(r"tables/\d+\.safetensors", file):
        raise CheckpointError(f"{what} lies in {file!r:.80}, which is not a file of a bundle.")
    return file
