"""What a job is made of: its processes, its tables over all devices, and its dense model."""

import jax
from flax import nnx

from ..dlrm import DLRM
from ..embedding import ShardedEmbedding
from ..trainer import Trainer
from .config import JobConfig
from .feeding import first_batch
from .sources import Sources


def start_processes(config: JobConfig) -> None:
    """Joins the processes of the job, once; before anything asks JAX for its devices."""
    distributed = config.distributed
    if distributed.cpu_devices is not None and not jax.distributed.is_initialized():
        jax.config.update("jax_num_cpu_devices", distributed.cpu_devices)
    if distributed.enabled and not jax.distributed.is_initialized():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            distributed.coordinator_address, distributed.num_processes, distributed.process_id
        )


def build_trainer(config: JobConfig, sources: Sources) -> Trainer:
    """The tables, the DLRM and their optimizers, over all devices of all processes."""
    tables = config.tables
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    planned = {}
    if tables.plan == "auto":
        planned = {
            "example_batch": first_batch(
                sources.train, config.training.batch_size, config.training.seed
            ).features,
            "overrides": tables.overrides,
        }
    embedding = ShardedEmbedding(
        sources.feature_config,
        tables.optimizer.build(),
        mesh,
        plan=tables.plan,
        exchange=tables.exchange,
        engine=tables.engine,
        row_kernels=tables.row_kernels,
        capacity=tables.capacity,
        **planned,
    )
    model = DLRM(
        sources.num_dense,
        len(sources.feature_config),
        config.model.dim,
        bottom=config.model.bottom,
        top=config.model.top,
        concat_embeddings=config.model.concat_embeddings,
        dropout=config.model.dropout,
        batch_norm=config.model.batch_norm,
        rngs=nnx.Rngs(config.training.seed),
    )
    return Trainer(embedding, model, config.dense_optimizer.build())
