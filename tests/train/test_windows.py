"""Canonical tables made a window at a time are those made at once, on every mesh and by both engines."""

import jax
import numpy as np
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.optimizers import Adagrad
from jaxembed.train import Checkpointer, ShardedEmbedding
from jaxembed.train.engines import windows

from .checkpoint_programs import at_step, same
from .processes import started


def embedding(rows, dim, mesh, **options):
    config = {f"t{i}": FeatureConfig(TableConfig(rows + 8 * i, dim, name=f"t{i}")) for i in range(3)}
    return ShardedEmbedding(config, Adagrad(0.1), jax.make_mesh(mesh, ("a", "b")), **options)


@pytest.mark.parametrize(
    ("rows", "dim", "mesh", "options"),
    [
        (1000, 8, (8, 1), {}),  # whole rows on each device
        (1003, 8, (8, 1), {}),  # columns
        pytest.param(1002, 6, (8, 1), {}, marks=pytest.mark.slow),  # rows and columns
        (1002, 5, (8, 1), {}),  # rows, and copies of them
        pytest.param(1001, 16, (4, 2), {"axis": "a"}, marks=pytest.mark.slow),
        (1002, 16, (4, 2), {}),
        (1000, 8, (4, 2), {"axis": ("b", "a")}),  # the devices in another order
        (1000, 128, (8, 1), {"engine": "sparsecore"}),
        pytest.param(1002, 20, (8, 1), {"engine": "sparsecore"}, marks=pytest.mark.slow),
    ],
)
def test_windows_give_the_same_bits(monkeypatch, rows, dim, mesh, options):
    if options.get("engine") == "sparsecore":
        pytest.importorskip("jax_tpu_embedding")
    own = embedding(rows, dim, mesh, **options)
    state = at_step(own, 3)
    expected = own.to_canonical(state)
    # About 70 rows: the last window overlaps the one before.
    monkeypatch.setattr(windows, "WINDOW_BYTES", 4 * dim * 70)
    again = embedding(rows, dim, mesh, **options)
    for (name, _), leaf in again._canonical._inner.items():
        assert windows.windows_of(*again._canonical._places[name], leaf.sharding, (dim,)) is not None
    found = again.to_canonical(state)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(again.abstract_canonical())]
    assert [leaf.sharding for leaf in jax.tree.leaves(found[:2])] == shardings
    on_host = again.canonical_on_host(state)
    jax.tree.map(np.testing.assert_array_equal, on_host, expected)
    for leaf in jax.tree.leaves(on_host[:2]):
        by_rows = leaf.sharding.shard_shape(leaf.shape)[1] == dim
        assert leaf.sharding.memory_kind == (
            "pinned_host" if by_rows and "b" not in options.get("axis", "") else "device"
        )


@pytest.mark.parametrize("plan", [{}, {"t0": "div", "t1": "replicated", "t2": "column"}])
def test_what_is_saved_from_the_hosts_memory_comes_back(monkeypatch, tmp_path, plan):
    monkeypatch.setattr(windows, "WINDOW_BYTES", 4 * 8 * 70)
    own = embedding(1000, 8, (8, 1), plan=plan)
    state = at_step(own, 3)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(own.canonical_on_host(state)[:2])}
    assert kinds == {"pinned_host"}
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(state)
        restored = checkpointer.restore().state
    assert same(own, restored, *own.to_canonical(state)[:2])
    assert same(own, state, *own.to_canonical(restored)[:2])


def there_and_back():
    """Neither rows nor columns are split over all devices."""
    config = {f"t{rows}": FeatureConfig(TableConfig(rows, 4, name=f"t{rows}")) for rows in (37, 11, 5)}
    for sharding in ("mod", "div", "table"):
        plan = dict.fromkeys(config, sharding)
        own = ShardedEmbedding(config, Adagrad(0.1), jax.make_mesh((8,), ("d",)), plan=plan)
        state = at_step(own, 3)
        jax.tree.map(np.testing.assert_array_equal, state, own.from_canonical(*own.to_canonical(state)))


#: XLA is told what to log of as it is loaded.
CONVERT = """
import jax
from jaxembed.train.engines.canonical import CanonicalTables
from tests.train.test_windows import there_and_back

jax.config.update("jax_num_cpu_devices", 8)
there_and_back()
"""
#: With it, the compiler is left to find a way by itself, and warns.
CONTROL = "CanonicalTables._gathered = lambda self, stack, key, array: array\n"


@pytest.mark.slow
def test_the_compiler_warns_of_no_copies():
    programs = [CONVERT, CONVERT.replace("there_and_back()\n", f"{CONTROL}there_and_back()\n")]
    commands = [("-c", program) for program in programs]
    with started(commands, TF_CPP_MIN_LOG_LEVEL="1", GLOG_minloglevel="1") as processes:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert ["full rematerialization" in error for error in errors] == [False, True], errors
