"""The native path of embedding_bag: one call of a C++ kernel for all features, on CPU."""

import ctypes
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed import bag_xla
from jaxembed.quantized_table import QuantizedTable

if TYPE_CHECKING:
    from jaxembed.bag import Bag, BagOperands

#: Name of the kernel as an XLA FFI target; a program exported with it needs it registered.
TARGET = "jaxembed_embedding_bags"
_LAYOUTS = {"dense": 0, "ragged": 1, "sparse": 2}
_COMBINERS = {"sum": 0, "mean": 1, "sqrtn": 2}
_ROW_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_CODE_TYPES = {"int8": 3, "int4": 4, "codes8": 5, "codes4": 6}


@functools.cache
def _load() -> str | None:
    """Registers the kernel; returns why it cannot be, or None."""
    path = library()
    if path is None:
        return "the kernel was not built when jaxembed was installed"
    try:
        handler = ctypes.CDLL(str(path)).JaxembedEmbeddingBags
    except (OSError, AttributeError) as e:
        return f"{path} cannot be loaded ({e})"
    try:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    except RuntimeError as e:
        # A kernel built with the headers of a newer jaxlib than the one that runs.
        return f"the kernel was built for another jaxlib ({e})"
    return None


def library() -> pathlib.Path | None:
    """The file that the kernel is in, or None."""
    here = pathlib.Path(__file__).parent / "native"
    # An editable install keeps the sources here and the built library in site-packages.
    for folder in (here, *(pathlib.Path(p) / "jaxembed" / "native" for p in sys.path if p)):
        for name in ("libjaxembed_native.so", "libjaxembed_native.dylib"):
            if (folder / name).is_file():
                return folder / name
    return None


def available() -> bool:
    """Whether the kernel can be called."""
    return _load() is None


def unavailable_reason() -> str | None:
    """Why it cannot, or None."""
    return _load()


def supports(bags: Sequence["Bag"], operands: Sequence["BagOperands"]) -> bool:
    """Whether the kernel covers these lookups."""
    return available() and all(_row_type(op.table) is not None for op in operands)


def _row_type(table: Any) -> int | None:
    if isinstance(table, QuantizedTable):
        return _CODE_TYPES[table.kind]
    if isinstance(table, jax.Array | np.ndarray):
        return _ROW_TYPES.get(table.dtype.name)
    return None


def embedding_bags(
    bags: Sequence["Bag"], operands: Sequence["BagOperands"]
) -> tuple[list[jax.Array], jax.Array]:
    """As `jaxembed.bag.embedding_bags`, with the kernel."""
    return _call(tuple(bags), [_canonical(op) for op in operands])


def _canonical(op: "BagOperands") -> "BagOperands":
    if op.weights is not None and op.weights.dtype != jnp.float32:
        op = op._replace(weights=jnp.asarray(op.weights).astype(jnp.float32))
    return op


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(bags, operands):
    flat, meta, results = [], [], []
    seen: dict[int, int] = {}

    def index(array) -> int:
        if array is None:
            return -1
        if id(array) not in seen:
            seen[id(array)] = len(flat)
            flat.append(array)
        return seen[id(array)]

    for bag, op in zip(bags, operands, strict=True):
        row_type, dim = _row_type(op.table), op.table.shape[1]
        weights = None if bag.sequence_length or bag.layout == "dense" else op.weights
        meta += [
            _LAYOUTS[bag.layout],
            _COMBINERS[bag.combiner],
            bag.prune_ids,
            bag.prune_weights,
            bag.num_bags,
            bag.sequence_length,
            row_type,
            dim,
            *(index(array) for array in _arrays(op.table)),
            index(op.ids),
            index(op.bags),
            index(op.columns if bag.sequence_length else None),
            index(weights),
        ]
        shape = (bag.num_bags, bag.sequence_length, dim) if bag.sequence_length else (bag.num_bags, dim)
        results.append(jax.ShapeDtypeStruct(shape, _output_type(op.table)))
    results.append(jax.ShapeDtypeStruct((len(bags),), jnp.int32))
    call = jax.ffi.ffi_call(TARGET, results, vmap_method="sequential")
    *outputs, counts = call(*flat, meta=np.asarray(meta, np.int64))
    outputs = [out.astype(op.table.dtype) for out, op in zip(outputs, operands, strict=True)]
    return outputs, counts


def _arrays(table: Any) -> tuple[Any, Any, Any, Any]:
    if isinstance(table, QuantizedTable):
        return table.codes, table.scale, table.bias, table.codebook
    return table, None, None, None


def _output_type(table: Any) -> Any:
    return jnp.dtype(jnp.float32) if isinstance(table, QuantizedTable) else table.dtype


def _forward(bags, operands):
    return _call(bags, operands), operands


def _backward(bags, operands, cotangents):
    outputs, _ = cotangents

    def differentiable(parts):
        rebuilt = [op._replace(table=t, weights=w) for op, (t, w) in zip(operands, parts, strict=True)]
        return [bag_xla.embedding_bag(bag, op)[0] for bag, op in zip(bags, rebuilt, strict=True)]

    parts = [(op.table, op.weights) for op in operands]
    _, pull = jax.vjp(differentiable, parts)
    (gradients,) = pull(outputs)
    none = jax.tree.map(lambda x: np.zeros(np.shape(x), jax.dtypes.float0), operands)
    return ([op._replace(table=t, weights=w) for op, (t, w) in zip(none, gradients, strict=True)],)


_call.defvjp(_forward, _backward)
