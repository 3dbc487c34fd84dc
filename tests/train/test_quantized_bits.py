"""Quantized tables are served as trained: to the bit, or to the last places of what is divided or weighted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxembed as je
from jaxembed.checkpoint import convert_to_bundle
from jaxembed.initializers import RandomUniform
from jaxembed.optimizers import SGD
from jaxembed.quantization import quantize_as_trained
from jaxembed.serve import EmbeddingForServing
from jaxembed.train import Checkpointer, Embedding, ShardedEmbedding
from tests.train.test_quantized_training import BAGS, CONFIG, ONE_ID, mesh


def served(embedding, state, inputs, weights=None):
    tables = {
        config: quantize_as_trained(table, config)
        for config, table in embedding.embedding_tables(state).items()
    }
    assert [isinstance(table, je.QuantizedTable) for table in tables.values()] == [True, True, False, False]
    return je.serving_embedding_lookup(inputs, weights, tables, CONFIG)


@pytest.mark.parametrize(
    ("devices", "exchange"),
    [
        pytest.param(1, "all_gather", marks=pytest.mark.slow),
        (8, "all_to_all"),
        pytest.param(4, "all_gather", marks=pytest.mark.slow),
    ],
)
def test_served_codes_equal_the_forward_bit_for_bit(devices, exchange):
    """Where the sums are made in the order of the bag: all but those of rows of several shards."""
    plan = (
        {"fine": "column", "coarse": "replicated", "many": "table", "plain": "table"} if devices == 4 else None
    )
    embedding = ShardedEmbedding(CONFIG, SGD(0.1), mesh(devices), exchange=exchange, plan=plan)
    state = embedding.init(jax.random.key(0))
    trained = embedding.lookup(state, ONE_ID)
    expected = served(embedding, state, ONE_ID)
    for name in ONE_ID:
        np.testing.assert_array_equal(trained[name], expected[name], err_msg=name)
    bags = dict.fromkeys(CONFIG, BAGS)
    trained, expected = embedding.lookup(state, bags), served(embedding, state, bags)
    for name in bags:
        np.testing.assert_array_equal(trained[name], expected[name], err_msg=name)


@pytest.mark.parametrize(("devices", "exchange"), [(1, "all_gather"), (8, "all_to_all")])
def test_served_means_and_weighted_sums_equal_the_forward_to_the_last_places(devices, exchange):
    """Serving divides where training multiplies by the inverse, and adds products unrounded: in bags of two 4 units at most."""
    above_zero = je.QuantizationConfig(16, 0.1, 0.9)
    tables = [
        je.TableConfig(31, 8, name=combiner, combiner=combiner, quantization_config=above_zero)
        for combiner in ("sum", "mean", "sqrtn")
    ]
    features = {table.name: je.FeatureConfig(table) for table in tables}
    embedding = ShardedEmbedding(features, SGD(0.1), mesh(devices), exchange=exchange)
    rng = np.random.default_rng(0)
    rows = {name: rng.uniform(0.1, 0.9, (31, 8)).astype(np.float32) for name in features}
    state = embedding.from_canonical(rows, {name: {} for name in features}, 0)
    codes = {table: quantize_as_trained(rows[table.name], table) for table in tables}
    lengths = rng.integers(0, 3, 64)
    ids = je.RaggedTensor.from_row_lengths(rng.integers(0, 31, lengths.sum()).astype(np.int32), lengths)
    inputs = dict.fromkeys(features, ids)
    values = dataclasses.replace(ids, values=rng.uniform(0.1, 3, ids.values.size).astype(np.float32))
    for weights in (None, dict.fromkeys(features, values)):
        trained = embedding.lookup(state, inputs, weights)
        expected = je.serving_embedding_lookup(inputs, weights, codes, features)
        for name in features:
            ulps = 0 if name == "sum" and weights is None else 4
            np.testing.assert_allclose(trained[name], expected[name], rtol=ulps * 2.0**-23, err_msg=name)


@pytest.mark.parametrize(
    ("devices", "exchange", "plan", "dtype"),
    [
        (1, "all_gather", None, "bfloat16"),
        (1, "all_gather", None, "float16"),
        (8, "all_to_all", "mod", "bfloat16"),
        (4, "all_gather", "column", "bfloat16"),
    ],
)
def test_rows_of_16_bits_and_many_buckets_are_served_as_trained(devices, exchange, plan, dtype):
    """No codes stand for so many buckets: what is served are values rounded to the table's type."""
    config = je.QuantizationConfig(1000, -1, 1)
    table = je.TableConfig(50, 8, name="t", combiner="sum", dtype=dtype, quantization_config=config)
    features = {"f": je.FeatureConfig(table)}
    plan = None if plan is None else {"t": plan}
    embedding = ShardedEmbedding(features, SGD(0.1), mesh(devices), exchange=exchange, plan=plan)
    rng = np.random.default_rng(0)
    state = embedding.from_canonical({"t": rng.uniform(-1, 1, (50, 8)).astype(table.dtype)}, {"t": {}}, 0)
    # Sums of two are the same in any order.
    ids = np.sort(rng.integers(0, 50, (64, 2)).astype(np.int32))
    inputs = {"f": je.RaggedTensor(ids.reshape(-1), np.arange(0, 129, 2))}
    (rows,) = embedding.embedding_tables(state).values()
    tables = {table: quantize_as_trained(rows, table)}
    expected = je.serving_embedding_lookup(inputs, None, tables, features)["f"]
    np.testing.assert_array_equal(np.float32(embedding.lookup(state, inputs)["f"]), np.float32(expected))
    step = embedding.apply_gradients(state, inputs, {"f": jnp.ones((64, 8))})
    new = np.float32(embedding.to_canonical(step)[0]["t"])
    counts = np.bincount(ids.reshape(-1), minlength=50)[:, None]
    np.testing.assert_allclose(new, np.float32(rows) - 0.1 * counts, atol=0.02)


