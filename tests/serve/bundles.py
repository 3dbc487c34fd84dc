"""A bundle of the configuration of `requests`, with and without its dense model."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.checkpoint import convert_to_bundle
from jaxembed.optimizers import SGD
from jaxembed.serve import export_model
from jaxembed.train import Checkpointer, ShardedEmbedding
from tests.serve import requests

PARAMS = {"top": {"w": np.linspace(-1, 1, 4 + 8 + 24 + 4 + 8 + 3, dtype=np.float32)}, "bias": np.float32(0.5)}
DENSE = {"dense": 2, "age": ()}


def model(params, activations, dense):
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(activations)]
    hidden = jnp.concatenate([*flat, dense["dense"], dense["age"][:, None]], axis=1)
    return {
        "score": jax.nn.sigmoid(hidden @ params["top"]["w"] + params["bias"]),
        "parts": (hidden, [hidden[:, :2]]),
    }


def export(**options):
    arguments = {"dense_inputs": DENSE, "weighted": requests.WEIGHTED, "max_ids_per_row": requests.MAX_IDS}
    return export_model(model, PARAMS, requests.FEATURE_CONFIG, **(arguments | options))


def make_checkpoint(directory, feature_config=requests.FEATURE_CONFIG, params=PARAMS, seed=3):
    embedding = ShardedEmbedding(
        feature_config, SGD(0.1), jax.make_mesh((1,), ("d",), devices=jax.devices()[:1])
    )
    state = embedding.init(jax.random.key(seed))
    with Checkpointer(directory, embedding, asynchronous=False) as checkpointer:
        checkpointer.save(state, model={"params": params, "other": np.ones(3)})
    return directory


def convert(checkpoint, out, version=7, **options):
    convert_to_bundle(checkpoint, out, version=version, select_model=lambda m: m["params"], **options)
    return out


def dense_rows(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {"dense": rng.normal(size=(rows, 2)).astype(np.float32), "age": np.arange(rows, dtype=np.float32)}
