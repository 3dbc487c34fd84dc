"""Custom combiners in training: bags are looked up as sequences of rows, and combined outside of the engines.

Tables, exchanges and optimizers see a sequence feature of `max_valency` rows a bag. Its activation is then
combined where it lies, bag by bag, and gradients are pulled back through the combiner, to the rows, the
weights of the input and those of the combiner alike.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.bag import Bag, BagOperands
from jaxembed.combiners import CustomCombiner, ranks_on_host
from jaxembed.config import TableConfig
from jaxembed.inputs.ids import is_concrete
from jaxembed.lookup import Lookup

from .batch import BatchLayout, FeatureLayout
from .initial import table_key

CombinerWeights = Mapping[str, jax.Array]


def is_custom(lookup: Lookup) -> bool:
    """Whether the bags of a lookup are combined by a function of the user's."""
    return isinstance(lookup.bag.combiner, CustomCombiner)


def as_sequence(lookup: Lookup) -> Lookup:
    """The lookup of a custom combiner's rows: [B, max_valency, D], in the order of the ids of each bag.

    Ids that are pruned, and those beyond `max_valency`, have no row.
    """
    bag, operands = lookup.bag, lookup.operands
    combiner: Any = bag.combiner
    length, dim = combiner.max_valency, lookup.output_shape[-1]
    shape = (bag.num_bags, length, dim)
    sequence = Bag("sparse", bag.num_bags, sequence_length=length)
    if not all(is_concrete(x) for x in jax.tree.leaves((operands.ids, operands.bags, operands.weights))):
        return Lookup(sequence, operands, shape)  # such a batch is refused where it is laid out
    ids = np.asarray(operands.ids)
    rows = np.asarray(operands.bags).astype(np.int64)
    if bag.layout == "ragged":
        rows = _ragged_rows(rows, ids.size)
    live = (rows >= 0) & (rows < bag.num_bags)
    if bag.prune_ids:
        live &= ids >= 0
    if bag.prune_weights and operands.weights is not None:
        live &= np.asarray(operands.weights) > 0
    placed = BagOperands(operands.table, ids, rows, columns=ranks_on_host(rows, live), weights=operands.weights)
    return Lookup(sequence, placed, shape)


