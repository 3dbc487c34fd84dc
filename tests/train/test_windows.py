"""Canonical tables made a window at a time are those made at once, on every mesh and by both engines."""

import jax
import numpy as np
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.optimizers import Adagrad
from jaxembed.train import ShardedEmbedding
from jaxembed.train.engines import windows

from .checkpoint_programs import at_step


def embedding(rows, dim, mesh, **options):
    config = {f"t{i}": FeatureConfig(TableConfig(rows + 8 * i, dim, name=f"t{i}")) for i in range(3)}
    return ShardedEmbedding(config, Adagrad(0.1), jax.make_mesh(mesh, ("a", "b")), **options)


@pytest.mark.parametrize(
    ("rows", "dim", "mesh", "options"),
    [
        (1000, 8, (8, 1), {}),  # whole rows on each device
        (1003, 8, (8, 1), {}),  # columns
        (1002, 6, (8, 1), {}),  # rows and columns
        (1002, 5, (8, 1), {}),  # rows, and copies of them
        (1001, 16, (4, 2), {"axis": "a"}),
        (1002, 16, (4, 2), {}),
        (1000, 128, (8, 1), {"engine": "sparsecore"}),
        (1002, 20, (8, 1), {"engine": "sparsecore"}),
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
    tables, slots = again.abstract_canonical()
    for stack in again.stacks.values():
        for p in stack.placements:
            assert windows.window_rows(stack, p, tables[p.table.name].sharding, (dim,)) > 0
    found = again.to_canonical(state)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    shardings = [leaf.sharding for leaf in jax.tree.leaves((tables, slots))]
    assert [leaf.sharding for leaf in jax.tree.leaves(found[:2])] == shardings
