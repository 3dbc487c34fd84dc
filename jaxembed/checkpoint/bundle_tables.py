"""Writes one table of a bundle: its rows as they are, rounded, or as codes."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.checkpoint.digests import digest_arrays
from jaxembed.checkpoint.files import write_file
from jaxembed.checkpoint.safetensors_file import header_of, map_tensors, with_padding
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.config import TableConfig
from jaxembed.quantization import ROW_WISE, RowCodec, UnquantizableError, row_codec, simulate_on_host
from jaxembed.quantized_table import QuantizedTable

ROWS, CODES = "rows", "codes"
QUANTIZATIONS = (None, "bfloat16", *ROW_WISE)


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


class _Errors:
    """Of values that are written, summed up by blocks."""

    def __init__(self):
        self.largest, self._total, self._count = 0.0, 0.0, 0

    def add(self, rows: np.ndarray, written: np.ndarray) -> None:
        rows, written = rows.astype(np.float32), written.astype(np.float32)
        with np.errstate(invalid="ignore"):
            gap = np.nan_to_num(np.abs(rows - written), nan=0, posinf=np.inf)  # of infinities that stay such
        self.largest = max(self.largest, float(gap.max(initial=0)))
        self._total += float(gap.sum(dtype=np.float64))
        self._count += gap.size

    @property
    def mean(self) -> float:
        return self._total / max(self._count, 1)


def plan_report(name: str, array: StoredArray, config: TableConfig, quantize: str | None) -> TableReport:
    """What `write_table` would report, without errors of rounding."""
    codec = _codec(config, quantize)
    if codec is None:
        dtype = _dtype(array, config, quantize)
        size = int(np.prod(array.shape, dtype=np.int64)) * dtype.itemsize
        return TableReport(name, array.shape, dtype.name, size, 0.0)
    shapes = QuantizedTable.array_shapes(codec.kind, array.shape[0], config.dim).values()
    size = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in shapes)
    return TableReport(name, array.shape, codec.kind, size, 0.0)


def write_table(
    file: pathlib.Path, name: str, array: StoredArray, config: TableConfig, quantize: str | None
) -> tuple[TableReport, dict[str, Any]]:
    """Writes a whole table by blocks of rows.

    A table with a quantization_config becomes what training looked up: the codes of at most 256 buckets, else
    rows of the values. `quantize` is for the others.

    Returns:
      The report, and the table's entry in the manifest, without the name of the file.

    Raises:
      CheckpointError: if the table is damaged.
      UnquantizableError: if it holds NaN, which no code stands for.
    """
    codec, errors = _codec(config, quantize), _Errors()
    try:
        if codec is not None:
            write_file(file, _code_parts(array, codec, config.dim, errors))
        else:
            write_file(file, _row_parts(array, config, quantize, errors))
    except UnquantizableError as e:
        raise UnquantizableError(f"table {name!r} cannot be quantized: {e}") from None
    plan = plan_report(name, array, config, quantize)
    report = dataclasses.replace(plan, max_error=errors.largest, mean_error=errors.mean)
    if codec is None:
        return report, {"rows": _row_digests(file, array, config, quantize)}
    tensors = map_tensors(file)
    names = list(QuantizedTable.array_shapes(codec.kind, *array.shape))
    digests = [digest.to_json() for digest in digest_arrays([tensors[name] for name in names])]
    parts = dict(zip(names, digests, strict=True))
    return report, {"rows": parts.pop(CODES), "quantized": {"kind": codec.kind, "arrays": parts}}


def keeps_its_rows(config: TableConfig) -> bool:
    """Whether a table is stored with the rows that it was trained with, so that a delta can hold some."""
    return config.quantization_config is None


def _row_parts(array: StoredArray, config: TableConfig, quantize: str | None, errors: _Errors) -> Iterator[Any]:
    dtype = _dtype(array, config, quantize)
    yield header_of({ROWS: (dtype, array.shape)})
    for _, rows in array.blocks():
        written = rows.astype(dtype)
        if config.quantization_config is not None:
            written = simulate_on_host(written, config.quantization_config)
        if written is not rows and (config.quantization_config is not None or dtype != rows.dtype):
            errors.add(rows, written)
        yield np.ascontiguousarray(written).reshape(-1).view(np.uint8).data


def _code_parts(array: StoredArray, codec: RowCodec, dim: int, errors: _Errors) -> Iterator[Any]:
    num_rows = array.shape[0]
    shapes = QuantizedTable.array_shapes(codec.kind, num_rows, dim)
    tensors = with_padding({name: (dtype, shape) for name, (shape, dtype) in shapes.items()})
    yield header_of(tensors)
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in tensors.items() if name != CODES}
    if codec.codebook is not None:
        arrays["codebook"] = codec.codebook
    for start, rows in array.blocks():
        parts = codec.encode(rows.astype(np.float32), start)
        made = QuantizedTable(codec.kind, dim, **parts, codebook=codec.codebook)
        errors.add(rows, made.host_rows(0, rows.shape[0]))
        yield np.ascontiguousarray(parts.pop(CODES)).tobytes()
        for name, part in parts.items():
            arrays[name][start : start + part.shape[0]] = part
    # Codes go first, so all that follows them is at hand by now.
    for name in tensors:
        if name != CODES:
            yield arrays[name].tobytes()


def _row_digests(
    file: pathlib.Path, array: StoredArray, config: TableConfig, quantize: str | None
) -> dict[str, Any]:
    # Rows that stay as they are keep the digests of the trainer, to whom they can be traced back.
    same = keeps_its_rows(config) and _dtype(array, config, quantize) == array.dtype
    if same and array.digests is not None:
        return array.digests.to_json()
    return digest_arrays([map_tensors(file)[ROWS]])[0].to_json()


def _codec(config: TableConfig, quantize: str | None) -> RowCodec | None:
    quantization = config.quantization_config
    if quantization is not None:
        return row_codec(quantization) if quantization.num_buckets <= 256 else None
    return row_codec(quantize) if quantize in ROW_WISE else None


def _dtype(array: StoredArray, config: TableConfig, quantize: str | None) -> np.dtype:
    if config.quantization_config is None and quantize == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return array.dtype
