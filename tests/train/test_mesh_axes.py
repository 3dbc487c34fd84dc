"""Meshes of several axes, in any order, and of several hosts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.optimizers import SGD, Adagrad
from jaxembed.train import Checkpointer
from jaxembed.train.embedding import ShardedEmbedding
from jaxembed.train.engines.host_shards import check_host_shards, hosts_of_shards
from tests.train.test_sharded import CONFIG, USER, mesh


@pytest.mark.parametrize("axis", [pytest.param("y", marks=pytest.mark.slow), ("y", "x")])
def test_axes_of_the_mesh_in_any_order(tmp_path, axis):
    grid = jax.make_mesh((2, 4), ("x", "y"))
    config = {
        "odd": FeatureConfig(TableConfig(101, 8, name="odd")),
        "even": FeatureConfig(TableConfig(64, 4, name="even")),
    }
    ours = ShardedEmbedding(config, Adagrad(0.1), grid, axis=axis)
    plain = ShardedEmbedding(config, Adagrad(0.1), mesh(1))
    state, expected = ours.init(jax.random.key(0)), plain.embedding_tables(plain.init(jax.random.key(0)))
    tables = ours.embedding_tables(state)
    jax.tree.map(np.testing.assert_array_equal, tables, expected)
    # Arrays of the mesh's own go into one program with them.
    other = jax.device_put(np.ones(8, np.float32), ours.replicated)
    assert jax.jit(lambda tables, x: tables[config["odd"].table][0] @ x)(tables, other).shape == ()
    with Checkpointer(tmp_path, ours) as checkpointer:
        checkpointer.save(state)
        restored = checkpointer.restore().state
    back = ours.from_canonical(*ours.to_canonical(state))
    for same in (restored, back):
        jax.tree.map(np.testing.assert_array_equal, ours.to_canonical(same), ours.to_canonical(state))


def test_axes_of_the_mesh_in_another_order_say_what_cannot_be_compiled():
    grid = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    ours = ShardedEmbedding({"t": FeatureConfig(USER)}, Adagrad(0.1), grid, axis="y")
    state = jax.jit(ours.init)(jax.random.key(0))
    tables, slots, step = ours.to_canonical(state)
    back = jax.jit(lambda: ours.from_canonical(*jax.tree.map(np.asarray, (tables, slots, step))))()
    jax.tree.map(np.testing.assert_array_equal, ours.to_canonical(back), (tables, slots, step))
    message = (
        r"axes \('y',\) of a mesh of \('x', 'y'\) cannot be converted .* inside of jax\.jit.*; do it outside"
    )
    for call in (ours.to_canonical, ours.embedding_tables, ours.slots, lambda _: ours.to_canonical(state)):
        with pytest.raises(ValueError, match=message):
            jax.jit(call)(state)
        with pytest.raises(ValueError, match=r"or jax\.eval_shape"):
            jax.eval_shape(call, state)
    with pytest.raises(ValueError, match=message):
        jax.jit(ours.from_canonical)(tables, slots, step)
    # Of a gradient outside of jit the values are there.
    ids = np.array([0, 3], np.int32)
    found = jax.grad(lambda t: jnp.sum(ours.lookup(ours.from_canonical(t, slots, step), {"t": ids})["t"]))
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(found(tables)["user"]).any(1)), ids)


@pytest.mark.parametrize(
    ("axes", "found"),
    [
        (("data", "model"), None),
        (("model", "data"), None),
        (("data",), None),
        (("model",), r"shard 0 on hosts \[0, 1\]"),
    ],
    ids=str,
)
def test_shards_must_be_a_hosts_own(axes, found):
    """Two hosts of four devices, as rows of the mesh."""
    devices = np.array([types.SimpleNamespace(process_index=i // 4) for i in range(8)]).reshape(2, 4)
    grid = types.SimpleNamespace(devices=devices, axis_names=("data", "model"))
    hosts = hosts_of_shards(grid, axes)
    assert hosts.shape == {1: (2, 4) if axes == ("data",) else (4, 2), 2: (8, 1)}[len(axes)]
    if found is None:
        check_host_shards(hosts, 2, axes, grid.axis_names)
        return
    with pytest.raises(
        ValueError, match=rf"axis must span all hosts, .* got \('model',\) .* gives {found}; name all"
    ):
        check_host_shards(hosts, 2, axes, grid.axis_names)


def test_hosts_must_have_as_many_shards(monkeypatch):
    with pytest.raises(ValueError, match=r"gives \[1, 1, 2\] shards by host; name all axes"):
        check_host_shards(np.array([[0], [2], [1], [2]]), 3, ("d",), ("d",))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"gives \[8, 0\] shards by host; .* take a mesh of all devices"):
        ShardedEmbedding(CONFIG, SGD(), mesh())
