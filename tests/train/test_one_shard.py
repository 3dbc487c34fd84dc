"""One device: trained as eight are, without a copy of the table, natively or in plain JAX."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxembed import FeatureConfig, RaggedTensor, TableConfig
from jaxembed.backends import use_backend
from jaxembed.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam
from jaxembed.train import ShardedEmbedding

OPTIMIZERS = {
    "sgd": SGD(0.1),
    "adagrad": Adagrad(0.1, clipvalue=0.5),
    "momentum": AdagradMomentum(0.1, 0.9),
    "ftrl": FTRL(0.1),
    "adam": Adam(0.1),
    "one by one": Adagrad(0.1, use_gradient_accumulation=False),
    "not lazy": Adam(0.1, lazy_adam=False),
}


def embedding(num_devices, optimizer, plan="mod", rows=50):
    config = {
        "a": FeatureConfig(TableConfig(rows, 8, combiner="mean", name="a")),
        "b": FeatureConfig(TableConfig(20, 8, combiner="sum", name="b")),
    }
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("devices",))
    return ShardedEmbedding(config, optimizer, mesh, plan=dict.fromkeys(config, plan))


def batch(seed, rows=50):
    """Bags with duplicates and bad ids, and weights of one feature."""
    rng = np.random.default_rng(seed)
    splits = np.concatenate([[0], np.cumsum(rng.integers(0, 6, 16))]).astype(np.int32)
    ids = rng.integers(-1, rows + 1, splits[-1]).astype(np.int32)
    weights = rng.uniform(0.5, 2, splits[-1]).astype(np.float32)
    inputs = {"a": RaggedTensor(ids, splits), "b": rng.integers(0, 20, 16).astype(np.int32)}
    return inputs, {"a": RaggedTensor(weights, splits), "b": None}


def train(own, rows=50, steps=3):
    state, outputs = own.init(jax.random.key(0)), []
    for step in range(steps):
        placed, weights = own.shard_batch(*batch(step, rows))
        out = own.lookup(state, placed, weights)
        outputs.append(jax.tree.map(np.asarray, out))
        state = own.apply_gradients(state, placed, jax.tree.map(lambda x: x + 1, out), weights)
    return outputs, jax.tree.map(np.asarray, own.to_canonical(state)[:2])


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(
            (name, "auto")
            if name in ("adagrad", "not lazy")
            else pytest.param(name, "auto", marks=pytest.mark.slow)
            for name in OPTIMIZERS
        ),
        pytest.param("sgd", "xla", marks=pytest.mark.slow),
        ("adagrad", "xla"),
    ],
)
def test_one_device_trains_as_eight(name, backend):
    optimizer = OPTIMIZERS[name]
    wanted = train(embedding(8, optimizer))
    with use_backend(backend):
        found = train(embedding(1, optimizer))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize("plan", ["div", "table", "column", "replicated"])
def test_whatever_the_plan(plan):
    wanted, found = train(embedding(1, Adagrad(0.1))), train(embedding(1, Adagrad(0.1), plan))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize("backend", ["auto", "xla"])
@pytest.mark.parametrize("optimizer", [SGD(0.1), Adagrad(0.1), Adam(0.1)], ids=lambda o: o.name)
def test_no_table_is_copied(optimizer, backend):
    rows = 4099
    own = embedding(1, optimizer, rows=rows)
    placed, weights = own.shard_batch(*batch(0, rows))

    def step(state, placed, weights):
        out = own.lookup(state, placed, weights)
        return own.apply_gradients(state, placed, jax.tree.map(lambda x: x + 1, out), weights)

    with use_backend(backend):
        state = own.init(jax.random.key(0))
        compiled = jax.jit(step, donate_argnums=0).lower(state, placed, weights).compile()
    shape = next(table.shape for table in state.tables.values() if table.shape[0] >= rows)
    copies = re.findall(rf"= f32\[{shape[0]},{shape[1]}\]\S* copy\(", compiled.as_text())
    assert not copies
    table_bytes = sum(x.nbytes for x in jax.tree.leaves((state.tables, state.slots)))
    assert compiled.memory_analysis().alias_size_in_bytes >= table_bytes
    assert jnp.isfinite(step(state, placed, weights).step)
