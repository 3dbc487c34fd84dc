"""Sparse ids in coordinate form, as `tf.sparse.SparseTensor`."""

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.export
import numpy as np
from numpy.typing import DTypeLike

from jaxembed.inputs.ids import check_unmasked, is_host, narrow_ids
from jaxembed.shapes import AnyIndices, AnyPadded, AnyValues


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class SparseTensor:
    """Ids (or weights) at coordinates of a dense array, as a pytree with a static `dense_shape`.

    Entries whose row `indices[:, 0]` equals `dense_shape[0]` are padding, so one compiled program
    serves every batch of at most nnz entries. Entries may come in any order; sorted rows are faster.

    Args:
      indices: [nnz, rank] int32 or int64 coordinates.
      values: [nnz] ids (int32 or int64) or weights (floating point).
      dense_shape: `rank` ints, rank at least 2; the first is B. Under `jax.export` they may be symbolic.

    Raises:
      ValueError: if shapes, types or (for host arrays) coordinates are not of the form above.

    References:
      `tf.sparse.SparseTensor`.

    Examples:
      >>> SparseTensor(indices=[[0, 0], [2, 1]], values=[5, 7], dense_shape=(3, 2)).values.tolist()
      [5, 7]
    """

    indices: AnyIndices
    values: AnyValues
    dense_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.dense_shape, tuple | list | np.ndarray):
            raise ValueError(f"SparseTensor: dense_shape must be ints, got {self.dense_shape!r}.")
        for field in ("indices", "values"):
            value = getattr(self, field)
            check_unmasked(f"SparseTensor: {field}", value)
            if isinstance(value, list | tuple):
                value = np.asarray(value)
                if field == "indices" and value.size == 0:
                    value = np.zeros((0, len(self.dense_shape)), np.int32)
                elif value.size == 0:
                    value = value.astype(np.int32)
                object.__setattr__(self, field, value)
        try:
            shape = tuple(n if _is_symbolic(n) else operator.index(n) for n in self.dense_shape)
        except TypeError:
            raise ValueError(
                f"SparseTensor: dense_shape must be ints, got {self.dense_shape!r}; "
                "inside jax.jit shapes are static, so take it from the host."
            ) from None
        object.__setattr__(self, "dense_shape", shape)
        if len(shape) < 2 or any(n < 0 for n in shape):
            raise ValueError(f"SparseTensor: dense_shape must be at least 2 ints of at least 0, got {shape}.")
        if not hasattr(self.indices, "shape") or not hasattr(self.values, "shape"):
            raise ValueError(
                f"SparseTensor needs arrays, got {type(self.indices).__name__} and {type(self.values).__name__}."
            )
        if self.values.ndim != 1 or self.indices.shape != (self.values.shape[0], len(shape)):
            raise ValueError(
                f"SparseTensor: indices must be [nnz, {len(shape)}] and values [nnz], got "
                f"{tuple(self.indices.shape)} and {tuple(self.values.shape)}."
            )
        if self.indices.dtype.kind not in "iu":  # timedelta64 is an np.integer
            raise ValueError(f"SparseTensor: indices must be integers, got {self.indices.dtype}.")
        if is_host(self.indices):
            check_indices(self.indices, shape)

    @property
    def num_rows(self) -> int:
        """B, the first dense dimension."""
        return self.dense_shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The dense shape."""
        return self.dense_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.values.dtype

    def pad(self, capacity: int) -> "SparseTensor":
        """The same entries padded to [capacity] entries with padding rows.

        Raises:
          ValueError: if there are more than `capacity` entries.
        """
        missing = capacity - self.values.shape[0]
        if missing < 0:
            raise ValueError(
                f"SparseTensor.pad: capacity must be at least {self.values.shape[0]} entries, got {capacity}."
            )
        indices = np.pad(np.asarray(self.indices), ((0, missing), (0, 0)))
        if missing:
            indices[-missing:, 0] = self.dense_shape[0]
        return SparseTensor(indices, np.pad(np.asarray(self.values), (0, missing)), self.dense_shape)

    @classmethod
    def from_dense(cls, array: AnyPadded, padding: float = -1) -> "SparseTensor":
        """From a dense array of rank at least 2; entries equal to `padding` are left out."""
        array = np.asarray(array)
        indices = np.argwhere(array != padding)
        return cls(indices, array[tuple(indices.T)], array.shape)

    @classmethod
    def from_lists(cls, rows: Iterable[Any], dtype: DTypeLike | None = None) -> "SparseTensor":
        """From a list of lists, one list a row, at columns 0, 1, ..."""
        from jaxembed.inputs.ragged import RaggedTensor

        ragged = RaggedTensor.from_lists(rows, dtype)
        lengths = np.diff(ragged.row_splits)
        columns = np.arange(ragged.values.shape[0]) - np.repeat(ragged.row_splits[:-1], lengths)
        indices = np.stack([np.repeat(np.arange(lengths.size), lengths), columns], axis=1)
        return cls(indices, ragged.values, (lengths.size, int(lengths.max(initial=0))))

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[int, ...]]:
        return (narrow_ids(self.indices), narrow_ids(self.values)), self.dense_shape

    @classmethod
    def tree_unflatten(cls, dense_shape: tuple[int, ...], children: tuple[Any, Any]) -> "SparseTensor":
        sparse = object.__new__(cls)
        object.__setattr__(sparse, "indices", children[0])
        object.__setattr__(sparse, "values", children[1])
        object.__setattr__(sparse, "dense_shape", dense_shape)
        return sparse


def check_indices(indices: np.ndarray, dense_shape: tuple[int, ...], what: str = "SparseTensor") -> None:
    """Raises ValueError unless every coordinate lies in `dense_shape` or its row marks padding."""
    if indices.shape[0] == 0:
        return
    # Usually all lie within the largest that may be; one by one takes ten times as long.
    last_row, *last = (column.max() for column in indices.T)
    if indices.min() >= 0 and last_row <= dense_shape[0] and all(map(operator.lt, last, dense_shape[1:])):
        return
    padding = indices[:, 0] == dense_shape[0]
    bad = ((indices < 0) | (indices >= np.asarray(dense_shape))).any(axis=1) & ~padding
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            f"{what}: entry {at} lies at {indices[at].tolist()}, outside of dense_shape {list(dense_shape)}; "
            f"only padding may, at row {dense_shape[0]}."
        )


def _is_symbolic(n: Any) -> bool:
    return not isinstance(n, int | np.integer) and jax.export.is_symbolic_dim(n)
