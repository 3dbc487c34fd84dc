"""Deltas: the rows of a table, or their codes, that differ from an earlier version of the bundle."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import BlockDigester, CheckpointError, Digests, digest_arrays
from jaxembed.checkpoint.safetensors_file import header_of
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.checkpoint.table_form import CODEBOOK, ROWS, Errors, Form
from jaxembed.memory import aligned_empty
from jaxembed.quantized_table import QuantizedTable

IDS = "ids"
#: Above this share of changed rows a table is written whole: it can then be mapped.
MAX_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Change:
    """What differs.

    Attributes:
      ids: int64, of the rows, in order.
      digests: of each array of the whole table, by name.
      errors: of the whole table.
    """

    ids: np.ndarray
    digests: dict[str, Digests]
    errors: Errors


def changed_rows(array: StoredArray, form: Form, base: Any) -> Change | None:
    """The rows whose bytes, as stored, differ from those in the Bundle `base`; None to write the table whole.

    Raises:
      CheckpointError: if either is damaged.
      UnquantizableError: if the table holds NaN, which no code stands for.
    """
    name, num_rows = form.config.name, array.shape[0]
    others = arrays_of(base.tables[name]) if name in base.tables else {}
    if {part: (other.shape, other.dtype) for part, other in others.items()} != form.arrays(num_rows):
        return None
    codebook = None if form.codec is None else form.codec.codebook
    if codebook is not None and codebook.tobytes() != others[CODEBOOK].tobytes():
        return None
    base.verify_table(name)
    digesters = {part: BlockDigester(*shape) for part, shape in form.by_row(num_rows).items()}
    errors, found = Errors(), []
    for start, parts in form.encoded(array, errors):
        differs = False
        for part, rows in parts.items():
            digesters[part].update(rows)
            other = others[part][start : start + rows.shape[0]]
            differs |= (rows.view(np.uint8) != other.view(np.uint8)).any(axis=1)
        found.append(start + np.flatnonzero(differs))
    ids = np.concatenate(found).astype(np.int64)
    if ids.size > MAX_SHARE * num_rows:
        return None
    digests = {part: _whole(digester) for part, digester in digesters.items()}
    if codebook is not None:
        digests[CODEBOOK] = digest_arrays([codebook])[0]
    return Change(ids, digests, errors)


def arrays_of(table: np.ndarray | QuantizedTable) -> dict[str, Any]:
    """What is stored of a table in a bundle, by name."""
    return table.arrays if isinstance(table, QuantizedTable) else {ROWS: table}


def delta_bytes(form: Form, ids: np.ndarray) -> int:
    """Of such a file; 0 without rows, for then there is none."""
    if not ids.size:
        return 0
    size = sum(int(np.prod(shape, dtype=np.int64)) * d.itemsize for shape, d in form.by_row(ids.size).values())
    return len(_header(form, ids)) + ids.nbytes + size


def delta_parts(array: StoredArray, form: Form, ids: np.ndarray) -> Iterator[Any]:
    """The bytes of a file that holds these rows of a table."""
    yield _header(form, ids)
    yield ids.tobytes()
    first, *others = form.by_row(ids.size)
    rest: dict[str, list[bytes]] = {name: [] for name in others}
    for start, parts in form.encoded(array):
        low, high = np.searchsorted(ids, [start, start + next(iter(parts.values())).shape[0]])
        if low < high:
            yield parts[first][ids[low:high] - start].tobytes()
            for name in others:  # of eight bytes a row
                rest[name].append(parts[name][ids[low:high] - start].tobytes())
    for name in others:
        yield from rest[name]


def apply_delta(
    what: str, base: Mapping[str, np.ndarray], delta: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Copies of the arrays of a table with the rows of a delta in them; its codebook is that of `base`.

    Args:
      what: how errors name the delta.
      base: the arrays of the table in the version below, by name.
      delta: the tensors of the file.

    Raises:
      CheckpointError: if the delta is not one of this table.
    """
    ids = delta.get(IDS)
    if ids is None or ids.dtype != np.int64 or ids.ndim != 1:
        raise CheckpointError(f"{what} is no delta of a table: it must hold int64 'ids' and rows or codes.")
    made = dict(base)
    for name, whole in base.items():
        if name == CODEBOOK:
            continue
        rows, shape = delta.get(name), (ids.size, *whole.shape[1:])
        if rows is None or (rows.shape, rows.dtype) != (shape, whole.dtype):
            found = "nothing" if rows is None else f"{rows.dtype.name}{list(rows.shape)}"
            raise CheckpointError(f"{what} must hold {whole.dtype.name}{list(shape)} {name}, got {found}.")
        if ids.size and (ids[0] < 0 or ids[-1] >= whole.shape[0] or (np.diff(ids) <= 0).any()):
            raise CheckpointError(f"{what} is damaged: its ids are not rows of the table in order.")
        made[name] = aligned_empty(whole.shape, whole.dtype)
        made[name][...] = whole
        made[name][ids] = rows
        made[name].flags.writeable = False
    return made


def _header(form: Form, ids: np.ndarray) -> bytes:
    parts = {name: (dtype, shape) for name, (shape, dtype) in form.by_row(ids.size).items()}
    return header_of({IDS: (ids.dtype, ids.shape), **parts})


def _whole(digester: BlockDigester) -> Digests:
    digests = digester.digests()
    assert digests is not None  # all rows were read
    return digests
