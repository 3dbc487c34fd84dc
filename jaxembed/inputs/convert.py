"""as_input: ids and weights of other libraries as inputs, none of which is imported unless it is used."""

from typing import Any

import jax
import numpy as np

from jaxembed.inputs.ids import check_unmasked, narrow_ids
from jaxembed.inputs.ragged import RaggedTensor
from jaxembed.inputs.sparse import SparseTensor

#: Of arrays of strings, or of objects, which may be strings.
_TEXT_KINDS = "OUST"
#: Types of pyarrow whose values are strings.
_TEXT = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")


def as_input(x: Any) -> Any:
    """`x` as an input (or weight) of a lookup.

    | from | to |
    |---|---|
    | list of lists | RaggedTensor |
    | `tf.RaggedTensor` (one ragged dimension) | RaggedTensor |
    | pyarrow ListArray, LargeListArray, ChunkedArray of lists | RaggedTensor, zero-copy where there is one chunk |
    | `tf.sparse.SparseTensor` | SparseTensor |
    | `jax.experimental.sparse.BCOO` | SparseTensor |
    | scipy sparse matrix or array | SparseTensor, whose values are the matrix's |
    | numpy and jax arrays, lists of numbers, `tf.Tensor` | dense array; 64-bit ids of the host saturate to int32 \
      unless JAX computes in 64 bits, so that a `jax.jit` cannot wrap them to another row |

    Raises:
      ValueError: if there is no such conversion.

    Examples:
      >>> as_input([[0, 1], [], [3]]).shape
      (3, None)
      >>> as_input(np.array([2, 2**40])).tolist()
      [2, 2147483647]
    """
    kind, x = type(x).__name__, converted(x)
    if isinstance(x, RaggedTensor | SparseTensor):
        return x
    if x.dtype.kind == "O" and any(isinstance(entry, list | tuple | np.ndarray) for entry in x.flat):
        raise ValueError(
            f"as_input cannot convert {kind} of lists; pass a list of lists, as its tolist() gives it."
        )
    if x.dtype.kind in _TEXT_KINDS:
        raise ValueError(
            f"as_input cannot convert {kind} of {x.dtype}: dense ids must be numbers; look strings up in a vocabulary or "
            "hash them first: jaxembed.preprocess does, for features with preprocessing."
        )
    return narrow_ids(x)


def converted(x: Any) -> Any:
    """`as_input` with ids as wide as they are: raw ids are not rows yet."""
    if isinstance(x, RaggedTensor | SparseTensor):
        return x
    check_unmasked("as_input: x", x)
    module = type(x).__module__.partition(".")[0]
    if module == "pyarrow":
        return _from_pyarrow(x)
    if module == "scipy":
        return _from_scipy(x)
    if module == "tensorflow":
        return _from_tensorflow(x)
    if type(x).__name__ == "BCOO" and module == "jax":
        return _from_bcoo(x)
    if isinstance(x, list | tuple):
        if any(isinstance(row, list | tuple) or getattr(row, "ndim", 0) for row in x):
            return RaggedTensor.from_lists(x)
        x = np.asarray(x) if x else np.zeros(0, np.int32)
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        array = x if isinstance(x, jax.Array) else np.asarray(x)
        if array.dtype.kind in ("i", "u", "f", "V", *_TEXT_KINDS):
            return array
    raise ValueError(
        f"as_input cannot convert {type(x).__name__}; pass a list of lists, a numpy or jax array, a BCOO, a scipy "
        "sparse matrix, a pyarrow list array, or a TensorFlow tensor."
    )


def _from_pyarrow(x: Any) -> RaggedTensor:
    import pyarrow as pa

    if isinstance(x, pa.ChunkedArray):
        x = (
            x.chunk(0)
            if x.num_chunks == 1
            else pa.concat_arrays(x.chunks)
            if x.num_chunks
            else pa.array([], x.type)
        )
    if not (pa.types.is_list(x.type) or pa.types.is_large_list(x.type)):
        raise ValueError(f"as_input: a pyarrow array must be of type list or large_list, got {x.type}.")
    if x.null_count:
        raise ValueError(
            f"as_input: {x.null_count} rows of the pyarrow array are null; fill them with empty lists."
        )
    # A slice keeps its parent's values; splits that start above 0 would not be a RaggedTensor.
    splits = x.offsets.to_numpy()
    values = x.values.slice(splits[0], splits[-1] - splits[0])
    if values.null_count:
        raise ValueError(f"as_input: {values.null_count} ids of the pyarrow array are null; drop or fill them.")
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
        if values.null_count:  # of its dictionary
            raise ValueError(
                f"as_input: {values.null_count} ids of the pyarrow array are null; drop or fill them."
            )
    text = any(getattr(pa.types, f"is_{kind}")(values.type) for kind in _TEXT)
    try:
        array = values.to_numpy(zero_copy_only=not text)
    except pa.ArrowInvalid as e:
        raise ValueError(f"as_input: a pyarrow array must hold numbers, or strings, got {values.type}.") from e
    return RaggedTensor(array, splits - splits[0] if splits[0] else splits)


def _from_scipy(x: Any) -> SparseTensor:
    coo = x.tocoo()
    if len(coo.shape) != 2:
        raise ValueError(f"as_input: a scipy array must be of rank 2, got shape {coo.shape}.")
    order = np.lexsort((coo.col, coo.row))
    return SparseTensor(np.stack([coo.row[order], coo.col[order]], axis=1), coo.data[order], coo.shape)


def _from_bcoo(x: Any) -> SparseTensor:
    if x.n_batch or x.n_dense:
        raise ValueError(
            f"as_input: a BCOO must have neither batch nor dense dimensions, got n_batch={x.n_batch}, "
            f"n_dense={x.n_dense}."
        )
    # BCOO marks padding with coordinates out of bounds, and so does SparseTensor.
    return SparseTensor(x.indices, x.data, x.shape)


def _from_tensorflow(x: Any) -> Any:
    name = type(x).__name__
    if name == "RaggedTensor":
        if x.shape.rank != 2:
            raise ValueError(f"Only rank 2 ragged tensor is supported, but got rank {x.shape.rank}.")
        return RaggedTensor(x.values.numpy(), x.row_splits.numpy())
    if name == "SparseTensor":
        return SparseTensor(x.indices.numpy(), x.values.numpy(), x.dense_shape.numpy())
    if not hasattr(x, "numpy"):
        raise ValueError(
            f"as_input: a TensorFlow tensor must be eager, got {name}; convert outside of tf.function."
        )
    return np.asarray(x.numpy())
