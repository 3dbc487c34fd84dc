"""Training of sharded embedding tables on TPU, under explicit collectives."""

from .checkpoint import Checkpointer, Restored
from .embedding import ShardedEmbedding
from .engines.planner import ShardingPlan, plan_tables
from .module import Embedding
from .state import EmbeddingState
from .trainer import Trainer, TrainState

__all__ = [
    "Checkpointer",
    "Embedding",
    "EmbeddingState",
    "Restored",
    "ShardedEmbedding",
    "ShardingPlan",
    "TrainState",
    "Trainer",
    "plan_tables",
]
