"""Small training jobs on Parquet files, for the tests of `jaxembed.train.job`."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxembed.checkpoint import read_checkpoint
from jaxembed.train.job import load_config

EXAMPLES, BATCH = 200, 16


def write_data(directory, nan_at=None):
    """Bags of very different lengths, with weights, one plain feature and two dense ones."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, EXAMPLES) * rng.integers(1, 9, EXAMPLES)
    bags = [rng.integers(0, 103, n).tolist() for n in lengths]
    dense = rng.normal(size=(EXAMPLES, 2)).astype(np.float32)
    if nan_at is not None:
        dense[nan_at:] = np.nan
    columns = {
        "bag": bags,
        "bag_weights": [rng.uniform(0.5, 2, n).astype(np.float32).tolist() for n in lengths],
        "id": rng.integers(0, 50, EXAMPLES),
        "x": dense[:, 0],
        "y": dense[:, 1],
        "clicked": rng.integers(0, 2, EXAMPLES),
    }
    path = directory / "data.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=64)
    return path


def write_config(directory, data, **changes):
    """A configuration file; `changes` are values by "a.b" keys."""
    values = {
        "out": str(directory / "run"),
        "data": {
            "kind": "parquet",
            "train": [str(data)],
            "evaluation": [str(data)],
            "labels": "clicked",
            "dense": ["x", "y"],
            "features": {
                "bag": {"vocabulary_size": 103, "weights": "bag_weights"},
                "id": {"vocabulary_size": 50},
            },
        },
        "model": {"dim": 8, "bottom": [8], "top": [8]},
        "training": {"batch_size": BATCH, "steps": 9, "evaluate_every": 6},
        "checkpoints": {"every": 3, "keep": 2},
        "logs": {"every": 2, "progress": False},
    }
    for key, value in changes.items():
        *names, last = key.split(".")
        table = values
        for name in names:
            table = table.setdefault(name, {})
        table[last] = value
    path = directory / "job.json"
    path.write_text(json.dumps(values))
    return path


def job(directory, data=None, **changes):
    """The configuration that `write_config` writes, loaded."""
    return load_config(write_config(directory, data or write_data(directory), **changes))


def assert_same_bits(one, other):
    """Two checkpoints of the same step hold the same bits: tables, slots and dense model."""
    import jax

    first, second = (read_checkpoint(path, slots=True) for path in (one, other))
    assert first.step == second.step
    trees = [(c.tables, c.slots, c.model) for c in (first, second)]
    leaves = [jax.tree.leaves_with_path(tree) for tree in trees]
    for (path, a), (other_path, b) in zip(*leaves, strict=True):
        assert path == other_path
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
