"""serving_embedding_lookup: replays a feature configuration on plain arrays."""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed import structure
from jaxembed.backends import lookup_path
from jaxembed.bag import Bag, BagOperands, embedding_bags
from jaxembed.combiners import CustomCombiner, positions_in_rows
from jaxembed.features import FeatureInput, match, table_of
from jaxembed.inputs import RaggedTensor, SparseTensor
from jaxembed.inputs.ids import check_unmasked, is_concrete, is_host, narrow_ids, native_order, signed_ids
from jaxembed.inputs.sparse import check_indices
from jaxembed.memory import unshared
from jaxembed.quantized_table import QuantizedTable
from jaxembed.shapes import ActivationTree, AnyCombinerWeights, AnyTable, Inputs, Weights
from jaxembed.validation import check_ids, check_splits


class Lookup(NamedTuple):
    """One feature's lookup: an embedding_bag and the shape its output takes."""

    bag: Bag
    operands: BagOperands
    output_shape: tuple[int, ...]


def serving_embedding_lookup(
    inputs: Inputs,
    weights: Weights,
    tables: Mapping[Any, AnyTable],
    feature_config: Any,
    *,
    count_bad_ids: bool = False,
    combiner_weights: Mapping[str, AnyCombinerWeights] | None = None,
) -> ActivationTree:
    """Looks every input up in its table and combines it, as its FeatureConfig says.

    Works eagerly, inside `jax.jit` and `jax.grad` (with respect to tables and weights), and under
    `jax.export`, whose programs are plain JAX and need nothing else to run. The native kernel has reverse mode alone:
    trace `jax.jvp`, `jax.jacfwd` and `jax.hessian` within `jaxembed.use_backend("xla")`.

    Ids and weights on the host may be written to as soon as an eager call returned, numpy tables once its result is ready.
    Inside of a `jax.jit` of the caller JAX's rule holds: no numpy array may be written to until the result is ready.

    Args:
      inputs: any structure of dicts, lists, tuples and namedtuples with a dense array of ids (any
        rank), a RaggedTensor or a SparseTensor at each leaf; a subset of `feature_config`. Ids are rows of the
        tables: raw ids of features with `preprocessing` go through `jaxembed.preprocess` first. A dense 64-bit
        array that goes through a `jax.jit` of the caller is wrapped to 32 bits by JAX, unseen: use int32.
      weights: None, or a structure like `inputs` with a RaggedTensor, a SparseTensor or None each.
      tables: dict of TableConfig (or table name) to [V, D] array or QuantizedTable.
      feature_config: a structure of FeatureConfig.
      count_bad_ids: also return, in a structure like `inputs`, the int32 number of ids of each feature
        that were outside [0, V), instead of raising on them.
      combiner_weights: by table name, the [num_weights] weights of its CustomCombiner.

    Returns:
      A structure like `inputs`, its dicts in the order of their keys, of activations in their tables' types: [B, D];
      ids.shape + [D] for dense ids; [B, L, D] for sequence features; output_shape + [D] for ragged ids where that
      is set; leading dimensions + [D] for sparse ids of rank above 2.

    Raises:
      ValueError: if inputs, weights or tables do not fit the configuration, or an id outside [0, V)
        that no rule prunes is found. Inside a trace such ids give zeros instead.

    Examples:
      >>> import jaxembed as je
      >>> movie = je.TableConfig(vocabulary_size=4, dim=2, combiner="sum", name="movie")
      >>> ids = je.RaggedTensor.from_lists([[0, 1], [], [3]])
      >>> rows = jnp.arange(8.0).reshape(4, 2)
      >>> features = {"watched": je.FeatureConfig(table=movie)}
      >>> je.serving_embedding_lookup({"watched": ids}, None, {movie: rows}, features)["watched"].tolist()
      [[2.0, 4.0], [0.0, 0.0], [6.0, 7.0]]

    References:
      `tf.tpu.experimental.embedding.serving_embedding_lookup`.
    """
    features = match(inputs, weights, feature_config)
    lookups, customs = [], []
    for item in features:
        lookup = plan_lookup(item, table_of(tables, item.feature.table))
        if is_concrete(lookup.operands.ids):
            check_splits(item.path, lookup)
            if not count_bad_ids:
                check_ids(item.path, item.feature.table, lookup)
        lookup = lookup._replace(operands=_owned(lookup.operands, item))
        if isinstance(lookup.bag.combiner, CustomCombiner):
            lookup, custom = _plan_custom(item, lookup, combiner_weights or {})
            customs.append(custom)
        else:
            customs.append(None)
        lookups.append(lookup)
    bags = tuple(lookup.bag for lookup in lookups)
    shapes = tuple(lookup.output_shape for lookup in lookups)
    operands = [lookup.operands for lookup in lookups]
    combiners = tuple(custom and custom[0] for custom in customs)
    outputs, counts = _run(bags, shapes, combiners, lookup_path(), operands, [c and c[1:] for c in customs])
    activations = structure.pack(inputs, iter(outputs))
    if not count_bad_ids:
        return activations
    return activations, structure.pack(inputs, iter(counts))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(bags, shapes, combiners, path, operands, customs):
    outputs, counts = embedding_bags(bags, operands, path)
    for i, (static, custom) in enumerate(zip(combiners, customs, strict=True)):
        if static is not None:
            (combiner, dtype), (valency, scale, weights) = static, custom
            vectors = outputs[i].astype(jnp.float32)
            vectors = vectors if scale is None else vectors * scale[..., None]
            outputs[i] = combiner(valency, vectors, weights).astype(dtype)
    outputs = [out.reshape(shape) for out, shape in zip(outputs, shapes, strict=True)]
    return outputs, list(counts)


