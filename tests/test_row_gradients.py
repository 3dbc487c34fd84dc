"""Gradients of embedding_bag as rows: their sum is the dense gradient of both paths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import kernel
from jaxembed.bag import Bag, BagOperands, embedding_bags, row_gradients
from jaxembed.optimizers import SGD, sparse_update

V, D = 6, 3
TABLE = jnp.arange(V * D, dtype=jnp.float32).reshape(V, D) / 8
IDS = jnp.array([1, 2, 2, -1, 5, V, 0, 3], jnp.int32)
WEIGHTS = jnp.array([1, 0.5, -2, 1, 3, 1, 0, 7], jnp.float32)
SPLITS = jnp.array([1, 3, 3, 7], jnp.int32)  # the first entry and the last one are padding
ROWS = jnp.array([0, 2, 1, 0, 2, 1, 1, 3], jnp.int32)
COLUMNS = jnp.array([0, 1, 1, 2, 5, 0, 1, 0], jnp.int32)
CASES = {
    "dense": (Bag("dense", 8), BagOperands(TABLE, IDS)),
    "sequence": (Bag("ragged", 3, sequence_length=2), BagOperands(TABLE, IDS, SPLITS)),
    "sparse sequence": (Bag("sparse", 3, sequence_length=3), BagOperands(TABLE, IDS, ROWS, COLUMNS)),
}
for combiner in ("sum", "mean", "sqrtn"):
    ragged = Bag("ragged", 3, combiner)
    CASES[f"ragged {combiner}"] = (ragged, BagOperands(TABLE, IDS, SPLITS))
    CASES[f"ragged weighted {combiner}"] = (ragged, BagOperands(TABLE, IDS, SPLITS, weights=WEIGHTS))
    sparse = Bag("sparse", 3, combiner, prune_ids=True, prune_weights=True)
    CASES[f"sparse pruned {combiner}"] = (sparse, BagOperands(TABLE, IDS, ROWS, weights=WEIGHTS))
# No bags in a buffer of some length: all of it is padding.
for name in ("sequence", "sparse sequence", "ragged weighted mean", "ragged sqrtn", "sparse pruned sum"):
    bag, operands = CASES[name]
    bags = SPLITS[:1] if bag.layout == "ragged" else ROWS
    CASES[f"{name} without bags"] = (dataclasses.replace(bag, num_bags=0), operands._replace(bags=bags))


@pytest.mark.parametrize("path", ["xla", "native"])
@pytest.mark.parametrize("case", CASES)
def test_rows_add_up_to_the_dense_gradient(case, path):
    if path == "native" and not kernel.available():
        pytest.skip(f"no native kernel: {kernel.unavailable_reason()}")
    bag, operands = CASES[case]

    def forward(table):
        return embedding_bags([bag], [operands._replace(table=table)], path)[0][0]

    out, pull = jax.vjp(forward, TABLE)
    gradient = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    ids, rows = jax.jit(row_gradients, static_argnums=0)(bag, operands, gradient)
    assert ids.shape == IDS.shape
    assert rows.shape == (IDS.size, D)
    np.testing.assert_array_equal(rows[ids == V], 0)
    (dense,) = pull(gradient)
    np.testing.assert_allclose(
        jnp.zeros_like(TABLE).at[ids].add(rows, mode="drop"), dense, rtol=1e-6, atol=1e-7
    )
    assert np.abs(dense).max() > 0.1 or not bag.num_bags
    if operands.weights is not None:

        def by_weights(weights):
            return embedding_bags([bag], [operands._replace(weights=weights)], path)[0][0]

        (of_weights,) = jax.vjp(by_weights, operands.weights)[1](gradient)
        assert bool(of_weights.any()) == bool(bag.num_bags)


@pytest.mark.parametrize("path", ["xla", "native"])
@pytest.mark.parametrize(("dtype", "count"), [("bfloat16", 1000), ("float16", 5000)])
def test_gradients_of_16_bit_tables_are_added_in_float32(dtype, count, path):
    if path == "native" and not kernel.available():
        pytest.skip(f"no native kernel: {kernel.unavailable_reason()}")
    table, ids = jnp.ones((2, 1), dtype), jnp.zeros(count, jnp.int32)
    splits, weights = jnp.array([0, count], jnp.int32), jnp.ones(count, jnp.float32)

    def forward(table, weights=None):
        operands = BagOperands(table, ids, splits, weights=weights)
        return embedding_bags([Bag("ragged", 1)], [operands], path)[0][0].astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(forward))(table)
    assert gradient.dtype == dtype
    assert gradient.tolist() == [[count], [0]]
    rematerialized = jax.grad(jax.checkpoint(forward))(table)
    assert rematerialized.tolist() == [[count], [0]]
    mapped = jax.vmap(jax.grad(forward))(jnp.stack([table, 2 * table]))
    assert mapped.tolist() == [[[count], [0]]] * 2
    # Of weights alone, the table has no tangent.
    assert jax.grad(forward, 1)(table, weights).tolist() == [1] * count
    if path == "xla":
        _, tangent = jax.jvp(forward, (table,), (2 * table,))
        assert tangent.tolist() == 2 * count


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_narrow_ids_do_not_turn_padding_into_a_row(dtype):
    table, ids = jnp.ones((300, D)), jnp.array([1, 2, 3], dtype)
    operands = BagOperands(table, ids, jnp.array([0, 2], jnp.int32))  # the last entry is padding
    found, rows = row_gradients(Bag("ragged", 1), operands, jnp.ones((1, D)))
    np.testing.assert_array_equal(found, [1, 2, 300])
    np.testing.assert_array_equal(rows, [[1] * D, [1] * D, [0] * D])


def test_sparse_update_takes_them_and_no_table_sized_array_is_made():
    bag, operands = CASES["ragged weighted mean"]
    large = jax.ShapeDtypeStruct((1_000_000, D), jnp.float32)

    def gradients(table, gradient):
        return row_gradients(bag, operands._replace(table=table), gradient)

    made = jax.make_jaxpr(gradients)(large, jnp.ones((3, D)))
    assert all(v.aval.size < 1000 for equation in made.eqns for v in equation.outvars)

    def loss(table):
        return jnp.sum(embedding_bags([bag], [operands._replace(table=table)], "xla")[0][0])

    ids, rows = row_gradients(bag, operands, jnp.ones((3, D)))
    updated, _ = sparse_update(SGD(learning_rate=0.5), TABLE, {}, ids, rows, 0)
    np.testing.assert_allclose(updated, TABLE - 0.5 * jax.grad(loss)(TABLE), rtol=1e-6)