def valencies_on_host(
    layout: BatchLayout, lookups: list[Lookup], live_rows: list[np.ndarray | None], num_shards: int
) -> dict[str, np.ndarray]:
    """The number of ids of each bag, by feature: int32 [n, bags a shard], 0 for padding.

    Args:
      layout: of the batch.
      lookups: as of `as_sequence` where a combiner is custom.
      live_rows: by feature, the rows that have entries; None for all.
      num_shards: n, of this host.
    """
    found = {}
    for feature, lookup, live in zip(layout.features, lookups, live_rows, strict=True):
        if feature.combined_shape is None:
            continue
        length, rows = lookup.bag.sequence_length, np.asarray(lookup.operands.bags)
        counts = np.bincount(rows[np.asarray(lookup.operands.columns) >= 0], minlength=lookup.bag.num_bags)
        counts = counts if live is None else counts * np.repeat(live, counts.size // live.size)
        padded = np.zeros(num_shards * feature.num_segments // length, np.int32)
        padded[: counts.size] = np.minimum(counts, length)
        found[feature.path] = padded.reshape(num_shards, -1)
    return found


def combine(
    layout: BatchLayout,
    outputs: list[jax.Array],
    valencies: Mapping[str, jax.Array],
    combiner_weights: CombinerWeights,
) -> list[jax.Array]:
    """The activations of all features, from outputs that are [B, max_valency, D] where a combiner is custom."""
    return [
        out
        if f.combined_shape is None
        else _combined(f, out, valencies[f.path], combiner_weights.get(f.feature.table.name))
        for f, out in zip(layout.features, outputs, strict=True)
    ]


def pull_back(
    layout: BatchLayout,
    outputs: list[jax.Array],
    valencies: Mapping[str, jax.Array],
    combiner_weights: CombinerWeights,
    gradients: list[jax.Array],
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Gradients of the outputs and of the combiners' weights, by table, from those of the activations."""
    rows_gradients, by_table = [], {name: jnp.zeros_like(weights) for name, weights in combiner_weights.items()}
    for f, out, gradient in zip(layout.features, outputs, gradients, strict=True):
        if f.combined_shape is None:
            rows_gradients.append(gradient.astype(out.dtype))
            continue
        name = f.feature.table.name
        found, of_weights = _pull_back_bags(f, out, valencies[f.path], combiner_weights.get(name), gradient)
        rows_gradients.append(found)
        if of_weights is not None:
            by_table[name] += of_weights
    return rows_gradients, by_table


def initial_weights(tables: Mapping[str, TableConfig], key: jax.Array) -> dict[str, jax.Array]:
    """The weights of the tables' custom combiners at the start, float32 [num_weights], by table."""
    found = {}
    for name, shape in weight_shapes(tables).items():
        # Folded in once more: rows take the keys of their ids.
        own_key = jax.random.fold_in(table_key(key, tables[name]), 2**31)
        found[name] = jnp.asarray(tables[name].combiner.initializer(own_key, shape, jnp.float32))
    return found


def weight_shapes(tables: Mapping[str, TableConfig]) -> dict[str, tuple[int]]:
    """[num_weights] by table, of those whose custom combiner has weights."""
    return {
        name: (table.combiner.num_weights,)
        for name, table in tables.items()
        if isinstance(table.combiner, CustomCombiner) and table.combiner.num_weights
    }


def checked_weights(tables: Mapping[str, TableConfig], given: Mapping[str, Any] | None) -> dict[str, jax.Array]:
    """Combiner weights from elsewhere, float32.

    Raises:
      ValueError: if they are not those that the tables need.
    """
    expected = weight_shapes(tables)
    values = {name: jnp.asarray(value, jnp.float32) for name, value in (given or {}).items()}
    found = {name: value.shape for name, value in values.items()}
    if found != expected:
        raise ValueError(
            f"combiner_weights must have the shapes {expected} of the tables' custom combiners, got {found}."
        )
    return values


def updated_weights(
    tables: Mapping[str, TableConfig], weights: CombinerWeights, gradients: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """One step of SGD with each combiner's `combiner_weights_learning_rate`."""
    return {
        name: value - np.float32(tables[name].combiner.combiner_weights_learning_rate) * gradients[name]
        for name, value in weights.items()
    }


def _combined(feature: FeatureLayout, out: jax.Array, valency: jax.Array, weights: Any) -> jax.Array:
    combiner = _checked_combiner(feature, weights)
    combined = combiner(valency.reshape(-1)[: out.shape[0]], out, weights)
    return combined.astype(feature.feature.table.dtype).reshape(feature.combined_shape)


def _pull_back_bags(
    feature: FeatureLayout, out: jax.Array, valency: jax.Array, weights: Any, gradient: jax.Array
) -> tuple[jax.Array, Any]:
    """Gradients of [B, max_valency, D] rows and of the combiner's weights, None without any.

    A bag that nothing depends on, as of padding, has no part in them even where its own are NaN: a function that divides
    by the valency makes 0 * inf of the gradient 0 of an empty bag.
    """
    combiner, dtype = _checked_combiner(feature, weights), feature.feature.table.dtype
    num_bags, _, dim = out.shape
    gradient = gradient.astype(dtype).reshape(num_bags, dim)
    counts, live = valency.reshape(-1)[:num_bags], jnp.any(gradient != 0, axis=1)
    if weights is not None:
        counts, out = _filled(counts, live), _filled(out, live)
    _, vjp = jax.vjp(lambda *args: combiner(counts, *args).astype(dtype), out, weights)
    rows, of_weights = vjp(gradient)
    rows = jnp.where(live[:, None, None], rows, 0)
    return rows, jax.tree.map(lambda x: jnp.where(jnp.any(live), x, 0), of_weights)


def _filled(values: jax.Array, live: jax.Array) -> jax.Array:
    """The values [B, ...], those of the first live bag in place of those that are not: finite wherever the former are.

    The gradient of the weights is then one sum over the batch; bag by bag it would be [B, num_weights].
    """
    num_bags, trailing = live.shape[0], [1] * (values.ndim - 1)
    places = jnp.arange(num_bags)
    first = places == jnp.min(jnp.where(live, places, num_bags), initial=num_bags)
    # A sum, not an index: bags lie on several devices.
    fill = jnp.sum(jnp.where(first.reshape(-1, *trailing), values, 0), axis=0, dtype=values.dtype)
    return jnp.where(live.reshape(-1, *trailing), values, fill)


def _checked_combiner(feature: FeatureLayout, weights: Any) -> CustomCombiner:
    combiner: CustomCombiner = feature.feature.table.combiner
    if combiner.num_weights and weights is None:
        raise ValueError(
            f"Feature {feature.path!r}: the CustomCombiner of table {feature.feature.table.name!r} needs its weights; "
            "take a state of `init` or `from_canonical(..., combiner_weights=...)`."
        )
    return combiner


def _ragged_rows(splits: np.ndarray, num_ids: int) -> np.ndarray:
    rows = np.full(num_ids, -1)
    rows[splits[0] : splits[-1]] = np.repeat(np.arange(splits.size - 1), np.diff(splits))
    return rows
