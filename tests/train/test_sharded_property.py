"""Whatever the inputs and shardings, ShardedEmbedding on 8 devices gives and trains what one device does."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxembed import FeatureConfig, RaggedTensor, SparseTensor, TableConfig, serving_embedding_lookup
from jaxembed.optimizers import Adagrad
from jaxembed.train import ShardedEmbedding

KINDS = ("dense", "dense3", "ragged", "sparse", "sparse3", "sequence", "sparse_sequence")
#: By feature: kind of its input, V, combiner, sharding, and whether it has weights. Together they have all of each.
FEW = (
    (
        5,
        ("ragged", 40, "mean", "table", True),
        ("sparse3", 3, "sqrtn", "mod", True),
        ("sequence", 40, "sum", "replicated", False),
        ("dense3", 3, "sum", "div", False),
    ),
    (
        8,
        ("sparse", 40, "sqrtn", "table", False),
        ("ragged", 3, "sum", "replicated", True),
        ("sparse_sequence", 40, "mean", "column", False),
        ("dense", 40, "sum", "mod", False),
    ),
)


def make_problem(seed, batch, features):
    """A configuration of these features, inputs and weights for it, and a plan."""
    rng = np.random.default_rng(seed)
    config, inputs, weights, plan = {}, {}, {}, {}
    for index, (kind, vocabulary, combiner, sharding, weighted) in enumerate(features):
        name, table = f"f{index}", TableConfig(vocabulary, 8, name=f"t{index}", combiner=combiner)
        config[name] = FeatureConfig(table, max_sequence_length=3 if "sequence" in kind else 0)
        plan[table.name] = sharding
        inputs[name] = make_input(rng, kind, batch, vocabulary)
        weights[name] = None
        if weighted and kind in ("ragged", "sparse", "sparse3"):
            values = rng.uniform(0.1, 2, inputs[name].values.shape).astype(np.float32)
            weights[name] = replace_values(inputs[name], values)
    return config, inputs, weights, plan


FEATURES = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from((3, 40)),
    st.sampled_from(("sum", "mean", "sqrtn")),
    st.sampled_from(("mod", "div", "table", "column", "replicated")),
    st.booleans(),
)
PROBLEMS = st.builds(
    make_problem, st.integers(0, 2**32 - 1), st.sampled_from((5, 8)), st.lists(FEATURES, min_size=1, max_size=3)
)


def make_input(rng, kind, batch, vocabulary):
    if kind.startswith("dense"):
        shape = (batch, 2, 3) if kind == "dense3" else (batch,)
        return rng.integers(0, vocabulary, shape).astype(np.int32)
    if kind in ("ragged", "sequence"):
        lengths = rng.integers(0, 6, batch)
        return RaggedTensor.from_row_lengths(
            rng.integers(0, vocabulary, lengths.sum()).astype(np.int32), lengths
        )
    shape = (batch, 2, 4) if kind == "sparse3" else (batch, 4)
    indices = np.argwhere(rng.random(shape) < 0.5)
    return SparseTensor(indices, rng.integers(0, vocabulary, len(indices)).astype(np.int32), shape)


def replace_values(ids, values):
    if isinstance(ids, RaggedTensor):
        return RaggedTensor(values, ids.row_splits)
    return SparseTensor(ids.indices, values, ids.dense_shape)


def check(problem, exchange):
    config, inputs, weights, plan = problem
    mesh = jax.make_mesh((8,), ("devices",))
    # One capacity, so that inputs of the same shapes find one program.
    embedding = ShardedEmbedding(config, Adagrad(0.1), mesh, plan=plan, exchange=exchange, capacity=64)
    state = embedding.init(jax.random.key(0))
    tables = jax.tree.map(np.asarray, embedding.embedding_tables(state))
    expected = serving_embedding_lookup(inputs, weights, tables, config)
    actual = embedding.lookup(state, inputs, weights)
    for name in config:
        assert actual[name].shape == expected[name].shape
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-6, atol=1e-6)
    return embedding, state, tables, expected


def check_update(problem, embedding, state, tables, activations):
    """A step, against that of serving's gradients on one device."""
    config, inputs, weights, _ = problem
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), activations)

    @jax.jit
    def step(tables):
        _, vjp = jax.vjp(lambda tables: serving_embedding_lookup(inputs, weights, tables, config), tables)
        (dense,), optimizer = vjp(gradients), Adagrad(0.1)
        return {
            table.name: optimizer.update_rows(dense[table], rows, optimizer.init_slots(rows.shape), 0.1, 0)
            for table, rows in tables.items()
        }

    found, slots, _ = embedding.to_canonical(embedding.apply_gradients(state, inputs, gradients, weights))
    for table, (rows, accumulators) in step(tables).items():
        np.testing.assert_allclose(found[table], rows, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(slots[table]["accumulators"], accumulators["accumulators"], rtol=1e-5)
    assert all(np.abs(found[table.name] - rows).max() > 0.01 for table, rows in tables.items())


@pytest.mark.parametrize(
    ("few", "exchange"),
    [
        (FEW[0], "all_gather"),
        (FEW[1], "all_to_all"),
        pytest.param(FEW[0], "all_to_all", marks=pytest.mark.slow),
        pytest.param(FEW[1], "all_gather", marks=pytest.mark.slow),
    ],
)
def test_lookups_and_updates_equal_those_of_one_device(few, exchange):
    batch, *features = few
    problem = make_problem(0, batch, features)
    check_update(problem, *check(problem, exchange))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@hypothesis.settings(max_examples=60)
@hypothesis.given(problem=PROBLEMS)
def test_lookup_equals_serving_at_length(problem, exchange):
    check(problem, exchange)
