"""DLRM against its formula in numpy, under jit, over a mesh, and split into a pure function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed.train.dlrm import DLRM

B, K, F, D = 16, 3, 4, 8


def make_inputs(batch=B, dense=K):
    rng = np.random.default_rng(0)
    embeddings = {f"f{i}": rng.normal(size=(batch, D)).astype(np.float32) for i in range(F)}
    return rng.normal(size=(batch, dense)).astype(np.float32), embeddings


def mlp(layers, x):
    for layer in layers[:-1]:
        x = np.maximum(x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]), 0)
    return x @ np.asarray(layers[-1].kernel[...]) + np.asarray(layers[-1].bias[...])


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("num_dense", [0, K])
def test_equals_the_formula(num_dense, concat):
    model = DLRM(num_dense, F, D, bottom=(5,), top=(7, 6), concat_embeddings=concat, rngs=nnx.Rngs(0))
    dense, embeddings = make_inputs(dense=num_dense)
    vectors = [embeddings[f"f{i}"] for i in range(F)]
    if num_dense:
        vectors = [np.maximum(mlp(model.bottom.layers, dense), 0), *vectors]
    products = [(x * y).sum(1) for i, x in enumerate(vectors) for y in vectors[i + 1 :]]
    first = vectors if concat else vectors[:1] if num_dense else []
    expected = mlp(model.top.layers, np.concatenate([*first, np.stack(products, 1)], 1))[:, 0]
    run = nnx.jit(lambda model, *inputs: model(*inputs))
    found = run(model, jnp.asarray(dense), embeddings)
    assert (found.shape, found.dtype) == ((B,), jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(model, dense, vectors[-F:]), found)


def test_batch_norm_dropout_and_mask():
    model = DLRM(K, F, D, bottom=(5,), top=(7, 6), dropout=0.5, batch_norm=True, rngs=nnx.Rngs(0))
    dense, embeddings = make_inputs()
    padded = np.concatenate([dense, 100 + dense])
    more = {name: np.concatenate([x, 100 + x]) for name, x in embeddings.items()}
    model.set_attributes(nnx.Dropout, deterministic=True)
    found = model(padded, more, np.arange(2 * B) < B)[:B]
    x = dense @ np.asarray(model.bottom.layers[0].kernel[...])
    np.testing.assert_allclose(model.bottom.norms[0].mean[...], 0.01 * x.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found, model(dense, embeddings), rtol=1e-4, atol=1e-5)
    model.train()
    one, other = model(dense, embeddings), model(dense, embeddings)
    assert (np.asarray(one) != np.asarray(other)).any()
    with pytest.raises(ValueError, match=r"dropout in \[0, 1\), got 1"):
        DLRM(K, F, D, dropout=1, rngs=nnx.Rngs(0))


def test_split_model_is_a_pure_function_that_shards_over_the_batch():
    graphdef, state = nnx.split(DLRM(K, F, D, rngs=nnx.Rngs(0)))
    dense, embeddings = make_inputs()

    @jax.jit
    def serve(state, dense, embeddings):
        return nnx.merge(graphdef, state)(dense, embeddings)

    expected = serve(state, dense, embeddings)
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ("x",)), PartitionSpec("x"))
    found = serve(state, *jax.device_put((dense, embeddings), sharding))
    assert found.sharding.is_equivalent_to(sharding, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    exported = jax.export.export(serve)(state, dense, embeddings)
    np.testing.assert_allclose(exported.call(state, dense, embeddings), expected, rtol=1e-5, atol=1e-6)


def test_low_precision_embeddings_are_computed_in_float32():
    model = DLRM(K, F, D, rngs=nnx.Rngs(0))
    dense, embeddings = make_inputs()
    low = {name: jnp.asarray(x, jnp.bfloat16) for name, x in embeddings.items()}
    run = nnx.jit(lambda model, *inputs: model(*inputs))
    found, same = run(model, dense, low), run(model, dense, {k: x.astype(jnp.float32) for k, x in low.items()})
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, same)


def test_gradients_reach_every_parameter_and_every_embedding():
    graphdef, state = nnx.split(DLRM(K, F, D, rngs=nnx.Rngs(0)))
    dense, embeddings = make_inputs()

    def loss(state, embeddings):
        return jnp.sum(nnx.merge(graphdef, state)(dense, embeddings) ** 2)

    gradients = jax.jit(jax.grad(loss, (0, 1)))(state, embeddings)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))


def test_errors():
    model = DLRM(K, F, D, rngs=nnx.Rngs(0))
    dense, embeddings = make_inputs()
    with pytest.raises(ValueError, match=rf"embeddings must be 4 arrays of shape \({B}, {D}\)"):
        model(dense, list(embeddings.values())[:3])
    with pytest.raises(ValueError, match="combine sequence features first"):
        model(dense, {**embeddings, "f0": np.zeros((B, 2, D), np.float32)})
    with pytest.raises(ValueError, match=r"dense must be \[B, 3\]"):
        model(dense[:, :2], embeddings)
    with pytest.raises(ValueError, match="num_embeddings and dim of at least 1"):
        DLRM(1, 0, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="two vectors to interact"):
        DLRM(0, 1, 8, rngs=nnx.Rngs(0))
