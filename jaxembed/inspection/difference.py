"""What differs between the tables of two checkpoints, bundles or files."""

import dataclasses
import pathlib

import numpy as np

from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.progress import progress_bar
from jaxembed.inspection.opening import open_any


@dataclasses.dataclass(frozen=True)
class TableDifference:
    """How a table differs.

    Attributes:
      change: "same", "values", "shape", "dtype", "added" or "removed".
      num_rows: rows whose bytes differ; 0 unless `change` is "values".
      max_difference: largest absolute difference of two values.
      slots: slots whose values, shape, type or presence differ, where both sides have slots.
      detail: of another shape or type, both of them.
    """

    change: str
    num_rows: int = 0
    max_difference: float = 0.0
    slots: tuple[str, ...] = ()
    detail: str = ""


def difference(
    a: str | pathlib.Path, b: str | pathlib.Path, *, progress: bool | None = False
) -> dict[str, TableDifference]:
    """How each table of `b` differs from that of `a`.

    Args:
      a: whatever `open_any` opens.
      b: likewise.
      progress: whether to draw a bar; None on a terminal.

    Raises:
      FileNotFoundError: if there is none at a path.
      ValueError: if one is damaged.
    """
    first, second = open_any(a), open_any(b)
    total = first.num_bytes + sum(s.num_bytes for slots in first.slots.values() for s in slots.values())
    result = {}
    with progress_bar(total, progress) as advance:
        for name in sorted(first.tables.keys() | second.tables.keys()):
            found = _compare(first.tables.get(name), second.tables.get(name), advance)
            slots: list[str] = []
            if first.slots and second.slots and found.change not in ("added", "removed"):
                ours, theirs = first.slots.get(name, {}), second.slots.get(name, {})
                slots = [
                    slot
                    for slot in sorted(ours.keys() | theirs.keys())
                    if _compare(ours.get(slot), theirs.get(slot), advance).change != "same"
                ]
            result[name] = dataclasses.replace(found, slots=tuple(slots))
    return result


def _compare(first: StoredArray | None, second: StoredArray | None, advance) -> TableDifference:
    if first is None or second is None:
        return TableDifference("added" if first is None else "removed")
    if first.shape != second.shape:
        return TableDifference("shape", detail=f"{list(first.shape)} to {list(second.shape)}")
    if first.dtype != second.dtype:
        return TableDifference("dtype", detail=f"{first.dtype.name} to {second.dtype.name}")
    num_rows, largest = 0, 0.0
    # Both by the borders of the first, since a block may be cut in two in one of them.
    for start, rows in first.blocks():
        advance(rows.nbytes)
        others = second.read_rows(start, start + rows.shape[0])
        flat, other = (np.ascontiguousarray(x).reshape(x.shape[0], -1) for x in (rows, others))
        differs = (flat.view(np.uint8) != other.view(np.uint8)).any(axis=1)
        if differs.any():
            num_rows += int(differs.sum())
            with np.errstate(invalid="ignore"):
                gap = np.abs(flat[differs].astype(np.float64) - other[differs].astype(np.float64))
            largest = max(largest, float(np.nanmax(gap, initial=0.0)))
    return TableDifference("values" if num_rows else "same", num_rows, largest)
