"""Figures of a table, summed up block by block: what they take does not grow with the vocabulary."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.digests import BlockDigester
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.config import QuantizationConfig
from jaxembed.inspection.neighbours import NearestRows, Neighbour, sample_rows
from jaxembed.quantization import (
    ROW_WISE,
    QuantizationError,
    UnquantizableError,
    row_codec,
    simulate_on_host,
)
from jaxembed.quantized_table import QuantizedTable

#: Norms fall into bins by the first bits of their float32, half a percent wide each.
_SHIFT = 15
#: Rows whose digests are kept; of larger tables a share of the digests, chosen by value.
MAX_DIGESTS = 1 << 24
#: Equal rows of a block of which there are so many, and 1/1024 of its rows, are a large group.
_LARGE_GROUP = 16
#: Large groups that are counted by themselves; beyond, the sample tells.
_MOST_LARGE = 1 << 14
#: Shown of a form that cannot hold some of the rows.
NOT_QUANTIZABLE = "not quantizable"


@dataclasses.dataclass(frozen=True, eq=False)
class TableStats:
    """Figures of a table's rows.

    Attributes:
      norms: least, median (to half a percent) and greatest Euclidean norm of a row of finite values.
      num_dead: rows that are all zeros.
      num_bad: rows that hold NaN or infinity.
      num_duplicates: rows, not dead, that equal an earlier one. Of tables above 16 million rows it is estimated from a
        sample, which may miss groups of few equal rows; groups that are large within a block are counted from there on.
      quantization: errors to expect of rows of finite values stored as "bfloat16", "int8" or "int4", and of the codes
        of the table's own QuantizationConfig, "as trained". Absent where the rows are stored so already, None
        where the table cannot be: one that holds NaN has no codes, one with infinity none row by row.
      norm_counts: (lower edges, upper edges, number of rows) of the bins of a histogram of norms.
      neighbours: of some rows, the most similar others.
      digest: of the rows as they were read, by `layout.table_digest`; None of codes.
    """

    norms: tuple[float, float, float]
    num_dead: int
    num_bad: int
    num_duplicates: int
    quantization: dict[str, QuantizationError | None]
    norm_counts: tuple[np.ndarray, np.ndarray, np.ndarray]
    neighbours: dict[int, list[Neighbour]]
    digest: str | None


def table_stats(
    array: StoredArray,
    *,
    quantization_config: QuantizationConfig | None = None,
    num_samples: int = 0,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> TableStats:
    """Figures of a table, read by blocks of rows.

    Args:
      array: [V, D].
      quantization_config: of the table.
      num_samples: of how many rows, drawn at random, to find the most similar ones.
      advance: called with the number of bytes that were read.

    Raises:
      CheckpointError: if it is damaged.
    """
    norms, duplicates = _Norms(), _Duplicates(array.shape[0])
    errors = _errors(array, quantization_config)
    nearest = NearestRows(sample_rows(array, num_samples))
    digester, num_dead, num_bad = BlockDigester(array.shape, array.dtype), 0, 0
    for start, rows in array.blocks():
        digester.update(rows)
        values = rows.astype(np.float32)
        finite, alive = np.isfinite(values).all(axis=1), values.any(axis=1)
        num_dead += int((~alive).sum())
        num_bad += int((~finite).sum())
        norms.add(values[finite])
        duplicates.add(rows[alive])
        for error in errors.values():
            error.add(values, finite)
        nearest.add(start, values, np.logical_and(finite, alive))
        advance(rows.nbytes)
    digests = digester.digests()
    return TableStats(
        norms.spread(),
        num_dead,
        num_bad,
        duplicates.count(),
        {name: error.result() for name, error in errors.items()},
        norms.histogram(),
        nearest.found(),
        layout.table_digest(digests.to_json()) if digests and array.form == array.dtype.name else None,
    )


def array_digest(array: StoredArray, advance: Callable[[int], Any] = lambda num_bytes: None) -> str:
    """Of its rows as they are read, by `layout.table_digest`.

    Args:
      array: to be read.
      advance: called with the number of bytes that were read.

    Raises:
      CheckpointError: if it is damaged.
    """
    digester = BlockDigester(array.shape, array.dtype)
    for _, rows in array.blocks():
        digester.update(rows)
        advance(rows.nbytes)
    digests = digester.digests()
    assert digests is not None  # all rows were read
    return layout.table_digest(digests.to_json())


class _Norms:
    def __init__(self):
        self._counts = np.zeros((0x7F800000 >> _SHIFT) + 1, np.int64)
        self._least, self._greatest = np.inf, 0.0

    def add(self, values: np.ndarray) -> None:
        if not values.size:
            return
        norms = np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))
        self._least, self._greatest = min(self._least, norms.min()), max(self._greatest, norms.max())
        bits = np.minimum(norms, np.finfo(np.float32).max).astype(np.float32).view(np.uint32)
        self._counts += np.bincount(bits >> _SHIFT, minlength=self._counts.size)

    def spread(self) -> tuple[float, float, float]:
        if not self._counts.any():
            return 0.0, 0.0, 0.0
        middle = np.searchsorted(np.cumsum(self._counts), self._counts.sum() / 2)
        median = float(
            np.clip(_edge(middle) + (_edge(middle + 1) - _edge(middle)) / 2, self._least, self._greatest)
        )
        return float(self._least), median, float(self._greatest)

    def histogram(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        used = np.flatnonzero(self._counts)
        return _edge(used), _edge(used + 1), self._counts[used]


def _edge(index: Any) -> Any:
    """The least float32 of a bin of norms; past the last bin, the greatest that is finite."""
    edges = (np.asarray(index, np.uint32) << _SHIFT).view(np.float32)
    return np.minimum(edges, np.finfo(np.float32).max).astype(np.float64)


class _Duplicates:
    """Counts digests of rows that are there more than once."""

    def __init__(self, num_rows: int):
        # Of digests that are evenly spread, those below a bound are a fair share.
        self._share = min(1.0, MAX_DIGESTS / max(num_rows, 1))
        # Digests that differ, and how many rows have each.
        self._kept = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_new, self._num_rows = 0, 0
        # In a sample, a group of many rows would be missed whole, or taken for many: these are counted by themselves.
        self._large = np.zeros(0, np.uint64)
        self._rng = np.random.default_rng(0)
        self._factors: np.ndarray | None = None

    def add(self, rows: np.ndarray) -> None:
        if not rows.size:
            return
        self._num_rows += rows.shape[0]
        digests, counts = np.unique(self._digests(rows), return_counts=True)
        if self._share < 1:
            large = counts >= max(_LARGE_GROUP, rows.shape[0] >> 10)
            if self._large.size < _MOST_LARGE:
                self._large = np.union1d(self._large, digests[large])
            kept = (digests < np.uint64(int(self._share * 2**64))) | np.isin(digests, self._large)
            digests, counts = digests[kept], counts[kept]
        self._new.append((digests, counts))
        self._num_new += digests.size
        if self._num_new > max(self._kept[0].size, 1 << 20):
            self._merge()

    def count(self) -> int:
        self._merge()
        digests, counts = self._kept
        if self._share == 1:
            return self._num_rows - digests.size
        is_large = np.isin(digests, self._large)
        exact, sampled = (int((counts[part] - 1).sum()) for part in (is_large, ~is_large))
        return min(exact + round(sampled / self._share), self._num_rows - digests.size)

    def _merge(self) -> None:
        digests, counts = (np.concatenate(parts) for parts in zip(self._kept, *self._new, strict=True))
        order = np.argsort(digests)
        digests, counts = digests[order], counts[order]
        starts = np.flatnonzero(np.diff(digests, prepend=~digests[:1]))
        self._kept = digests[starts], np.add.reduceat(counts, starts) if starts.size else counts
        self._new, self._num_new = [], 0

    def _digests(self, rows: np.ndarray) -> np.ndarray:
        """Two strongly universal hashes of the 32-bit words of each row, in one uint64."""
        octets = np.ascontiguousarray(rows).view(np.uint8).reshape(rows.shape[0], -1)
        missing = -octets.shape[1] % 4
        words = (
            (np.pad(octets, ((0, 0), (0, missing))) if missing else octets).view(np.uint32).astype(np.uint64)
        )
        if self._factors is None:
            self._factors = self._rng.integers(0, 2**64, (2, words.shape[1] + 1), np.uint64)
        with np.errstate(over="ignore"):
            high, low = (words @ f[1:] + f[0] for f in self._factors)
        return (high & np.uint64(0xFFFFFFFF00000000)) | (low >> np.uint64(32))


class _Error:
    def __init__(self, change: Callable[[np.ndarray], np.ndarray]):
        self._change, self._largest, self._total, self._count = change, 0.0, 0.0, 0
        self._is_possible = True

    def add(self, values: np.ndarray, finite: Any) -> None:
        """Counts the finite rows of `values`; others must have a place in this form, too."""
        changed = self._changed(values, finite)
        if changed is None or not finite.any():
            return
        gap = np.abs(values[finite] - changed)
        self._largest = max(self._largest, float(gap.max()))
        self._total += float(gap.sum(dtype=np.float64))
        self._count += gap.size

    def result(self) -> QuantizationError | None:
        if not self._is_possible:
            return None
        return QuantizationError(self._largest, self._total / max(self._count, 1))

    def _changed(self, values: np.ndarray, finite: Any) -> np.ndarray | None:
        """The finite rows; None once some values have no place in this form."""
        if self._is_possible:
            with contextlib.suppress(UnquantizableError), np.errstate(over="ignore"):
                changed = self._change(values)[finite]
                if np.isfinite(changed).all():
                    return changed
            self._is_possible = False
        return None


def _errors(array: StoredArray, config: QuantizationConfig | None) -> dict[str, _Error]:
    if array.form != array.dtype.name:  # codes already
        return {}

    def coded(how: str | QuantizationConfig) -> Callable[[np.ndarray], np.ndarray]:
        codec = row_codec(how)

        def change(values):
            arrays = codec.encode(values)
            table = QuantizedTable(codec.kind, values.shape[1], **arrays, codebook=codec.codebook)
            return table.host_rows(0, values.shape[0])

        return change

    errors: dict[str, _Error] = {}
    if config is not None:
        # More buckets are no codes, but rows of the values that training looked up.
        is_coded = config.num_buckets <= 256
        errors["as trained"] = _Error(
            coded(config)
            if is_coded
            else lambda values: simulate_on_host(values.astype(array.dtype), config).astype(np.float32)
        )
    if array.dtype.itemsize > 2:
        errors["bfloat16"] = _Error(lambda values: values.astype(ml_dtypes.bfloat16).astype(np.float32))
    return {**errors, **{how: _Error(coded(how)) for how in ROW_WISE}}
