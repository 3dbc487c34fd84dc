"""Watches losses, predictions and counts a few steps behind the devices, and stops what has diverged."""

from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..data import Batch
from ..engines.batch import FeatureLayout
from ..metrics import StreamingMetrics
from ..trainer import Trainer, TrainState

#: Steps that the host may be behind: reading a value sooner would make the devices wait for the host.
_BEHIND = 2


class TrainingDiverged(ValueError):
    """The loss or a parameter is NaN or infinite."""


class Watch:
    """Reads what steps returned once it is there.

    Args:
      trainer: whose steps they are.
      out: where the checkpoints are, for the error.
    """

    def __init__(self, trainer: Trainer, out: Any):
        self._out, self._pending = out, deque()
        self._trainer = trainer
        self._all_finite = jax.jit(_all_finite)
        self._said: set[str] = set()
        self._news: list[str] = []
        #: Step of the last checkpoint.
        self.last_good: int | None = None
        self.reset()

    def reset(self) -> None:
        """Starts the figures of `result` anew."""
        self._losses: list[float] = []
        self._metrics = StreamingMetrics(1 << 12)
        self._bad_ids = self._extra_rounds = 0

    def add(self, step: int, metrics: dict[str, jax.Array], batch: Batch) -> None:
        """Takes what step number `step` (from 1) returned.

        Raises:
          TrainingDiverged: if the loss of a step before is not finite.
        """
        arrays = (metrics["logits"], batch.labels, batch.mask, batch.features.bad_ids, metrics["rounds"])
        values = gather(self._trainer, arrays)
        self._pending.append((step, metrics["loss"], values, batch.features.layout.features))
        while len(self._pending) > _BEHIND:
            self._read()

    def finish(self, state: TrainState) -> None:
        """Reads all that is pending, and checks tables, slots and parameters: a state to be saved.

        Raises:
          TrainingDiverged: if anything is not finite.
        """
        while self._pending:
            self._read()
        if not bool(self._all_finite(state)):
            raise self._diverged(int(state.embedding.step), "a table, slot or parameter")

    def result(self) -> dict[str, float]:
        """Figures of the steps since `reset`.

        Returns:
          "loss", the mean; "auc", but where all labels were alike; "bad_ids", how many ids were outside [0, V);
          "extra_rounds", how many rounds of all_to_all there were beyond the first of each stack and step.
        """
        found = {"loss": float(np.mean(self._losses))} if self._losses else {}
        found |= {name: value for name, value in figures(self._metrics).items() if name == "auc"}
        return found | {"bad_ids": self._bad_ids, "extra_rounds": self._extra_rounds}

    def news(self) -> list[str]:
        """Lines on what was counted since the last call, once for each feature and stack."""
        news, self._news = self._news, []
        return news

    def _read(self) -> None:
        step, loss, values, features = self._pending.popleft()
        loss = float(loss)
        if not np.isfinite(loss):
            raise self._diverged(step, f"the loss ({loss})")
        logits, labels, mask = (np.asarray(x) for x in values[:3])
        if not np.isfinite(logits[mask > 0]).all():
            raise self._diverged(step, "a logit")
        self._losses.append(loss)
        self._metrics.update(labels, logits, mask)
        self._count(step, features, *values[3:])

    def _count(self, step: int, features: tuple[FeatureLayout, ...], bad_ids: Any, rounds: Any) -> None:
        for layout, count in zip(features, np.asarray(bad_ids).sum(0), strict=True):
            if not int(count):
                continue
            self._bad_ids += int(count)
            name, size = layout.path, layout.feature.table.vocabulary_size
            self._say_once(
                f"feature {name}",
                f"step {step:,}: {int(count):,} ids of feature {name!r} are outside [0, {size:,}): they give zeros and "
                "update nothing; bad_ids counts them from here on",
            )
        for stack, count in rounds.items():
            if int(count) <= 1:
                continue
            self._extra_rounds += int(count) - 1
            self._say_once(
                f"stack {stack}",
                f"step {step:,}: {int(count)} rounds of all_to_all for stack {stack!r}: a shard asked another for more "
                "rows than one has room for. Nothing is dropped, but the step takes longer; extra_rounds counts them "
                'from here on. If there are many, set tables.exchange to "all_gather"',
            )

    def _say_once(self, what: str, line: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._news.append(line)

    def _diverged(self, step: int, what: str) -> TrainingDiverged:
        kept = (
            f"the checkpoint of step {self.last_good} in {self._out} is whole"
            if self.last_good is not None
            else "no checkpoint was saved before"
        )
        return TrainingDiverged(
            f"training diverged: {what} is not finite at step {step}. Nothing was saved since; {kept}. Lower "
            "tables.optimizer.learning_rate or dense_optimizer.learning_rate, or look for bad dense features, "
            "labels or weights, and start again."
        )


def gather(trainer: Trainer, arrays: Any) -> Any:
    """[B] arrays of all hosts where every host can read them."""
    if jax.process_count() == 1:
        return arrays
    return trainer.replicate(arrays)


def figures(metrics: StreamingMetrics) -> dict[str, float]:
    """The result, or nothing where labels were all alike."""
    try:
        return metrics.result()
    except ValueError:
        return {}


def _all_finite(state: TrainState) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