def _owned(operands: BagOperands, item: FeatureInput) -> BagOperands:
    """Operands of 32 bits, all but the table in memory that the caller cannot write to: XLA reads on after the call."""
    given = jax.tree.leaves((item.ids, item.weights))
    table = jax.tree.map(native_order, operands.table)
    return BagOperands(table, *(unshared(narrow_ids(array), given) for array in operands[1:]))


def _plan_custom(item: FeatureInput, lookup: Lookup, combiner_weights: Mapping[str, Any]) -> tuple[Lookup, Any]:
    """A custom combiner's bag as a sequence of its rows, with what its function takes besides them."""
    bag, operands, table = lookup.bag, lookup.operands, item.feature.table
    combiner, weights = table.combiner, None
    if combiner.num_weights:
        weights = combiner_weights.get(table.name)
        if weights is None or np.shape(weights) != (combiner.num_weights,):
            raise ValueError(
                f"Feature {item.path}: the CustomCombiner of table {table.name!r} needs combiner_weights of shape "
                f"[{combiner.num_weights}], got {None if weights is None else list(np.shape(weights))}; pass "
                f"combiner_weights={{{table.name!r}: ...}}."
            )
        weights = unshared(weights, [weights])
    ids, place = narrow_ids(operands.ids), _place_ragged if bag.layout == "ragged" else _place_sparse
    placed, counts, scale = place(bag, operands._replace(ids=ids), combiner.max_valency)
    dtype = jax.dtypes.canonicalize_dtype(operands.table.dtype)
    if isinstance(operands.table, QuantizedTable):  # rows are weighted before they are rounded, as in training
        placed = placed._replace(table=dataclasses.replace(operands.table, dtype=np.float32))
    sequence = Bag(bag.layout, bag.num_bags, sequence_length=combiner.max_valency)
    valency = jnp.minimum(counts, combiner.max_valency)
    return Lookup(sequence, placed, lookup.output_shape), ((combiner, dtype), valency, scale, weights)


