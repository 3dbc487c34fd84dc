"""Custom combiners in training: what serving_embedding_lookup gives, its gradients, and where their weights go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import (
    FeatureConfig,
    QuantizationConfig,
    RaggedTensor,
    SparseTensor,
    TableConfig,
    serving_embedding_lookup,
)
from jaxembed.combiners import CustomCombiner, register_combiner
from jaxembed.initializers import RandomUniform
from jaxembed.optimizers import SGD, Adagrad
from jaxembed.serve import EmbeddingForServing
from jaxembed.train import ShardedEmbedding
from jaxembed.train.checkpoint import Checkpointer

RATE = 0.3


@register_combiner("tests/attention")
def attention(valency, vectors, weights):
    """A softmax over the rows that are there, scaled by how many these are."""
    scores = jnp.where(jnp.arange(vectors.shape[0]) < valency, vectors @ weights, -jnp.inf)
    shares = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, initial=-1e9)))
    total = jnp.maximum(jnp.sum(shares), jnp.float32(1e-9))
    return valency.astype(jnp.float32) * (shares @ vectors) / total


@register_combiner("tests/last")
def last(valency, vectors):
    return jnp.tanh(vectors[jnp.maximum(valency - 1, 0)]) * jnp.float32(2)


ATTENTION = CustomCombiner(attention, 3, 8, RandomUniform(-1, 1), RATE)
POOLED = TableConfig(40, 8, name="pooled", combiner=ATTENTION, initializer=RandomUniform(-1, 1))
LAST = TableConfig(13, 8, name="last", combiner=CustomCombiner(last, 2), initializer=RandomUniform(-1, 1))
PLAIN = TableConfig(13, 8, name="plain", combiner="mean")
CONFIG = {
    "ragged": FeatureConfig(POOLED),
    "sparse": FeatureConfig(POOLED),
    "deep": FeatureConfig(LAST),
    "sequence": FeatureConfig(POOLED, max_sequence_length=2),
    "plain": FeatureConfig(PLAIN),
}


def batch(seed, rows):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 6, rows)

    def ragged(vocabulary):
        return RaggedTensor.from_row_lengths(
            rng.integers(0, vocabulary, lengths.sum()).astype(np.int32), lengths
        )

    def sparse(*shape, vocabulary):
        indices = np.argwhere(rng.random(shape) < 0.5)
        # Ids below 0 and weights of 0 are pruned: they have no row, and do not count.
        return SparseTensor(indices, rng.integers(-1, vocabulary, len(indices)).astype(np.int32), shape)

    inputs = {
        "ragged": ragged(40),
        "sparse": sparse(rows, 5, vocabulary=40),
        "deep": sparse(rows, 2, 3, vocabulary=13),
        "sequence": ragged(40),
        "plain": ragged(13),
    }
    weights = dict.fromkeys(inputs)
    for name in ("ragged", "sparse"):
        values = rng.uniform(0.5, 2, inputs[name].values.shape).astype(np.float32)
        if name == "sparse":
            values[::5] = 0
        weights[name] = dataclasses.replace(inputs[name], values=values)
    return inputs, weights


def embedding_of(exchange="auto", devices=8, plan=None):
    mesh = jax.make_mesh((devices,), ("devices",), devices=jax.devices()[:devices])
    return ShardedEmbedding(CONFIG, Adagrad(0.1), mesh, exchange=exchange, plan=plan)


def cotangents(seed, activations):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=a.shape).astype(np.float32)) for k, a in activations.items()}


@pytest.mark.parametrize("rows", [pytest.param(16, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("exchange", [pytest.param("all_gather", marks=pytest.mark.slow), "all_to_all"])
def test_lookup_equals_serving(exchange, rows):
    embedding = embedding_of(exchange)
    state = embedding.init(jax.random.key(0))
    inputs, weights = batch(rows, rows)
    for given in (None, weights):
        expected = serving_embedding_lookup(
            inputs, given, embedding.embedding_tables(state), CONFIG, combiner_weights=state.combiner_weights
        )
        actual = embedding.lookup(state, inputs, given)
        for name, value in expected.items():
            assert actual[name].shape == value.shape
            np.testing.assert_allclose(actual[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


@register_combiner("tests/total")
def total(valency, vectors):
    return vectors.sum(0)


@pytest.mark.parametrize("quantization", [None, QuantizationConfig(5, -1.003, 1)])
def test_rows_of_low_precision_are_combined_in_float32(quantization):
    """Their weighted differences are less than bfloat16 holds beside them."""
    table = TableConfig(
        4, 8, name="t", combiner=CustomCombiner(total, 2), dtype=jnp.bfloat16, quantization_config=quantization
    )
    config = {"f": FeatureConfig(table)}
    embedding = ShardedEmbedding(config, SGD(0.1), jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]))
    rows = np.array([[1], [-1], [0.5], [-0.5]]).repeat(8, 1).astype(jnp.bfloat16)
    state = embedding.from_canonical({"t": rows}, {"t": {}}, 0)
    ids = RaggedTensor.from_lists([[0, 1], [2, 3], [1]])
    weights = {"f": dataclasses.replace(ids, values=np.float32([1.0019, 1, 1.0019, 1, 1]))}
    served = EmbeddingForServing(config, embedding.embedding_tables(state))
    for given in (weights, None):
        trained = embedding.lookup(state, {"f": ids}, given)["f"]
        assert trained.dtype == jnp.bfloat16
        np.testing.assert_array_equal(trained, served({"f": ids}, given)["f"])
        assert (trained[:2] != 0).all() or given is None
    gradient = {"f": jnp.ones((3, 8), jnp.bfloat16)}
    tables = embedding.to_canonical(embedding.apply_gradients(state, {"f": ids}, gradient, weights))[0]
    np.testing.assert_allclose(np.float32(tables["t"][:, 0]), [0.9, -1.2, 0.4, -0.6], atol=0.01)


def test_rows_of_padding_have_no_ids():
    embedding, real = embedding_of(), np.arange(16) % 3 > 0
    (batch_of_all, _), (masked, _) = (embedding.shard_batch(*batch(0, 16), mask) for mask in (None, real))
    for name, counts in batch_of_all.valencies.items():
        of_rows = np.asarray(counts).reshape(16, -1) * real[:, None]
        np.testing.assert_array_equal(np.asarray(masked.valencies[name]).reshape(16, -1), of_rows)
        assert of_rows.any()


def test_gradients_of_padding_are_left_out_where_they_are_nan():
    """A function that divides by the valency makes 0 * inf of them."""

    def weighted_mean(valency, vectors, weights):
        return jnp.sum(vectors * weights[0], axis=0) / valency.astype(jnp.float32)

    combiner = CustomCombiner(weighted_mean, 2, 1, lambda key, shape, dtype: jnp.ones(shape, dtype), RATE)
    table = TableConfig(4, 2, name="t", combiner=combiner)
    own = ShardedEmbedding(
        {"a": FeatureConfig(table), "b": FeatureConfig(table)},
        SGD(1.0),
        jax.make_mesh((2,), ("d",), devices=jax.devices()[:2]),
    )
    rows = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    state = own.from_canonical({"t": rows}, {"t": {}}, 0, {"t": np.float32([2])})
    ids = RaggedTensor.from_lists([[0], [1, 2], [3], [3]])
    batch, _ = own.shard_batch({"a": ids, "b": ids}, mask=np.float32([1, 1, 0, 0]))
    ones = np.float32([[1, 1], [1, 1], [0, 0], [0, 0]])
    new = own.apply_gradients(state, batch, {"a": ones, "b": 2 * ones})
    means = np.stack([rows[0], rows[1:3].mean(0)])
    np.testing.assert_allclose(new.combiner_weights["t"], [2 - RATE * 3 * means.sum()], rtol=1e-6)
    moved = 3 * 2 * np.float32([[1], [0.5], [0.5], [0]])
    np.testing.assert_allclose(own.to_canonical(new)[0]["t"], rows - moved, rtol=1e-6)
    nothing = own.apply_gradients(state, batch, {"a": 0 * ones, "b": 0 * ones})
    assert nothing.combiner_weights["t"] == 2
    np.testing.assert_array_equal(own.to_canonical(nothing)[0]["t"], rows)


def test_gradients_of_large_weights_are_summed_where_they_are_made():
    """Bag by bag they would be [B, num_weights]."""
    bags, dim = 256, 32

    def projected(valency, vectors, weights):
        return jnp.sum(vectors @ weights.reshape(dim, dim), axis=0) / valency.astype(jnp.float32)

    combiner = CustomCombiner(projected, 2, dim * dim, lambda key, shape, dtype: jnp.ones(shape, dtype))
    config = {"a": FeatureConfig(TableConfig(4, dim, name="t", combiner=combiner))}
    own = ShardedEmbedding(config, SGD(1.0), jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]))
    state = own.init(jax.random.key(0))
    sharded, _ = own.shard_batch({"a": RaggedTensor.from_lists([[0], [1, 2]] * (bags // 2))})
    gradients = {"a": jnp.ones((bags, dim))}
    compiled = jax.jit(own.apply_gradients).lower(state, sharded, gradients).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < bags * dim * dim * 4


@pytest.mark.parametrize("exchange", [pytest.param("all_gather", marks=pytest.mark.slow), "all_to_all"])
def test_updates_equal_gradients_of_serving(exchange):
    embedding = embedding_of(exchange, plan={"last": "column", "plain": "replicated"})
    state = embedding.init(jax.random.key(1))
    inputs, weights = batch(2, 12)
    tables, slots, _ = embedding.to_canonical(state)

    def serve(tables, combiner_weights):
        return serving_embedding_lookup(inputs, weights, tables, CONFIG, combiner_weights=combiner_weights)

    activations, vjp = jax.vjp(serve, tables, state.combiner_weights)
    gradients = cotangents(3, activations)
    by_table, by_combiner = vjp(gradients)
    sharded = embedding.shard_batch(inputs, weights)
    new = jax.jit(embedding.apply_gradients)(state, sharded[0], gradients, sharded[1])
    expected = state.combiner_weights["pooled"] - RATE * by_combiner["pooled"]
    assert float(jnp.max(jnp.abs(by_combiner["pooled"]))) > 0.1
    np.testing.assert_allclose(new.combiner_weights["pooled"], expected, rtol=1e-5, atol=1e-6)
    new_tables, _, step = embedding.to_canonical(new)
    assert int(step) == 1
    for name, gradient in by_table.items():
        rows, _ = Adagrad(0.1).update_rows(gradient, tables[name], slots[name], 0.1, 0)
        np.testing.assert_allclose(new_tables[name], rows, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_gradients_of_weights_and_of_combiners():
    embedding = embedding_of()
    state = embedding.init(jax.random.key(0))
    inputs, weights = batch(0, 16)
    tables = embedding.embedding_tables(state)

    def serve(weights, combiner_weights):
        out = serving_embedding_lookup(inputs, weights, tables, CONFIG, combiner_weights=combiner_weights)
        return sum(jnp.sum(jnp.sin(a)) for a in out.values())

    expected = jax.grad(serve, (0, 1), allow_int=True)(weights, state.combiner_weights)
    sharded, values = embedding.shard_batch(inputs, weights)

    def train(values, combiner_weights):
        own = dataclasses.replace(state, combiner_weights=combiner_weights)
        return sum(jnp.sum(jnp.sin(a)) for a in embedding.lookup(own, sharded, values).values())

    by_values, by_combiner = jax.jit(jax.grad(train, (0, 1)))(values, state.combiner_weights)
    actual = embedding.unshard_weights(by_values, inputs, weights)
    for name in ("ragged", "sparse"):
        np.testing.assert_allclose(actual[name].values, expected[0][name].values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_combiner["pooled"], expected[1]["pooled"], rtol=1e-5, atol=1e-6)


def test_weights_are_saved_resumed_and_served(tmp_path):
    embedding = embedding_of()
    state = embedding.init(jax.random.key(0))
    inputs, weights = batch(4, 8)
    gradients = cotangents(1, embedding.lookup(state, inputs, weights))
    state = embedding.apply_gradients(state, inputs, gradients, weights)
    with Checkpointer(tmp_path, embedding) as checkpointer:
        checkpointer.save(state)
    other = embedding_of(devices=2)
    with Checkpointer(tmp_path, other) as checkpointer:
        restored = checkpointer.restore().state
    np.testing.assert_array_equal(restored.combiner_weights["pooled"], state.combiner_weights["pooled"])
    served = EmbeddingForServing.restore(tmp_path)
    expected = embedding.lookup(state, inputs, weights)
    for name, value in served(inputs, weights).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_states_share_nothing_with_what_they_came_from():
    """Steps donate their state: what is shared would be gone, and end the process."""
    embedding, other = embedding_of(devices=2), embedding_of(devices=2, plan={"pooled": "div"})
    state = embedding.init(jax.random.key(0))
    canonical = (*embedding.to_canonical(state), state.combiner_weights)
    kept = jax.tree.map(np.array, canonical)
    drop = jax.jit(lambda s: jax.tree.map(lambda x: x * x.dtype.type(2), s), donate_argnums=0)
    for made in (embedding.from_canonical(*canonical), other.from_canonical(*canonical)):
        drop(made)
    jax.tree.map(np.testing.assert_array_equal, canonical, kept)
    tables, slots, step = embedding.to_canonical(state)
    drop(state)
    jax.tree.map(np.testing.assert_array_equal, (tables, slots, step), kept[:3])


def test_refusals():
    embedding = embedding_of(devices=1)
    state = embedding.init(jax.random.key(0))
    tables, slots, step = embedding.to_canonical(state)
    with pytest.raises(ValueError, match=r"combiner_weights must have the shapes .* got \{\}"):
        embedding.from_canonical(tables, slots, step)
    inputs, _ = batch(0, 8)
    activations = embedding.lookup(state, inputs)
    with pytest.raises(ValueError, match=r"needs its weights; take a state of `init`"):
        embedding.lookup(dataclasses.replace(state, combiner_weights={}), inputs)
    activations["ragged"] = activations["ragged"][:3]
    with pytest.raises(
        ValueError, match=r"'ragged' must have the shape of its activation, \[8, 8\], got \[3, 8\]"
    ):
        embedding.apply_gradients(state, inputs, activations)


def test_a_batch_without_rows():
    ours = ShardedEmbedding({"deep": FeatureConfig(LAST)}, Adagrad(0.1), jax.make_mesh((8,), ("d",)))
    state = ours.init(jax.random.key(0))
    empty = {"deep": RaggedTensor(np.zeros(0, np.int32), np.zeros(1, np.int32))}
    activations = ours.lookup(state, empty)["deep"]
    assert activations.shape == (0, 8)
    new = ours.apply_gradients(state, empty, {"deep": activations})
    jax.tree.map(np.testing.assert_array_equal, ours.to_canonical(new)[:2], ours.to_canonical(state)[:2])
