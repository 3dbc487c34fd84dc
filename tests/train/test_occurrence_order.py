"""Occurrences of an id applied one by one: in one order on every mesh."""

import jax
import numpy as np
import pytest

from jaxembed import FeatureConfig, RaggedTensor, TableConfig
from jaxembed.optimizers import Adagrad
from jaxembed.train import ShardedEmbedding
from tests.train.test_sharded import EXCHANGES, mesh, ragged


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_occurrences_one_by_one_come_feature_after_feature_on_any_mesh(exchange):
    shared = TableConfig(3, 2, name="shared", combiner="sum")
    config = {
        "y": FeatureConfig(shared, max_sequence_length=2),
        "x": FeatureConfig(shared),
        "other": FeatureConfig(TableConfig(5, 2, name="other", combiner="sum")),
        "x2": FeatureConfig(shared),
    }
    rng = np.random.default_rng(4)
    inputs = {
        "y": ragged(rng, 13, 3),
        "x": ragged(rng, 13, 3),
        "other": ragged(rng, 13, 5),
        "x2": rng.integers(0, 3, (9, 2)).astype(np.int32),
    }
    gradients = {
        "y": rng.normal(size=(13, 2, 2)).astype(np.float32),
        "x": rng.normal(size=(13, 2)).astype(np.float32),
        "other": rng.normal(size=(13, 2)).astype(np.float32),
        "x2": rng.normal(size=(9, 2, 2)).astype(np.float32),
    }
    start = rng.normal(size=(3, 2)).astype(np.float32)
    weights = {name: None for name in inputs} | {
        "x": RaggedTensor(rng.uniform(1, 3, len(inputs["x"].values)).astype(np.float32), inputs["x"].row_splits)
    }
    occurrences = []
    bags = [inputs["x"].row_splits[i : i + 2] for i in range(13)]
    for row, (a, b) in enumerate(bags):
        occurrences += [
            (inputs["x"].values[i], gradients["x"][row] * weights["x"].values[i]) for i in range(a, b)
        ]
    occurrences += zip(inputs["x2"].reshape(-1), gradients["x2"].reshape(-1, 2), strict=True)
    bags = [inputs["y"].row_splits[i : i + 2] for i in range(13)]
    for row, (a, b) in enumerate(bags):
        occurrences += [(inputs["y"].values[i], gradients["y"][row, i - a]) for i in range(a, min(b, a + 2))]
    wanted, accumulators = start.astype(np.float64), np.full((3, 2), 0.1)
    for row, gradient in occurrences:
        accumulators[row] += np.square(gradient, dtype=np.float64)
        wanted[row] -= gradient / np.sqrt(accumulators[row])
    for devices in (1, 2, 8):
        optimizer = Adagrad(1.0, use_gradient_accumulation=False)
        embedding = ShardedEmbedding(config, optimizer, mesh(devices), exchange=exchange)
        state = embedding.init(jax.random.key(0))
        tables, slots, step = embedding.to_canonical(state)
        state = embedding.from_canonical(tables | {"shared": start}, slots, step)
        batch, sharded_weights = embedding.shard_batch(inputs, weights)
        state = embedding.apply_gradients(state, batch, gradients, sharded_weights)
        found = embedding.to_canonical(state)[0]["shared"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=f"{devices} devices")
