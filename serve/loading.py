"""load: everything that serving needs, from a checkpoint alone."""

import dataclasses
import pathlib
from typing import Any

from jaxembed.checkpoint import read_checkpoint

from .embedding import EmbeddingForServing


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint, restored for serving.

    Attributes:
      embedding: the tables and their feature configuration.
      params: the dense model as saved, nested dicts of arrays, or None.
      step: number of training steps taken.
      metadata: what the trainer put in.

    Examples:
      Of the checkpoint that the example of `jaxembed.train.Checkpointer` saves:

      >>> load("checkpoints").metadata
      {'run': 'first'}
    """

    embedding: EmbeddingForServing
    params: Any
    step: int
    metadata: dict[str, Any]


def load(path: str | pathlib.Path, step: int | None = None) -> Loaded:
    """Rebuilds the feature configuration, the tables (on CPU) and the dense model from a checkpoint.

    Args:
      path: the checkpoint directory, or one step in it; or a serving bundle, whose tables are mapped.
      step: which step, or version of a bundle; default: the latest whole one.

    Raises:
      FileNotFoundError: if there is no such whole step.
      ValueError: if the checkpoint does not fit its own feature configuration, or a combiner is not registered.

    Examples:
      Of the checkpoint that the example of `jaxembed.train.Checkpointer` saves:

      >>> import jaxembed as je
      >>> loaded = load("checkpoints")
      >>> loaded.embedding({"watched": je.RaggedTensor.from_lists([[0, 1]])})["watched"].shape
      (1, 2)
    """
    checkpoint = read_checkpoint(path, step)
    return Loaded(
        embedding=EmbeddingForServing(
            checkpoint.feature_config, checkpoint.tables, checkpoint.combiner_weights
        ),
        params=checkpoint.model,
        step=checkpoint.step,
        metadata=checkpoint.metadata,
    )
