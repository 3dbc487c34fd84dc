"""Training looks quantized rows up, trains the rows themselves, and is served as the codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jaxembed as je
from jaxembed.buckets import simulate_quantization
from jaxembed.optimizers import SGD
from jaxembed.train import ShardedEmbedding

COARSE = je.QuantizationConfig(5, -0.5, 0.5)
TABLES = {
    "fine": je.TableConfig(
        101, 8, name="fine", combiner="sum", quantization_config=je.QuantizationConfig(256, -0.7, 0.9)
    ),
    "coarse": je.TableConfig(31, 8, name="coarse", combiner="sum", quantization_config=COARSE),
    "many": je.TableConfig(
        31, 4, name="many", combiner="sum", quantization_config=je.QuantizationConfig(1000, -1, 1)
    ),
    "plain": je.TableConfig(31, 8, name="plain", combiner="sum"),
}
CONFIG = {name: je.FeatureConfig(table) for name, table in TABLES.items()}
CONFIG["sequence"] = je.FeatureConfig(TABLES["coarse"], max_sequence_length=2)
ONE_ID = {name: np.arange(16, dtype=np.int32) * 7 % 31 for name in TABLES}
BAGS = je.RaggedTensor.from_lists([[1, 30, 2], [], [5, 5], [0, 1, 2, 3], [7], [8], [9, 9, 9], [3]])


def mesh(devices):
    return jax.make_mesh((devices,), ("devices",), devices=jax.devices()[:devices])


def test_values_are_simulated_and_padding_is_zero():
    embedding = ShardedEmbedding(CONFIG, SGD(0.1), mesh(8))
    state = embedding.init(jax.random.key(0))
    tables, _, _ = embedding.to_canonical(state)
    out = embedding.lookup(state, {**ONE_ID, "sequence": BAGS})
    rows = tables["coarse"][ONE_ID["coarse"]]
    np.testing.assert_array_equal(out["coarse"], simulate_quantization(rows, COARSE))
    assert set(np.unique(out["coarse"])) <= {-0.5, -0.25, 0.0, 0.25, 0.5}
    np.testing.assert_array_equal(out["plain"], tables["plain"][ONE_ID["plain"]])
    np.testing.assert_array_equal(out["sequence"][1], 0)
    np.testing.assert_array_equal(out["sequence"][4, 1], 0)


def test_rows_are_updated_as_without_quantization():
    """Straight-through: one SGD step moves the float rows by the gradient, also outside of the range."""
    embedding = ShardedEmbedding(CONFIG, SGD(0.01), mesh(4))
    state = embedding.init(jax.random.key(0))
    inputs = {"coarse": BAGS}
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32))
    new = embedding.to_canonical(embedding.apply_gradients(state, inputs, {"coarse": gradient}))[0]["coarse"]
    old = np.array(embedding.to_canonical(state)[0]["coarse"])
    assert (np.abs(old) > 0.5).any()
    np.subtract.at(old, BAGS.values, 0.01 * np.repeat(gradient, np.diff(BAGS.row_splits), axis=0))
    np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-7)


def test_gradients_of_weights_and_tables():
    """Of weights through the quantized rows, of tables as if there were no quantization."""
    embedding = ShardedEmbedding(CONFIG, SGD(0.1), mesh(4))
    state = embedding.init(jax.random.key(0))
    inputs = {"coarse": BAGS}
    weights = {"coarse": je.RaggedTensor(np.linspace(-1, 1, 15, dtype=np.float32), BAGS.row_splits)}
    batch, sharded = embedding.shard_batch(inputs, weights)

    def loss(state, weights):
        return jnp.sum(embedding.lookup(state, batch, weights)["coarse"] ** 2)

    value, (tables, found) = jax.value_and_grad(loss, (0, 1), allow_int=True)(state, sharded)
    rows = embedding.to_canonical(state)[0]["coarse"]

    def plain(rows, values):
        rows = rows + jax.lax.stop_gradient(simulate_quantization(rows, COARSE) - rows)
        ragged = {"coarse": je.RaggedTensor(values, BAGS.row_splits)}
        config = dataclasses.replace(TABLES["coarse"], quantization_config=None)
        features = {"coarse": je.FeatureConfig(config)}
        return jnp.sum(je.serving_embedding_lookup(inputs, ragged, {"coarse": rows}, features)["coarse"] ** 2)

    expected, gradients = jax.value_and_grad(plain, (0, 1))(rows, weights["coarse"].values)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    unsharded = embedding.unshard_weights(found, inputs, weights)["coarse"].values
    np.testing.assert_allclose(unsharded, gradients[1], rtol=1e-5, atol=1e-5)
    table_gradients = embedding.to_canonical(dataclasses.replace(state, tables=tables.tables))[0]["coarse"]
    np.testing.assert_allclose(table_gradients, gradients[0], rtol=1e-5, atol=1e-5)
