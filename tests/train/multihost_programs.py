"""One of several processes on CPU: trains, checkpoints and resumes, and comes to one mind with the others. Started by test_multihost."""

import json
import sys

import jax

if __name__ == "__main__":
    address, count, index, devices = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    jax.config.update("jax_num_cpu_devices", devices)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, index)
    # The second trainer takes what the first one compiled.
    jax.config.update("jax_compilation_cache_dir", f"{sys.argv[5]}-programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

import grain
import numpy as np
import optax
from flax import nnx

from jaxembed import FeatureConfig, TableConfig
from jaxembed.optimizers import SGD, Adagrad, Adam
from jaxembed.train import Checkpointer, ShardedEmbedding, Trainer, TrainState
from jaxembed.train.data import Examples, RaggedColumn, batches
from jaxembed.train.dlrm import DLRM
from jaxembed.train.engines import row_kernels, row_trial, windows

BATCH, STEPS = 16, 6
#: Small enough that saving takes several windows of each table.
windows.WINDOW_BYTES = 1024


def examples():
    """Bags whose lengths differ so much that hosts need different room for them."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, 200) * rng.integers(1, 12, 200)
    starts = np.cumsum(lengths) - lengths
    weights = rng.uniform(0.5, 2, lengths.sum()).astype(np.float32)
    features = {
        "bag": RaggedColumn(rng.integers(0, 103, lengths.sum()), starts, lengths, weights),
        "id": rng.integers(0, 50, 200),
    }
    dense = rng.normal(size=(200, 3)).astype(np.float32)
    return Examples(features, dense, (rng.random(200) < 0.5).astype(np.float32))


def trainer():
    config = {
        "bag": FeatureConfig(TableConfig(104, 8, combiner="mean", name="bag")),
        "id": FeatureConfig(TableConfig(52, 8, name="id")),
    }
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    # Hosts plan from different rows, and must come to one plan.
    shard = grain.sharding.ShardByJaxProcess() if jax.process_count() > 1 else None
    example = next(iter(batches(examples(), BATCH, seed=3, shard=shard, prefetch=0))).features
    own = ShardedEmbedding(
        config, Adagrad(0.1), mesh, plan="auto", example_batch=example, overrides={"id": "div", "bag": "mod"}
    )
    return Trainer(own, DLRM(3, 2, 8, dropout=0.3, batch_norm=True, rngs=nnx.Rngs(0)), optax.adam(1e-2))


def train(own, state, iterator, steps):
    losses = []
    for _ in range(steps):
        state, metrics = own.step(state, own.shard_batch(next(iterator)))
        losses.append(float(metrics["loss"]))
    return state, losses


def refused():
    """What is said of a model whose keys of dropout are others on each process."""
    features = {"a": FeatureConfig(TableConfig(8, 4, name="a"))}
    own = ShardedEmbedding(features, SGD(0.1), jax.make_mesh((jax.device_count(),), ("devices",)))
    rngs = nnx.Rngs(params=0, dropout=jax.process_index())
    try:
        Trainer(own, DLRM(3, 1, 4, dropout=0.5, rngs=rngs), optax.sgd(0.1)).init(jax.random.key(0))
    except ValueError as e:
        return str(e)


def chosen_kernels():
    """By table, where process 0 finds row kernels fast for both, and the others for the first alone."""
    tried = iter((True, jax.process_index() == 0))
    row_kernels._PLATFORMS = ("cpu",)
    row_trial.try_kernels = lambda *kind: row_trial.Trial(None, 1.0, 2.0 if next(tried) else 0.5)
    tables = (
        TableConfig(8, 128, name="a", optimizer=SGD(0.1)),
        TableConfig(8, 128, name="b", optimizer=Adam(0.1)),
    )
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    return ShardedEmbedding({t.name: FeatureConfig(t) for t in tables}, None, mesh).row_kernels


def main(directory):
    """Trains half the steps, saves, restores into a fresh trainer and goes on; prints what this process found."""
    shard = grain.sharding.ShardByJaxProcess() if jax.process_count() > 1 else None
    dataset = batches(examples(), BATCH, seed=3, shard=shard)
    own, iterator = trainer(), iter(dataset)
    state, losses = train(own, own.init(jax.random.key(0)), iterator, STEPS // 2)
    with Checkpointer(directory, own.embedding) as checkpointer:
        checkpointer.save(state.embedding, model=state.model, data=iterator.get_state())
    own, iterator = trainer(), iter(dataset)
    fresh = own.init(jax.random.key(1))
    with Checkpointer(directory, own.embedding) as checkpointer:
        restored = checkpointer.restore(model=fresh.model)
        iterator.set_state(restored.data)
        state = TrainState(restored.state, **restored.model)
        state, more = train(own, state, iterator, STEPS - STEPS // 2)
        checkpointer.save(state.embedding, model=state.model, data=iterator.get_state())
    found = {
        "losses": losses + more,
        "step": restored.step,
        "plan": [str(t) for t in own.embedding.plan.tables],
    }
    if jax.process_count() > 1:
        found |= {"refused": refused(), "row_kernels": chosen_kernels()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[5])
