"""Whatever the inputs and shardings, ShardedEmbedding on 8 devices gives what serving_embedding_lookup gives."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxembed import FeatureConfig, RaggedTensor, SparseTensor, TableConfig, serving_embedding_lookup
from jaxembed.optimizers import Adagrad
from jaxembed.train import ShardedEmbedding

KINDS = ("dense", "dense3", "ragged", "sparse", "sparse3", "sequence", "sparse_sequence")


@st.composite
def problems(draw):
    """A configuration of up to three features, inputs and weights for it, and a plan."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.sampled_from((5, 8)))
    config, inputs, weights, plan = {}, {}, {}, {}
    for index in range(draw(st.integers(1, 3))):
        name, kind = f"f{index}", draw(st.sampled_from(KINDS))
        vocabulary = draw(st.sampled_from((3, 40)))
        table = TableConfig(
            vocabulary, 8, name=f"t{index}", combiner=draw(st.sampled_from(("sum", "mean", "sqrtn")))
        )
        length = 3 if "sequence" in kind else 0
        config[name] = FeatureConfig(table, max_sequence_length=length)
        plan[table.name] = draw(st.sampled_from(("mod", "div", "table", "column", "replicated")))
        inputs[name] = make_input(rng, kind, batch, vocabulary)
        weights[name] = None
        if kind in ("ragged", "sparse", "sparse3") and draw(st.booleans()):
            values = rng.uniform(0.1, 2, inputs[name].values.shape).astype(np.float32)
            weights[name] = replace_values(inputs[name], values)
    return config, inputs, weights, plan


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


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@hypothesis.settings(max_examples=2, derandomize=True)
@hypothesis.given(problem=problems())
def test_lookup_equals_serving(problem, exchange):
    check(problem, exchange)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@hypothesis.settings(max_examples=60)
@hypothesis.given(problem=problems())
def test_lookup_equals_serving_at_length(problem, exchange):
    check(problem, exchange)