def _place_ragged(bag: Bag, operands: BagOperands, length: int) -> tuple[BagOperands, Any, Any]:
    """Operands of the sequences of a custom combiner's rows, [B] ids in each bag, [B, L] weights or None."""
    # By their row splits, so that the kernel refuses malformed ones.
    splits, scale = jnp.asarray(signed_ids(operands.bags)), None
    if operands.weights is not None:
        place = splits[:-1, None] + jnp.arange(length, dtype=splits.dtype)
        values = jnp.asarray(operands.weights).astype(jnp.float32)
        if values.shape[0] == 0:  # of nothing, nothing can be gathered
            values = jnp.append(values, jnp.float32(0))
        scale = jnp.where(place < splits[1:, None], values.at[place].get(mode="fill", fill_value=0), 0)
    counts = jnp.diff(splits).astype(jnp.int32)
    return operands._replace(bags=splits, weights=None), counts, scale


def _place_sparse(bag: Bag, operands: BagOperands, length: int) -> tuple[BagOperands, Any, Any]:
    """As `_place_ragged`."""
    ids, rows = operands.ids, narrow_ids(operands.bags)
    live = jnp.ones(ids.shape[0], bool)
    if bag.prune_ids:
        live &= jnp.asarray(ids) >= 0
    if bag.prune_weights and operands.weights is not None:
        live &= jnp.asarray(operands.weights) > 0
    positions, counts = positions_in_rows(rows, live, bag.num_bags)
    scale = None
    if operands.weights is not None:
        place = jnp.where(positions < 0, length, positions)
        scale = jnp.zeros((bag.num_bags, length), jnp.float32)
        values = jnp.asarray(operands.weights).astype(jnp.float32)
        scale = scale.at[jnp.asarray(rows), place].set(values, mode="drop")
    # An entry that is not live has no position, and a sparse sequence drops it unseen.
    return operands._replace(bags=rows, columns=positions, weights=None), counts, scale


def plan_lookup(item: FeatureInput, table: Any) -> Lookup:
    """What to run for one feature.

    Args:
      item: the feature.
      table: its table.

    Raises:
      ValueError: if ids or weights do not fit the feature.
    """
    path, feature, ids, weights = item
    if isinstance(ids, int | np.integer):
        ids = np.asarray(ids)
    if not isinstance(ids, RaggedTensor | SparseTensor | jax.Array | np.ndarray):
        raise ValueError(
            f"Input {path} is type {type(ids).__name__}. A dense array, a SparseTensor or a RaggedTensor "
            "expected; convert with jaxembed.as_input."
        )
    check_unmasked(f"Input {path}", ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"Input {path} must hold integer ids, got {ids.dtype}; look strings up in a vocabulary or "
            "hash them first: jaxembed.preprocess does, for features with preprocessing."
        )
    if weights is not None:
        _check_weights(path, feature, ids, weights)
    if isinstance(ids, RaggedTensor):
        return _plan_ragged(path, feature, ids, weights, table)
    if isinstance(ids, SparseTensor):
        if is_concrete(ids.indices):
            check_indices(np.asarray(ids.indices), ids.dense_shape, f"Feature {path!r}")
        return _plan_sparse(path, feature, ids, weights, table)
    if feature.max_sequence_length > 0:
        raise ValueError(
            f"Feature {path} is a sequence feature but a dense array was passed; pass a RaggedTensor or "
            "a SparseTensor, or set max_sequence_length=0."
        )
    bag = Bag("dense", math.prod(ids.shape))
    return Lookup(bag, BagOperands(table, ids.reshape(-1)), (*ids.shape, feature.table.dim))


def _check_weights(path: str, feature: Any, ids: Any, weights: Any) -> None:
    if not isinstance(ids, RaggedTensor | SparseTensor):
        raise ValueError(
            f"Weight specified for {path}, but input is dense; pass the ids as a RaggedTensor or a SparseTensor."
        )
    if type(weights) is not type(ids):
        raise ValueError(
            f"Weight for {path} is of type {type(weights).__name__} but it does not match type of the "
            f"input which is {type(ids).__name__}."
        )
    if feature.max_sequence_length > 0:
        raise ValueError(f"Weight specified for {path}, but this is a sequence feature.")
    if not jnp.issubdtype(weights.dtype, jnp.floating) and weights.values.shape != (0,):
        raise ValueError(f"Weight for {path} must be floating point, got {weights.dtype}.")
    if weights.values.shape != ids.values.shape or weights.num_rows != ids.num_rows:
        raise ValueError(
            f"Weight for {path} must be parallel to its input: got {weights.values.shape[0]} weights in "
            f"{weights.num_rows} rows for {ids.values.shape[0]} ids in {ids.num_rows} rows."
        )
    parts = ("row_splits",) if isinstance(ids, RaggedTensor) else ("indices",)
    for part in parts:
        a, b = getattr(ids, part), getattr(weights, part)
        if a is not b and is_concrete(a) and is_concrete(b) and not np.array_equal(a, b):
            raise ValueError(
                f"Weight for {path} must be parallel to its input: their {part} differ; "
                f"build the weights with the {part} of the ids."
            )


