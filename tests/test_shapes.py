"""The shapes in the annotations of public functions: all are there, and what comes out has them."""

import importlib
import inspect
import subprocess
import sys
import typing
from collections.abc import Callable

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxembed as je
from jaxembed import shapes
from jaxembed.combiners import CustomCombiner
from jaxembed.optimizers import Adagrad, dedupe, dedupe_ids, sparse_update, update_unique
from jaxembed.serve import EmbeddingForServing
from jaxembed.train import ShardedEmbedding, Trainer
from jaxembed.train.data import batches, criteo_feature_config, synthetic_criteo
from jaxembed.train.dlrm import DLRM

MODULES = (
    "jaxembed",
    "jaxembed.optimizers",
    "jaxembed.combiners",
    "jaxembed.quantization",
    "jaxembed.train",
    "jaxembed.serve",
)
#: Arguments and results: keys of random numbers, arrays of any shape, and addresses, which are for programs of ours.
OTHERS = {"key", "agreed", "model", "params", "addresses"}


def public_functions():
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            found = getattr(importlib.import_module(module), name)
            if not callable(found):
                continue
            if not inspect.isclass(found):
                yield f"{module}.{name}", found
                continue
            for attribute, member in vars(found).items():
                member = getattr(member, "__func__", getattr(member, "fget", member))
                if inspect.isfunction(member) and (attribute == "__call__" or not attribute.startswith("_")):
                    yield f"{module}.{name}.{attribute}", member


def is_bare(hint):
    """Whether an array without a shape is in it, however deep."""
    parts = hint if isinstance(hint, list) else typing.get_args(hint)  # a list: the arguments of a Callable
    return hint in (jax.Array, np.ndarray) or any(map(is_bare, parts))


@pytest.mark.parametrize(("name", "function"), list(public_functions()))
def test_arrays_have_shapes(name, function):
    bare = {k for k, hint in function.__annotations__.items() if is_bare(hint)}
    assert not {function.__name__ if k == "return" else k for k in bare} - OTHERS


@pytest.mark.parametrize(
    ("hint", "bare"),
    [
        (jax.Array, True),
        (jax.Array | None, True),
        (dict[str, list[np.ndarray]], True),
        (Callable[[jax.Array], int], True),
        (shapes.Table, False),
        (dict[str, shapes.Table] | None, False),
    ],
)
def test_arrays_without_shapes_are_found(hint, bare):
    assert is_bare(hint) == bare


def check(function, result):
    """Compares what a function returned with its annotation."""
    function = getattr(function, "__func__", function)
    conforms(result, typing.get_type_hints(function)["return"])
    return result


def conforms(value, hint):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        for part, of in zip(value, arguments, strict=True):
            conforms(part, of)
    elif origin is dict:
        assert value
        for part in value.values():
            conforms(part, arguments[1])
    else:
        assert isinstance(value, hint), f"{hint}: {value.dtype}{value.shape}"


def test_of_the_core():
    ids = je.RaggedTensor.from_lists([[0, 1], [], [3]])
    assert isinstance(ids.values, shapes.AnyValues)
    sparse = je.SparseTensor.from_lists([[0, 1], [], [3]])
    assert isinstance(sparse.indices, shapes.AnyIndices)
    buckets = je.HashBuckets(10)
    check(buckets.rows, buckets.rows(np.arange(5)))
    combiner = CustomCombiner(lambda valency, vectors: vectors.sum(0), max_valency=2)
    combined = combiner(jnp.array([1, 2]), jnp.ones((2, 2, 3)))
    check(CustomCombiner.__call__, combined)


def test_of_optimizers():
    optimizer, table = Adagrad(0.1), jnp.ones((5, 2))
    slots = check(optimizer.init_slots, optimizer.init_slots(table.shape))
    ids, gradients = jnp.array([1, 1, 3]), jnp.ones((3, 2))
    check(dedupe_ids, dedupe_ids(ids, 5))
    unique, summed = check(dedupe, dedupe(ids, gradients, 5))
    check(sparse_update, sparse_update(optimizer, table, slots, ids, gradients, 0))
    rate = check(optimizer.learning_rate_at, optimizer.learning_rate_at(0))
    check(update_unique, update_unique(optimizer, table, slots, unique, summed, rate, 0))


@pytest.mark.slow
def test_of_training_and_serving():
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    features = dict(criteo_feature_config(10, 8))
    embedding = ShardedEmbedding(features, Adagrad(0.05), mesh)
    trainer = Trainer(embedding, DLRM(13, len(features), 8, rngs=nnx.Rngs(0)), optax.sgd(0.1))
    state = trainer.init(jax.random.key(0))
    for name, hint in typing.get_type_hints(type(state.embedding)).items():
        if name != "combiner_weights":  # there are none
            conforms(getattr(state.embedding, name), hint)
    batch = next(iter(batches(synthetic_criteo(64, 10), batch_size=32)))
    placed = trainer.shard_batch(batch)
    activations = embedding.lookup(state.embedding, placed.features)
    assert all(isinstance(leaf, shapes.Activations) for leaf in jax.tree.leaves(activations))
    check(trainer.apply_model, trainer.apply_model(state.params, placed.dense, activations))
    check(embedding.slots, embedding.slots(state.embedding))
    check(embedding.canonical_on_host, embedding.canonical_on_host(state.embedding))
    tables, _, _ = check(embedding.to_canonical, embedding.to_canonical(state.embedding))
    served = EmbeddingForServing(features, tables)
    assert all(isinstance(table, shapes.Table) for table in served.embedding_tables.values())


def test_jaxtyping_need_not_be_there():
    program = (
        "import sys; sys.modules['jaxtyping'] = None\n"
        "import jax, jaxembed, jaxembed.train, jaxembed.serve, jaxembed.shapes\n"
        "assert jaxembed.shapes.Table is jax.Array"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