def test_serving_divides_and_weighs_as_training_to_the_last_places(tmp_path):
    """Where rows are above 0, and bags of two ids at most, by 4 units."""
    config = {
        name: je.FeatureConfig(
            je.TableConfig(
                101,
                9,
                name=name,
                combiner=name,
                initializer=RandomUniform(0.1, 0.9),
                quantization_config=je.QuantizationConfig(256, 0.1, 0.9),
            )
        )
        for name in ("sum", "mean", "sqrtn")
    }
    own = ShardedEmbedding(config, SGD(0.1), mesh(1))
    state = own.init(jax.random.key(0))
    with Checkpointer(tmp_path / "steps", own) as checkpointer:
        checkpointer.save(state)
    served = EmbeddingForServing.restore(convert_to_bundle(tmp_path / "steps", tmp_path / "out").path)
    ids = je.RaggedTensor.from_lists([[1, 40], [], [7], [3, 3], [100, 0], [9, 8]])
    values = np.random.default_rng(0).uniform(0.1, 3, ids.values.size).astype(np.float32)
    inputs, weights = dict.fromkeys(config, ids), dict.fromkeys(config, dataclasses.replace(ids, values=values))
    for given in (None, weights):
        found, expected = served(inputs, given), own.lookup(state, inputs, given)
        for name in config:
            ulps = 0 if name == "sum" and given is None else 4
            np.testing.assert_allclose(found[name], expected[name], rtol=ulps * 2.0**-23, err_msg=name)


def test_module_looks_quantized_rows_up():
    module = Embedding(CONFIG, SGD(0.1), mesh(4), rngs=nnx.Rngs(0))
    expected = served(module.sharded, module.state.get_value(), ONE_ID)
    np.testing.assert_array_equal(module(ONE_ID)["fine"], expected["fine"])