def _plan_ragged(path: str, feature: Any, ids: RaggedTensor, weights: Any, table: Any) -> Lookup:
    batch, dim = ids.num_rows, feature.table.dim
    length, shape = feature.max_sequence_length, None
    if feature.output_shape is not None:
        shape, product = (*feature.output_shape, dim), math.prod(feature.output_shape)
        if product == batch:
            length = 0
        elif batch > 0 and product > batch and product % batch == 0:
            length = product // batch
        else:
            raise ValueError(
                f"Output shape set in the FeatureConfig should be the factor of the input data batch size: "
                f"feature {path} has output_shape {list(feature.output_shape)} (product {product}) for a "
                f"batch of {batch}; the product must be the batch size or a multiple of it."
            )
    if length:
        shape = shape or (batch, length, dim)
        bag = Bag("ragged", batch, sequence_length=length)
        return Lookup(bag, BagOperands(table, ids.values, ids.row_splits), shape)
    bag = Bag("ragged", batch, feature.table.combiner)
    operands = BagOperands(table, ids.values, ids.row_splits, weights=_values(weights))
    return Lookup(bag, operands, shape or (batch, dim))


@functools.cache
def _warn_of_no_sequence(path: str, rank: int) -> None:
    """Once a feature, as TensorFlow does at each lookup."""
    logging.getLogger("jaxembed").warning(
        "Feature %r: max_sequence_length is ignored, and its rows are combined: sparse ids make sequences where they are "
        "of rank 2, got rank %d, and output_shape is None.",
        path,
        rank,
    )


def _plan_sparse(path: str, feature: Any, ids: SparseTensor, weights: Any, table: Any) -> Lookup:
    *leading, _ = ids.dense_shape
    dim, combiner = feature.table.dim, feature.table.combiner
    indices = signed_ids(ids.indices)
    rows = indices[:, 0]
    if feature.max_sequence_length > 0 and len(leading) == 1 and feature.output_shape is None:
        bag = Bag("sparse", leading[0], sequence_length=feature.max_sequence_length)
        operands = BagOperands(table, ids.values, rows, columns=indices[:, 1])
        return Lookup(bag, operands, (leading[0], feature.max_sequence_length, dim))
    if feature.max_sequence_length > 0:
        _warn_of_no_sequence(path, len(ids.dense_shape))
    num_bags = math.prod(leading)
    for axis, size in enumerate(leading[1:], start=1):
        rows = rows * size + indices[:, axis]
    if len(leading) > 1:
        # A coordinate beyond its axis would count in another row: of padding, or unseen in a trace. Sizes may be symbolic.
        inside: Any = True
        for axis, size in enumerate(leading):
            inside &= (indices[:, axis] >= 0) & (indices[:, axis] < size)
        rows = (np if is_host(indices) else jnp).where(inside, rows, num_bags)
    prune = feature.validate_weights_and_indices or len(leading) > 1
    bag = Bag("sparse", num_bags, combiner, prune_ids=prune, prune_weights=prune and combiner != "sum")
    return Lookup(bag, BagOperands(table, ids.values, rows, weights=_values(weights)), (*leading, dim))


def _values(weights: Any) -> Any:
    """Those of weights that were checked: where there are none, they may be of any type."""
    if weights is None or jnp.issubdtype(weights.dtype, jnp.floating):
        return None if weights is None else weights.values
    return np.zeros(0, np.float32)
