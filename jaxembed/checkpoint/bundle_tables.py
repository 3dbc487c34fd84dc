"""Writes one table of a bundle: whole, or the rows that changed."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxembed.checkpoint.delta import Change, changed_rows, delta_bytes, delta_parts
from jaxembed.checkpoint.digests import digest_arrays
from jaxembed.checkpoint.files import write_file
from jaxembed.checkpoint.safetensors_file import header_of, map_tensors, with_padding
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.checkpoint.table_form import CODEBOOK, CODES, ROWS, Errors, Form


@dataclasses.dataclass(frozen=True)
class TableReport:
    """What became of one table.

    Attributes:
      name: of the table.
      shape: [V, D].
      dtype: as stored in the bundle; for codes the kind of the QuantizedTable.
      num_bytes: of it there.
      max_error: largest absolute difference to the checkpoint's values.
      num_changed: rows that a delta holds; None where the table was written whole.
      mean_error: mean absolute difference to the checkpoint's values.
      digest: of the whole table as it is served, however it is stored; None in a dry run.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    max_error: float
    num_changed: int | None = None
    mean_error: float = 0.0
    digest: str | None = None


def plan_table(array: StoredArray, form: Form, base: Any) -> TableReport:
    """What `write_table` would report, without digests and errors of rounding; of a delta the table is read."""
    change = None if base is None else changed_rows(array, form, base)
    size = form.num_bytes(array.shape[0]) if change is None else delta_bytes(form, change.ids)
    count = None if change is None else int(change.ids.size)
    return TableReport(form.config.name, array.shape, form.name, size, 0.0, count)


def write_table(
    folder: pathlib.Path, file: str, array: StoredArray, form: Form, base: Any
) -> tuple[TableReport, dict[str, Any]]:
    """Writes a table by blocks of rows.

    Args:
      folder: of the bundle.
      file: in it, to be written.
      array: to be read.
      form: that it takes.
      base: the Bundle that this one is a delta of, or None.

    Returns:
      The report, and the table's entry in the manifest.

    Raises:
      CheckpointError: if the table is damaged, or that of `base`.
      UnquantizableError: if it holds NaN, which no code stands for.
    """
    plan = TableReport(form.config.name, array.shape, form.name, form.num_bytes(array.shape[0]), 0.0)
    change = None if base is None else changed_rows(array, form, base)
    if base is not None:
        array = StoredArray(array.what, array.source, array.digests)  # whoever watches has seen it read
    if change is not None:
        return _write_delta(folder, file, array, form, change, plan)
    errors = Errors()
    write_file(folder / file, _whole_parts(array, form, errors))
    report = dataclasses.replace(plan, max_error=errors.largest, mean_error=errors.mean)
    if form.codec is None and form.is_exact and array.digests is not None:
        # Rows that stay as they are keep the digests of the trainer, to whom they can be traced back.
        return report, {"file": file, **_entry(form, {ROWS: array.digests.to_json()})}
    tensors, names = map_tensors(folder / file), list(form.arrays(array.shape[0]))
    digests = [digest.to_json() for digest in digest_arrays([tensors[name] for name in names])]
    return report, {"file": file, **_entry(form, dict(zip(names, digests, strict=True)))}


def _write_delta(
    folder: pathlib.Path, file: str, array: StoredArray, form: Form, change: Change, plan: TableReport
) -> tuple[TableReport, dict[str, Any]]:
    digests = {name: digest.to_json() for name, digest in change.digests.items()}
    if form.is_exact and array.digests is not None:
        digests[ROWS] = array.digests.to_json()
    if change.ids.size:
        write_file(folder / file, delta_parts(array, form, change.ids))
    report = dataclasses.replace(
        plan,
        num_bytes=(folder / file).stat().st_size if change.ids.size else 0,
        num_changed=int(change.ids.size),
        max_error=change.errors.largest,
        mean_error=change.errors.mean,
    )
    return report, {"file": None, "delta": file if change.ids.size else None, **_entry(form, digests)}


def _entry(form: Form, digests: dict[str, Any]) -> dict[str, Any]:
    if form.codec is None:
        return {"rows": digests[ROWS]}
    return {"rows": digests.pop(CODES), "quantized": {"kind": form.codec.kind, "arrays": digests}}


def _whole_parts(array: StoredArray, form: Form, errors: Errors) -> Iterator[Any]:
    """The bytes of a file that holds a table."""
    shapes = form.arrays(array.shape[0])
    tensors = with_padding({name: (dtype, shape) for name, (shape, dtype) in shapes.items()})
    yield header_of(tensors)
    first, *others = tensors
    arrays = {name: np.zeros(tensors[name][1], tensors[name][0]) for name in others}
    if form.codec is not None and form.codec.codebook is not None:
        arrays[CODEBOOK] = form.codec.codebook
    for start, parts in form.encoded(array, errors):
        yield parts.pop(first).reshape(-1).view(np.uint8).data
        for name, part in parts.items():
            arrays[name][start : start + part.shape[0]] = part
    # Rows or codes go first, so all that follows them is at hand by now.
    for name in others:
        yield arrays[name].tobytes()
