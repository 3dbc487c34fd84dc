"""What the lookup benchmark measures: the grid of cells, their tables and their batches of ids.

Every table value is a small integer times a power of two and every weight a sixteenth, so float32 sums
are exact in any order and a right peer agrees to the last bit. The same numbers are exact in bfloat16,
in float16, and in int8 codes with a float16 scale and bias per row.
"""

import dataclasses
import itertools
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxembed.memory import aligned_empty
from jaxembed.quantized_table import fused

DTYPES = ("float32", "bfloat16", "int8")
FULL_GRID = {
    "vocabulary": (100_000, 2_000_000),
    "dim": (8, 32, 64, 128, 256),
    "batch": (1, 32, 512, 4096),
    "valency": (1, 8, 50),
    "weighted": (False, True),
    "ids": ("uniform", "zipf"),
    "dtype": DTYPES,
}
QUICK_GRID = FULL_GRID | {"dim": (32, 128), "batch": (1, 512, 4096), "valency": (8,), "weighted": (False,)}

_PERIOD = 99_991  # prime; rows repeat only so far apart that no off-by-one can hide
_POOL = 4_194_304
_ZIPF_EXPONENT = 1.05


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid: bags of `valency` ids in the mean, `batch` bags, summed.

    Args:
      ids: "uniform", or "zipf" (probability of the r-th most frequent row ~ r^-1.05, rows scattered).
    """

    dtype: str
    vocabulary: int
    dim: int
    batch: int
    valency: int
    weighted: bool
    ids: str

    @property
    def num_ids(self) -> int:
        """N."""
        return self.batch * self.valency

    def __str__(self) -> str:
        return (
            f"{self.dtype} V={self.vocabulary:,} D={self.dim} B={self.batch} valency={self.valency} "
            f"{self.ids}{' weighted' if self.weighted else ''}"
        )


class Batch(NamedTuple):
    """Ragged ids [N], row splits [B + 1] and weights [N] (or None), on the host."""

    ids: np.ndarray
    splits: np.ndarray
    weights: np.ndarray | None

    @property
    def rows(self) -> np.ndarray:
        """[N] the bag of each id."""
        return np.repeat(np.arange(self.splits.size - 1), np.diff(self.splits))


class Table(NamedTuple):
    """Rows [V, D]; for int8, codes with row = code * scale + bias, scale and bias [V] float32.

    `fused` are these codes with scale and bias behind each row, as jaxembed and torch take them: uint8 [V, D + 8].
    """

    dtype: str
    rows: np.ndarray
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    fused: np.ndarray | None = None


def grid(axes: dict) -> list[Cell]:
    """All cells of the axes, those of one table next to each other."""
    names = [field.name for field in dataclasses.fields(Cell)]
    return [Cell(*point) for point in itertools.product(*(axes[name] for name in names))]


def make_table(dtype: str, vocabulary: int, dim: int, seed: int = 0) -> Table:
    """A touched table on huge pages where the system has them, aligned for zero-copy use."""
    rng = np.random.default_rng(seed)
    period = min(vocabulary, _PERIOD)
    codes = rng.integers(0, 256, (period, dim), np.uint8)
    codes[:, 0], codes[:, 1] = 0, 255  # so that quantizing by minimum and maximum finds these codes, too
    scale = np.where(np.arange(period) % 2, 2.0**-8, 2.0**-7).astype(np.float32)
    if dtype == "int8":
        repeats = -(-vocabulary // period)
        scales = np.tile(scale, repeats)[:vocabulary]
        rows = _tile(codes, vocabulary)
        return Table(dtype, rows, scales, -128 * scales, fused(rows, scales, -128 * scales))
    values = (codes.astype(np.float32) - 128) * scale[:, None]
    return Table(dtype, _tile(values.astype(numpy_type(dtype)), vocabulary))


def numpy_type(dtype: str) -> np.dtype:
    """The numpy type of the rows of a table."""
    return np.dtype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.uint8}[dtype])


class Ids:
    """A pool of ids over one vocabulary, from which every cell takes its own stretch."""

    def __init__(self, vocabulary: int, kind: str, seed: int = 1):
        rng = np.random.default_rng(seed)
        if kind == "uniform":
            self._pool = rng.integers(0, vocabulary, _POOL, np.int32)
        else:
            mass = np.cumsum(np.arange(1, vocabulary + 1, dtype=np.float64) ** -_ZIPF_EXPONENT)
            ranks = np.searchsorted(mass, rng.random(_POOL) * mass[-1])
            self._pool = rng.permutation(vocabulary).astype(np.int32)[np.minimum(ranks, vocabulary - 1)]
        self._next = 0

    def take(self, count: int) -> np.ndarray:
        """The next [count] ids."""
        at = (self._next + np.arange(count)) % _POOL
        self._next = int(at[-1]) + 1
        return self._pool[at]


def make_sets(cell: Cell, ids: Ids, sets: int, lookups: int, seed: int = 2) -> list[list[Batch]]:
    """`sets` lists of `lookups` different batches each."""
    rng = np.random.default_rng(seed)
    return [[_batch(cell, ids, rng) for _ in range(lookups)] for _ in range(sets)]


def _batch(cell: Cell, ids: Ids, rng: np.random.Generator) -> Batch:
    """Bag lengths uniform in [0, 2 valency], moved to N ids in all."""
    lengths = rng.integers(0, 2 * cell.valency + 1, cell.batch)
    surplus = int(lengths.sum()) - cell.num_ids
    while surplus:
        movable = np.flatnonzero(lengths) if surplus > 0 else np.arange(cell.batch)
        chosen = rng.permutation(movable)[: abs(surplus)]
        lengths[chosen] -= np.sign(surplus)
        surplus -= int(np.sign(surplus)) * chosen.size
    splits = np.zeros(cell.batch + 1, np.int32)
    np.cumsum(lengths, out=splits[1:])
    weights = rng.integers(1, 32, cell.num_ids).astype(np.float32) / 16 if cell.weighted else None
    return Batch(ids.take(cell.num_ids), splits, weights)


def _tile(block: np.ndarray, vocabulary: int) -> np.ndarray:
    rows = aligned_empty((vocabulary, block.shape[1]), block.dtype)
    for start in range(0, vocabulary, block.shape[0]):
        rows[start : start + block.shape[0]] = block[: vocabulary - start]
    return rows
