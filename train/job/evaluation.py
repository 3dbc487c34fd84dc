"""Predicts examples that are not trained on, and says how well."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..metrics import StreamingMetrics
from ..trainer import Trainer, TrainState
from .feeding import feed
from .watch import figures, gather


def evaluate(
    trainer: Trainer,
    state: TrainState,
    examples: Any,
    batch_size: int,
    max_batches: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """AUC, log loss and calibration of a state, but where labels are all alike, and how many ids were bad.

    Args:
      trainer: of the state.
      state: to evaluate.
      examples: to predict.
      batch_size: B, over all hosts.
      max_batches: how many at most; None for all.
      stop: asked before each batch; where it says so, there are no figures but None.

    Raises:
      ValueError: if a logit or label is not finite.
    """
    metrics, bad_ids = StreamingMetrics(), 0
    fed = feed(trainer, examples, batch_size, shuffle=False, num_epochs=1)
    for batch, _ in itertools.islice(fed, max_batches):
        if stop():
            return None
        logits = trainer.predict(state, batch)
        arrays = (logits, batch.labels, batch.mask, batch.features.bad_ids)
        logits, labels, mask, bad = map(np.asarray, gather(trainer, arrays))
        bad_ids += int(bad.sum())
        if not np.isfinite([logits[mask > 0], labels[mask > 0]]).all():
            raise ValueError(
                "evaluation gives NaN or infinity; look for bad dense features, labels or weights in the evaluation data."
            )
        metrics.update(labels, logits, mask)
    return figures(metrics) | {"bad_ids": bad_ids}
