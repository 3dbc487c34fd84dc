"""How a table lies in a bundle: its rows, maybe rounded, or codes of them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.checkpoint.stored import StoredArray
from jaxembed.config import TableConfig
from jaxembed.features import feature_tables
from jaxembed.quantization import ROW_WISE, RowCodec, UnquantizableError, row_codec, simulate_on_host
from jaxembed.quantized_table import QuantizedTable

ROWS, CODES, CODEBOOK = "rows", "codes", "codebook"
QUANTIZATIONS = (None, "bfloat16", *ROW_WISE)

#: Shape and type by name.
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


class Errors:
    """Of values that are written, summed up by blocks."""

    def __init__(self):
        self.largest: float = 0.0
        self._total, self._count = 0.0, 0

    def add(self, rows: np.ndarray, written: np.ndarray) -> None:
        """Takes the next rows, and what became of them."""
        rows, written = rows.astype(np.float32), written.astype(np.float32)
        with np.errstate(invalid="ignore"):
            gap = np.nan_to_num(np.abs(rows - written), nan=0, posinf=np.inf)  # of infinities that stay such
        self.largest = max(self.largest, float(gap.max(initial=0)))
        self._total += float(gap.sum(dtype=np.float64))
        self._count += gap.size

    @property
    def mean(self) -> float:
        """Of all values."""
        return self._total / max(self._count, 1)


@dataclasses.dataclass(frozen=True)
class Form:
    """What becomes of the rows of a table.

    Attributes:
      config: of the table.
      dtype: of rows that are stored as rows.
      codec: that makes codes of them, or None.
      is_exact: whether they stay as they are.
    """

    config: TableConfig
    dtype: np.dtype
    codec: RowCodec | None
    is_exact: bool

    @property
    def name(self) -> str:
        """The type of the rows, or the kind of the codes."""
        return self.dtype.name if self.codec is None else self.codec.kind

    def arrays(self, num_rows: int) -> Shapes:
        """All that are stored."""
        if self.codec is None:
            return {ROWS: ((num_rows, self.config.dim), self.dtype)}
        return QuantizedTable.array_shapes(self.codec.kind, num_rows, self.config.dim)

    def by_row(self, num_rows: int) -> Shapes:
        """Those that hold something of each row."""
        return {name: shape for name, shape in self.arrays(num_rows).items() if name != CODEBOOK}

    def num_bytes(self, num_rows: int) -> int:
        """Of all that are stored."""
        return sum(
            int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            for shape, dtype in self.arrays(num_rows).values()
        )

    def encoded(
        self, array: StoredArray, errors: Errors | None = None
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(first row, what is stored of the rows, by the names of `by_row`) in order.

        Raises:
          CheckpointError: if the table is damaged.
          UnquantizableError: if it holds NaN, which no code stands for.
        """
        for start, rows in array.blocks():
            try:
                with np.errstate(over="ignore"):
                    parts, written = self._encode(start, rows)
                if not self.is_exact:
                    _refuse_overflow(start, rows, written)
            except UnquantizableError as e:
                raise UnquantizableError(f"table {self.config.name!r} cannot be quantized: {e}") from None
            if errors is not None and not self.is_exact:
                errors.add(rows, written)
            yield start, {name: np.ascontiguousarray(part) for name, part in parts.items()}

    def _encode(self, start: int, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        if self.codec is not None:
            parts = self.codec.encode(rows.astype(np.float32), start)
            made = QuantizedTable(self.codec.kind, self.config.dim, **parts, codebook=self.codec.codebook)
            return parts, made.host_rows(0, rows.shape[0])
        written = rows.astype(self.dtype, copy=False)
        if self.config.quantization_config is not None:
            written = simulate_on_host(written, self.config.quantization_config)
        return {ROWS: written}, written


def _refuse_overflow(start: int, rows: np.ndarray, written: np.ndarray) -> None:
    lost = ~np.isfinite(written.astype(np.float32)) & np.isfinite(rows.astype(np.float32))
    if lost.any():
        row, column = np.argwhere(lost)[0]
        raise UnquantizableError(
            f"it holds {rows[row, column]} at row {start + row}, column {column}, which would become infinite; leave it "
            "unquantized."
        )


def form_of(array: StoredArray, config: TableConfig, quantize: str | None) -> Form:
    """The form of a table: with a quantization_config what training looked up, that is the codes of at most 256 buckets, else
    rows of the values; `quantize` is for the others."""
    quantization = config.quantization_config
    if quantization is not None:
        codec = row_codec(quantization) if quantization.num_buckets <= 256 else None
        return Form(config, array.dtype, codec, False)
    if quantize in ROW_WISE:
        return Form(config, array.dtype, row_codec(quantize), False)
    dtype = np.dtype(ml_dtypes.bfloat16) if quantize == "bfloat16" else array.dtype
    return Form(config, dtype, None, dtype == array.dtype)


def forms_of(
    tables: Mapping[str, StoredArray],
    configs: Mapping[str, TableConfig],
    quantize: str | None,
    base: Any = None,
) -> dict[str, Form]:
    """The form of each table. In a delta of the Bundle `base` it is the one that the table has there; a table that is
    not there takes the one that all others have, if it is one.

    Raises:
      ValueError: if `quantize` asks for another form than a table has in `base`.
    """
    if base is None:
        return {name: form_of(array, configs[name], quantize) for name, array in tables.items()}
    there = _quantized_after_training(base)
    common = set(there.values())
    rest = quantize or (common.pop() if len(common) == 1 else None)
    forms = {}
    for name, array in tables.items():
        forms[name] = form_of(array, configs[name], quantize or there.get(name, rest))
        found = base.tables[name] if name in there else None
        if quantize is None or found is None or configs[name].quantization_config is not None:
            continue
        kind = found.kind if isinstance(found, QuantizedTable) else found.dtype.name
        if kind != forms[name].name:
            raise ValueError(
                f"version {base.directory.name} holds table {name!r} as {kind}, and a delta of it cannot hold it as "
                f"{forms[name].name}: leave quantize (--quantize) out to keep {kind}, or delta_from (--delta-from) to write a "
                "whole version."
            )
    return forms


def _quantized_after_training(base: Any) -> dict[str, str | None]:
    """The `quantize` that each table without a quantization_config was written with."""
    found: dict[str, str | None] = {}
    for name, config in feature_tables(base.feature_config).items():
        table = base.tables[name]
        if config.quantization_config is None:
            is_same = not isinstance(table, QuantizedTable) and table.dtype == config.dtype
            found[name] = None if is_same else getattr(table, "kind", table.dtype.name)
    return found
