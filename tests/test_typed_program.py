# pyright: strict
"""A program in strict types: to pyright, which `make lint` runs over it, nothing that is public here is unknown."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

import jaxembed as je
from jaxembed.checkpoint import convert_to_bundle
from jaxembed.optimizers import Adagrad
from jaxembed.serve import EmbeddingForServing, ServingFunction, ServingModel, export_model, load
from jaxembed.train import Checkpointer, ShardedEmbedding, plan_tables

Arrays = dict[str, jax.Array]


def model(params: jax.Array, activations: Arrays, dense: Arrays) -> jax.Array:
    """A score for each row."""
    return activations["watched"] @ params + dense["bias"][:, 0]


def test_from_configuration_to_server(tmp_path: Path):
    movie = je.TableConfig(vocabulary_size=8, dim=2, combiner="mean", name="movie")
    features = {"watched": je.FeatureConfig(movie)}
    ids = {"watched": je.RaggedTensor.from_lists([[0, 1], [], [3]])}
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    with je.use_backend("xla"):
        looked_up: Arrays = je.serving_embedding_lookup(ids, None, {movie: rows}, features)
    assert je.backend() in ("native", "xla")

    devices = jax.devices()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    mesh = Mesh(devices[:1], ("devices",))
    plan = plan_tables(
        features,
        Adagrad(0.1),
        num_shards=1,
        memory_per_device=2**30,
        ids_per_batch={"movie": 3},
        bags_per_batch={"movie": 3},
    )
    embedding = ShardedEmbedding(features, Adagrad(0.1), mesh, plan=plan)
    state = embedding.init(jax.random.key(0))
    batch, _ = embedding.shard_batch(ids)
    activations: Arrays = embedding.lookup(state, batch)
    state = embedding.apply_gradients(state, batch, activations)
    with Checkpointer(tmp_path / "checkpoints", embedding) as checkpointer:
        assert checkpointer.save(state, model={"params": np.ones(2, np.float32)}, metadata={"run": 1})
        restored = checkpointer.restore()
    assert (restored.step, restored.metadata) == (1, {"run": 1})

    served: EmbeddingForServing = load(tmp_path / "checkpoints").embedding
    function = ServingFunction(
        served, model, np.ones(2, np.float32), dense_inputs={"bias": 1}, max_batch_size=2
    )
    dense = {"bias": np.zeros((1, 1), np.float32)}
    scores: np.ndarray = function.warm_up()({"watched": [[0, 1]]}, dense=dense)
    assert scores.shape == (1,)
    assert [rung.batch for rung in function.rungs] == [1, 2]

    exported = export_model(model, np.ones(2, np.float32), features, dense_inputs={"bias": 1})
    convert_to_bundle(
        tmp_path / "checkpoints", tmp_path / "bundles", select_model=lambda m: m["params"], exported=exported
    )
    with ServingModel(tmp_path / "bundles", max_batch_size=2).warm_up() as opened:
        again: np.ndarray = opened({"watched": [[0, 1]]}, dense=dense)
        assert opened.signature.features[0].path == "watched"
    np.testing.assert_allclose(again, scores, rtol=1e-6)
    assert looked_up["watched"].tolist() == [[1.0, 2.0], [0.0, 0.0], [6.0, 7.0]]
