"""Programs that take the activations side by side from the kernel, where the model concatenates them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxembed as je
from jaxembed import bag_native, kernel
from jaxembed.bag import Bag, BagOperands
from jaxembed.quantization import quantize
from jaxembed.serve import EmbeddingForServing, ServingFunction

pytestmark = pytest.mark.skipif(not kernel.available(), reason="no native kernel")

V, DIMS = 50, {"a": 3, "b": 8, "c": 16}
RNG = np.random.default_rng(0)
TABLES = {name: RNG.normal(size=(V, dim)).astype(np.float32) for name, dim in DIMS.items()}
FEATURES = {
    name: je.FeatureConfig(je.TableConfig(V, dim, combiner="mean", name=name)) for name, dim in DIMS.items()
}
REQUEST = {name: [[1, 2, 3], [], [4]] for name in DIMS}


def side_by_side(params, activations, dense):
    return jnp.concatenate([activations[name] for name in DIMS], axis=1) @ params


def reordered(params, activations, dense):
    return jnp.concatenate([activations[name] for name in reversed(DIMS)], axis=1)


def apart(params, activations, dense):
    return {name: jnp.sum(value, axis=1) for name, value in activations.items()}


@pytest.mark.parametrize(("model", "merges"), [(side_by_side, True), (reordered, False), (apart, False)])
def test_what_the_model_does_with_them_decides(model, merges):
    params = RNG.normal(size=(27, 4)).astype(np.float32)
    serve = ServingFunction(EmbeddingForServing(FEATURES, TABLES), model, params, batch_sizes=(2, 4)).warm_up()
    texts = [program.compiled.as_text() for program in serve._programs.values()]
    assert serve._compiler._merges is merges
    if merges:
        assert not any(" concatenate(" in text for text in texts)
    assert not any(bag_native.MERGED_SCOPE in text for text in texts)
    assert serve.compile_count == len(serve.rungs) == 2
    with je.use_backend("xla"):
        plain = ServingFunction(EmbeddingForServing(FEATURES, TABLES), model, params, batch_sizes=(4,))
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6),
            serve(REQUEST),
            plain(REQUEST),
        )


def test_merged_results_are_those_of_separate_ones():
    """Types, batch sizes and sequences that differ go to outputs of their own."""
    rows = jnp.asarray(RNG.normal(size=(V, 7)).astype(np.float32))
    ids, splits = jnp.arange(12, dtype=jnp.int32), jnp.array([0, 0, 5, 12], jnp.int32)
    ragged, dense = Bag("ragged", 3, "sqrtn"), Bag("dense", 12)
    sequence = Bag("ragged", 3, sequence_length=4)
    bags = [ragged, dense, ragged, sequence, ragged, ragged, ragged, dense, ragged]
    tables = [rows, rows, rows.astype(jnp.bfloat16), rows, quantize(rows, "int8"), rows[:, :2]]
    tables += [rows.astype(jnp.bfloat16), rows, quantize(rows.astype(jnp.bfloat16), "int4")]
    operands = [
        BagOperands(table, ids, None if bag.layout == "dense" else splits)
        for bag, table in zip(bags, tables, strict=True)
    ]
    merged, bad = jax.jit(bag_native.merged_embedding_bags, static_argnums=0)(tuple(bags), operands)
    separate, also_bad = bag_native.embedding_bags(bags, operands)
    for ours, theirs in zip(merged, separate, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(bad, also_bad)
    looked_up = jax.jit(lambda operands: bag_native.merged_embedding_bags(bags, operands)[0])
    portable = jax.export.export(looked_up, platforms=["cpu"])(operands).call(operands)
    for ours, theirs in zip(portable, separate, strict=True):
        close = 1e-6 if theirs.dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=close, atol=close
        )
