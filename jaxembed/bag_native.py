"""The native path of embedding_bag: one call of a C++ kernel for all features, on CPU."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxembed import bag_xla, kernel
from jaxembed.quantized_table import KINDS, QuantizedTable
from jaxembed.resident_table import ResidentTable
from jaxembed.splits import SplitsRow

if TYPE_CHECKING:
    from jaxembed.bag import Bag, BagOperands

#: Name of the slices that `merged_embedding_bags` returns, in a program's text.
MERGED_SCOPE = "jaxembed_columns"
_LAYOUTS = {"dense": 0, "ragged": 1, "sparse": 2}
_COMBINERS = {"sum": 0, "mean": 1, "sqrtn": 2}
_ROW_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "codes8": 5, "codes4": 6}


def supports(bags: Sequence["Bag"], operands: Sequence["BagOperands"]) -> bool:
    """Whether the kernel covers these lookups."""
    return kernel.available() and all(_row_type(op.table) is not None for op in operands)


def check_tables(operands: Sequence["BagOperands"]) -> None:
    """Raises ValueError if a table is of a type that the kernel does not have."""
    for op in operands:
        if _row_type(op.table) is None:
            raise ValueError(
                f"the native kernel has no tables of {_kind(op.table)}; convert the table to float32, bfloat16 or float16, "
                'quantize it, or choose plain JAX for it with use_backend("auto") or JAXEMBED_BACKEND=auto.'
            )


def _row_type(table: Any) -> int | None:
    kind = _kind(table)
    return None if kind in KINDS and isinstance(table, jax.Array | np.ndarray) else _ROW_TYPES.get(kind)


def _kind(table: Any) -> str:
    if isinstance(table, ResidentTable):
        return table.form.kind
    return table.kind if isinstance(table, QuantizedTable) else table.dtype.name


def embedding_bags(
    bags: Sequence["Bag"], operands: Sequence["BagOperands"], *, in_exports: bool = False
) -> tuple[list[jax.Array], jax.Array]:
    """As `jaxembed.bag.embedding_bags`, on CPU with the kernel, elsewhere in plain JAX.

    Args:
      bags: static halves.
      operands: dynamic halves.
      in_exports: whether programs of `jax.export` call the kernel, too. Else they are plain JAX, and run in
        processes that do not have it.
    """
    return _call(tuple(bags), in_exports, [_canonical(op) for op in operands])


def _canonical(op: "BagOperands") -> "BagOperands":
    if op.weights is not None and op.weights.dtype != jnp.float32:
        op = op._replace(weights=jnp.asarray(op.weights).astype(jnp.float32))
    return op


def merged_embedding_bags(
    bags: Sequence["Bag"], operands: Sequence["BagOperands"]
) -> tuple[list[jax.Array], jax.Array]:
    """`embedding_bags`, without gradients, for programs that put results side by side.

    The kernel writes results of one type into one array [B, columns], of which those returned are slices:
    concatenated in the order of the features, they cost nothing. Anything else may copy them.
    """
    operands = [_canonical(op) for op in operands]
    *outputs, counts = _bind(bags, operands, merged=True, in_exports=False)
    _, places = _arranged(bags, operands, merged=True)
    results = []
    with jax.named_scope(MERGED_SCOPE):
        for bag, op, (out, column) in zip(bags, operands, places, strict=True):
            array = outputs[out]
            results.append(array if bag.sequence_length else array[:, column : column + op.table.shape[1]])
    return results, counts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _call(bags, in_exports, operands):
    *outputs, counts = _bind(bags, operands, merged=False, in_exports=in_exports)
    return outputs, counts


def _bind(bags, operands, **parameters):
    leaves, tree = jax.tree.flatten([_used(bag, op) for bag, op in zip(bags, operands, strict=True)])
    # Features may share arrays, which the kernel takes once.
    distinct = {id(leaf): leaf for leaf in leaves}
    places = {key: place for place, key in enumerate(distinct)}
    order = tuple(places[id(leaf)] for leaf in leaves)
    return _LOOKUP.bind(*distinct.values(), bags=tuple(bags), tree=tree, places=order, **parameters)


def _used(bag: "Bag", op: "BagOperands") -> "BagOperands":
    if bag.sequence_length or bag.layout == "dense":
        op = op._replace(weights=None)
    return op if bag.sequence_length else op._replace(columns=None)


def _operands(arrays, tree, places) -> list["BagOperands"]:
    return jax.tree.unflatten(tree, [arrays[place] for place in places])


def _kernel(*arrays, bags, tree, places, in_exports, merged):
    del in_exports
    operands = _operands(arrays, tree, places)
    index = {id(array): place for place, array in enumerate(arrays)}
    outs, columns = _arranged(bags, operands, merged)
    if any(jax.export.is_symbolic_dim(bag.num_bags) for bag in bags):
        raise ValueError(
            "programs that call the native kernel need batches of fixed sizes, got symbolic ones; export at fixed "
            'sizes, or in plain JAX within use_backend("auto").'
        )
    meta = []
    for bag, op, place in zip(bags, operands, columns, strict=True):
        meta += [
            _LAYOUTS[bag.layout],
            _COMBINERS[bag.combiner],
            bag.prune_ids,
            bag.prune_weights,
            bag.num_bags,
            bag.sequence_length,
            _row_type(op.table),
            op.table.shape[1],
            op.bags.row if isinstance(op.bags, SplitsRow) else 0,
            *((op.table.shape[0], op.table.row) if isinstance(op.table, ResidentTable) else (-1, 0)),
            *place,
            *(-1 if array is None else index[id(array)] for array in _arrays(op)),
        ]
    # Of quantized tables the kernel gives what it accumulates.
    given = [jax.ShapeDtypeStruct(out.shape, out.kernel_dtype) for out in outs]
    counts = jax.ShapeDtypeStruct((len(bags),), jnp.int32)
    *outputs, bad = jax.ffi.ffi_call(kernel.TARGET, [*given, counts])(*arrays, meta=np.asarray(meta, np.int64))
    return [*(array.astype(out.dtype) for array, out in zip(outputs, outs, strict=True)), bad]


def _portable(*arrays, bags, tree, places, in_exports, merged):
    del in_exports
    operands = _operands(arrays, tree, places)
    results, counts = bag_xla.embedding_bags(bags, operands)
    outs, columns = _arranged(bags, operands, merged)
    groups = [[r for r, (at, _) in zip(results, columns, strict=True) if at == out] for out in range(len(outs))]
    return [*(group[0] if len(group) == 1 else jnp.concatenate(group, axis=1) for group in groups), counts]


class _Output(NamedTuple):
    """An output of the primitive, and the type that the kernel gives it."""

    shape: tuple[int, ...]
    dtype: Any
    kernel_dtype: Any


def _arranged(bags, operands, merged: bool) -> tuple[list[_Output], list[tuple[int, int]]]:
    """The outputs, and for each feature which one it is in and from which column on."""
    outs: list[_Output] = []
    places, groups = [], {}
    for bag, op in zip(bags, operands, strict=True):
        dtype, dim = op.table.dtype, op.table.shape[1]
        kernel_dtype = jnp.dtype(jnp.float32) if _kind(op.table) in KINDS else dtype
        key = (bag.num_bags, dtype, kernel_dtype)
        if merged and not bag.sequence_length and key in groups:
            at = groups[key]
            places.append((at, outs[at].shape[1]))
            outs[at] = outs[at]._replace(shape=(bag.num_bags, outs[at].shape[1] + dim))
            continue
        if not bag.sequence_length:
            groups[key] = len(outs)
        places.append((len(outs), 0))
        length = (bag.sequence_length,) if bag.sequence_length else ()
        outs.append(_Output((bag.num_bags, *length, dim), dtype, kernel_dtype))
    return outs, places


def _abstract(*arrays, **parameters):
    if any(map(_varies, arrays)):
        # Under shard_map: the portable program tells over which axes its outputs vary.
        return jax.make_jaxpr(functools.partial(_portable, **parameters))(*arrays).out_avals
    operands = _operands(arrays, parameters["tree"], parameters["places"])
    outs, _ = _arranged(parameters["bags"], operands, parameters["merged"])
    shapes = [ShapedArray(out.shape, out.dtype) for out in outs]
    return [*shapes, ShapedArray((len(parameters["bags"]),), jnp.int32)]


def _varies(array: Any) -> bool:
    manual = getattr(array, "mat", None)  # its name in newer versions of jax
    return bool(getattr(array, "vma", ()) if manual is None else manual.varying)


def _lower_on_cpu(context, *arrays, **parameters):
    exporting = context.module_context.lowering_parameters.for_export
    body = _portable if exporting and not parameters["in_exports"] else _kernel
    return mlir.lower_fun(body, multiple_results=True)(context, *arrays, **parameters)


@functools.partial(jax.jit, static_argnames=("bags", "tree", "places", "in_exports", "merged"))
def _program(*arrays, **parameters):
    bodies = [functools.partial(body, **parameters) for body in (_kernel, _portable)]
    return jax.lax.platform_dependent(*arrays, cpu=bodies[0], default=bodies[1])


def _eager(*arrays, **parameters):
    """On the platform of the arrays. A program that binds the primitive would come here again under `jax.disable_jit`."""
    with jax.disable_jit(False):
        return _program(*arrays, **parameters)


def _batch(arrays, axes, **parameters):
    moved = [
        array if axis is None else jnp.moveaxis(array, axis, 0)
        for array, axis in zip(arrays, axes, strict=True)
    ]
    mapped = [array for array, axis in zip(moved, axes, strict=True) if axis is not None]

    def one(values):
        values = iter(values)
        whole = [array if axis is None else next(values) for array, axis in zip(moved, axes, strict=True)]
        return _LOOKUP.bind(*whole, **parameters)

    outputs = jax.lax.map(one, mapped)
    return outputs, [0] * len(outputs)


#: Whether a program calls the kernel is decided when it is lowered: tracing does not tell whether it is for
#: `jax.export`.
_LOOKUP = Primitive(kernel.TARGET)
_LOOKUP.multiple_results = True
_LOOKUP.def_impl(_eager)
_LOOKUP.def_abstract_eval(_abstract)
mlir.register_lowering(_LOOKUP, _lower_on_cpu, platform="cpu")
mlir.register_lowering(_LOOKUP, mlir.lower_fun(_portable, multiple_results=True))
batching.primitive_batchers[_LOOKUP] = _batch


def _arrays(op: "BagOperands") -> tuple[Any, ...]:
    table, bags = op.table, op.bags
    rows, codebook = (table.codes, table.codebook) if isinstance(table, QuantizedTable) else (table, None)
    if isinstance(table, ResidentTable):
        rows = table.addresses
    if isinstance(bags, SplitsRow):
        bags = bags.splits
    return rows, codebook, op.ids, bags, op.columns, op.weights


def _forward(bags, in_exports, operands):
    return _call(bags, in_exports, operands), operands


def _backward(bags, in_exports, operands, cotangents):
    del in_exports
    outputs, _ = cotangents

    def differentiable(parts):
        rebuilt = [op._replace(table=t, weights=w) for op, (t, w) in zip(operands, parts, strict=True)]
        return bag_xla.embedding_bags(bags, rebuilt)[0]

    parts = [(op.table, op.weights) for op in operands]
    _, pull = jax.vjp(differentiable, parts)
    (gradients,) = pull(outputs)
    none = jax.tree.map(lambda x: np.zeros(np.shape(x), jax.dtypes.float0), operands)
    return ([op._replace(table=t, weights=w) for op, (t, w) in zip(none, gradients, strict=True)],)


_call.defvjp(_forward, _backward)
