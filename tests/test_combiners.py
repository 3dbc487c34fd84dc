"""CustomCombiner means the same on ragged and on sparse ids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxembed as je
from jaxembed import kernel
from jaxembed.combiners import CustomCombiner, combiner_from_dict, register_combiner
from jaxembed.initializers import Constant
from jaxembed.serve import EmbeddingForServing, ServingFunction

ROWS = [[1, 2, 3], [], [4], [0, 0]]
TABLE = jnp.arange(20.0).reshape(5, 4) + 1


@register_combiner("test_sum")
def masked_sum(valency, vectors):
    valid = jnp.arange(vectors.shape[0]) < valency
    return jnp.sum(jnp.where(valid[:, None], vectors, 0), axis=0)


@register_combiner("test_scaled_first")
def scaled_first(valency, vectors, weights):
    return weights[0] * vectors[0] + weights[1] * valency.astype(jnp.float32)


def lookup(combiner, ids, weights=None, jit=False, **arguments):
    config = je.TableConfig(5, 4, combiner=combiner, name="t")

    def call(ids, weights, table):
        return je.serving_embedding_lookup(ids, weights, {"t": table}, je.FeatureConfig(config), **arguments)

    return (jax.jit(call) if jit else call)(ids, weights, TABLE)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", [je.RaggedTensor, je.SparseTensor])
def test_masked_sum_is_the_sum_combiner(kind, jit):
    ids = kind.from_lists(ROWS)
    weights = type(ids)(ids.values * 0 + np.float32(0.5), ids.row_splits) if kind is je.RaggedTensor else None
    np.testing.assert_allclose(
        lookup(CustomCombiner(masked_sum, 4), ids, weights, jit), lookup("sum", ids, weights, jit), rtol=1e-6
    )


def test_order_of_appearance_valency_and_weights_of_its_own():
    combiner = CustomCombiner(scaled_first, 2, num_weights=2, initializer=Constant(1.0))
    # Unsorted, with a pruned id: row 0 is [3, 1], row 1 is [2].
    ids = je.SparseTensor([[1, 0], [0, 5], [0, 0], [0, 9]], [2, 3, -1, 1], (3, 10))
    out = lookup(combiner, ids, combiner_weights={"t": jnp.array([2.0, 10.0])})
    expected = np.stack([2 * TABLE[3] + 20, 2 * TABLE[2] + 10, jnp.zeros(4)])
    np.testing.assert_allclose(out, expected)
    # Beyond max_valency ids are dropped.
    out = lookup(
        combiner, je.RaggedTensor.from_lists([[1, 2, 3, 4]]), combiner_weights={"t": jnp.array([0.0, 1.0])}
    )
    np.testing.assert_allclose(out, np.full((1, 4), 2.0))


@pytest.mark.parametrize("splits", [[0, 2, 1, 3], [0, 2, 2, 4], [-2, 0, 1, 3]])
def test_malformed_row_splits_are_refused_by_the_kernel(splits):
    if not kernel.available():
        pytest.skip("the kernel was not built")
    ids = je.RaggedTensor(jnp.array([0, 1, 3]), jnp.array(splits))
    with pytest.raises(jax.errors.JaxRuntimeError, match="row_splits must"):
        lookup(CustomCombiner(masked_sum, 4), ids, jit=True).block_until_ready()


@pytest.mark.parametrize("backend", ["native", "xla"])
@pytest.mark.parametrize("rows", [ROWS, [[], []], []])
@pytest.mark.parametrize("padded", [True, False])
def test_weights_of_ragged_ids_and_their_gradients(backend, rows, padded):
    if backend == "native" and not kernel.available():
        pytest.skip("the kernel was not built")
    ids = je.RaggedTensor.from_lists(rows)
    ids = ids.pad(9) if padded else ids
    place = jnp.arange(ids.values.shape[0])
    values = jnp.where(place < ids.row_splits[-1], place.astype(jnp.float32) - 2, jnp.nan)

    def loss(values, combiner):
        return jnp.sum(lookup(combiner, ids, je.RaggedTensor(values, ids.row_splits)) ** 2)

    with je.use_backend(backend):
        found, wanted = (
            jax.value_and_grad(loss)(values, combiner) for combiner in (CustomCombiner(masked_sum, 3), "sum")
        )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6)


def test_ids_beyond_the_valency_are_not_looked_at():
    config = {"a": je.FeatureConfig(je.TableConfig(5, 4, combiner=CustomCombiner(masked_sum, 2), name="t"))}
    serving = ServingFunction(EmbeddingForServing(config, {"t": TABLE}), weighted=["a"], max_batch_size=4)
    expected = np.stack([TABLE[0] + TABLE[1], 0 * TABLE[0], TABLE[4]])
    for bad in (99, -1, 2**31 + 1, -(2**40)):
        lists = [[0, 1, bad, bad], [], [4]]
        # Entries count in their order, whatever their columns.
        sparse = je.SparseTensor(
            [[0, 3], [2, 0], [0, 0], [0, 1], [0, 2]], np.array([0, 4, 1, bad, bad]), (3, 4)
        )
        feature = {"a": dataclasses.replace(config["a"], validate_weights_and_indices=False)}
        for ids in (je.RaggedTensor.from_lists(lists), sparse):

            def call(ids=ids, feature=feature, **arguments):
                return je.serving_embedding_lookup({"a": ids}, None, {"t": TABLE}, feature, **arguments)

            out, counts = call(count_bad_ids=True)
            assert int(counts["a"]) == 0
            for found in (out, call(), jax.jit(call)(ids), jax.jit(call)(), serving({"a": ids})):
                np.testing.assert_array_equal(found["a"], expected)
        for served in (lists, [np.array(row, np.int64) for row in lists]):
            np.testing.assert_array_equal(serving({"a": served})["a"], expected)
        flat = serving.pack_flat(np.array([0, 1, bad, bad, 4]), np.array([[4, 0, 1]]))
        np.testing.assert_array_equal(serving.run(flat)["a"], expected)
    for wrong in ([[0, 99, 1]], [[0, 1, 2], [2**31]], [[0, 1, True]], [[0, 1, "a"]]):
        with pytest.raises(ValueError, match=r"is outside of table|must be ints"):
            serving({"a": wrong})
    with pytest.raises(ValueError, match="id 9 at position 1, row 0 is outside"):
        lookup(CustomCombiner(masked_sum, 2), je.RaggedTensor.from_lists([[0, 9, 9], [1]]))


def test_gradients_reach_weights_and_table():
    combiner = CustomCombiner(scaled_first, 3, num_weights=2, initializer=Constant(1.0))
    config = je.FeatureConfig(je.TableConfig(5, 4, combiner=combiner, name="t"))
    ids = je.RaggedTensor.from_lists(ROWS)

    def loss(table, weights):
        return jnp.sum(
            je.serving_embedding_lookup(ids, None, {"t": table}, config, combiner_weights={"t": weights})
        )

    table_gradient, weight_gradient = jax.grad(loss, (0, 1))(TABLE, jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(weight_gradient, [TABLE[jnp.array([1, 4, 0])].sum(), 4 * (3 + 0 + 1 + 2)])
    expected = np.zeros((5, 4))
    expected[[1, 4, 0]] = 2.0
    np.testing.assert_allclose(table_gradient, expected)


def test_refusals():
    with pytest.raises(ValueError, match="`initializer` must be set"):
        CustomCombiner(scaled_first, 2, num_weights=2)
    with pytest.raises(ValueError, match="max_valency must be an int of at least 1, got 0"):
        CustomCombiner(masked_sum, 0)
    with pytest.raises(ValueError, match="combiner_computation must be callable"):
        CustomCombiner("sum", 2)
    for rate in (lambda: 0.1, float("nan"), True, "0.1"):
        with pytest.raises(ValueError, match="combiner_weights_learning_rate must be a finite number, got"):
            CustomCombiner(masked_sum, 2, combiner_weights_learning_rate=rate)
    combiner = CustomCombiner(scaled_first, 2, num_weights=2, initializer=Constant(1.0))
    with pytest.raises(ValueError, match=r"needs combiner_weights of shape \[2\], got None"):
        lookup(combiner, je.RaggedTensor.from_lists(ROWS))
    with pytest.raises(ValueError, match=r"must return \[D\] = \[4\], got \[\]"):
        lookup(CustomCombiner(lambda n, v: jnp.sum(v), 2), je.RaggedTensor.from_lists(ROWS))
    with pytest.raises(ValueError, match="is taken by"):
        register_combiner("test_sum")(lambda n, v: v[0])


def test_stored_by_name():
    combiner = CustomCombiner(scaled_first, 2, num_weights=2, initializer=Constant(0.5))
    assert combiner_from_dict(combiner.to_dict()) == combiner
    with pytest.raises(ValueError, match="cannot be stored: it has no registered name"):
        CustomCombiner(lambda n, v: v[0], 2).to_dict()
    unnamed = dataclasses.replace(combiner, initializer=lambda key, shape, dtype: jnp.ones(shape, dtype))
    with pytest.raises(ValueError, match=r"initializer of the CustomCombiner '.*' cannot be stored: .*lambda"):
        unnamed.to_dict()
    with pytest.raises(ValueError, match="unknown combiner 'nobody'"):
        combiner_from_dict(combiner.to_dict() | {"combiner_computation": "nobody"})
