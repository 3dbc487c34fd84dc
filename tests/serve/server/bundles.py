"""Bundles whose values say which version and row they are of, and a model that shows them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import convert_to_bundle
from jaxembed.optimizers import SGD
from jaxembed.train import Checkpointer, ShardedEmbedding

USERS, ITEMS = 50, 70
CONFIG = {
    "user": FeatureConfig(TableConfig(USERS, 4, name="users")),
    "history": FeatureConfig(TableConfig(ITEMS, 4, combiner="sum", name="items")),
}
MODEL = "tests.serve.server.bundles:model"
OPTIONS = {"model": MODEL, "dense_inputs": {"dense": 2}, "weighted": ("history",), "max_ids_per_row": 8}


def model(params, activations, dense):
    """`user`: version * 1000 + id; `history`: the weighted sum of ids; `version`: of the parameters."""
    user = activations["user"][:, 0]
    return {
        "history": activations["history"][:, 0] + dense["dense"].sum(axis=1),
        "user": user,
        "version": jnp.broadcast_to(params["version"], user.shape),
    }


def write_checkpoint(directory, versions):
    """A step for every version: users' rows are version * 1000 + id, items' rows are the id."""
    own = ShardedEmbedding(CONFIG, SGD(0.1), jax.make_mesh((1,), ("d",)))
    tables, slots, _ = own.to_canonical(own.init(jax.random.key(0)))
    with Checkpointer(directory, own, max_to_keep=len(versions)) as checkpointer:
        for version in versions:
            rows = {
                "users": version * 1000 + np.arange(USERS, dtype=np.float32),
                "items": np.arange(ITEMS, dtype=np.float32),
            }
            tables = {name: jnp.asarray(np.repeat(row[:, None], 4, axis=1)) for name, row in rows.items()}
            params = {"version": jnp.full((1,), float(version))}
            checkpointer.save(own.from_canonical(tables, slots, version), model=params)
    return directory


def add(checkpoint, out, version, **options):
    """Publishes a version."""
    return convert_to_bundle(checkpoint, out, step=version, **options)


def expected(version, users, histories, weights=None, dense=None):
    """What `model` gives for such rows."""
    weights = weights or [[1.0] * len(bag) for bag in histories]
    dense = np.zeros((len(users), 2)) if dense is None else np.asarray(dense)
    sums = [
        sum(w * i for w, i in zip(ws, bag, strict=True)) for ws, bag in zip(weights, histories, strict=True)
    ]
    return {
        "history": np.asarray(sums) + dense.sum(axis=1),
        "user": version * 1000.0 + np.asarray(users),
        "version": np.full(len(users), float(version)),
    }
