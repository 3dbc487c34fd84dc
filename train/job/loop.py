"""The loop of a training job: step, log, evaluate, save; resumed at the very batch it had come to."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from pydantic import TypeAdapter

from jaxembed.checkpoint import CheckpointError
from jaxembed.checkpoint.files import absolute_path
from jaxembed.checkpoint.scratch import check_place

from ..checkpoint import Checkpointer, Restored
from ..hosts import largest, on_all
from ..saving import amend_metadata
from ..trainer import Trainer, TrainState
from .building import build_trainer, start_processes
from .config import JobConfig
from .evaluation import evaluate
from .feeding import feed
from .frequency import IdFrequency
from .origin import check_hosts, difference
from .preemption import Preemption
from .report import Report
from .sources import Sources, open_sources
from .watch import Watch


@dataclasses.dataclass(frozen=True)
class Result:
    """What a job came to.

    Attributes:
      step: number of steps taken.
      preempted: whether SIGTERM stopped it; the same job started again goes on.
      history: for each evaluation since step 0, its step, the training loss and AUC since the one before, or since
        the job went on, and its figures, as "step", "train" and "evaluation".
      checkpoints: where they are.
      trainer: what trained.
      state: after the last step.
    """

    step: int
    preempted: bool
    history: list[dict[str, Any]]
    checkpoints: Path
    trainer: Trainer
    state: TrainState


def train(config: JobConfig, sources: Sources | None = None) -> Result:
    """Runs a job from its last checkpoint, or from the start.

    Args:
      config: of the job.
      sources: what `config.data` says, where it is open already.

    Raises:
      TrainingDiverged: if the loss or a parameter is not finite; the last checkpoint stays as it is.
      ValueError: if the data or a checkpoint does not fit the configuration, or another process writes to `config.out`.
    """
    start_processes(config)
    # Of a step: that there can be a folder of them is part of it.
    place = absolute_path(config.out) / "checkpoints" / "0"
    on_all(lambda: check_place(place), "write to `out`")
    sources = sources or on_all(lambda: open_sources(config.data, config.model.dim), "open the data")
    job = Job(config, sources)
    try:
        return job.run()
    finally:
        job.close()


class Job:
    """A job that is open: trainer, checkpoints and reports.

    Args:
      config: of the job.
      sources: its data.
    """

    def __init__(self, config: JobConfig, sources: Sources):
        training = config.training
        num_shards = jax.device_count()
        if training.batch_size % num_shards:
            raise ValueError(
                f"training.batch_size must be a multiple of the {num_shards} devices, got {training.batch_size}."
            )
        self._config, self._sources, self._out = config, sources, Path(config.out).expanduser()
        self._total = training.steps or -(-training.epochs * len(sources.train) // training.batch_size)
        self.trainer: Trainer = build_trainer(config, sources)
        self._check_batch_size()
        self._frequency = IdFrequency(sources.feature_config)
        self._first = 0
        self._checkpointer = Checkpointer(
            self._out / "checkpoints", self.trainer.embedding, max_to_keep=config.checkpoints.keep
        )
        self._report: Report | None = None
        self._watch = Watch(self.trainer, self._checkpointer.directory)
        self._evaluation: dict[str, float] = {}
        self._history: list[dict[str, Any]] = []
        #: Of an evaluation that SIGTERM stopped, what was trained until it: the run that goes on makes it up.
        self._pending: dict[str, Any] | None = None
        self._news: list[str] = []

    def close(self) -> None:
        """Waits for the checkpoint under way."""
        if self._report is not None:
            self._report.close()
        self._checkpointer.close()

    def run(self) -> Result:
        """Trains to the end, or until SIGTERM."""
        config = self._config
        self._checkpointer.claim()
        check_hosts(self._sources.origin)
        state, place = self._start()
        step = first = self._first = int(state.embedding.step)
        self._report = report = Report(
            config.logs, self._out, config.training.batch_size, step, max(self._total, step)
        )
        embedding = self.trainer.embedding
        if embedding.plan is not None:
            report.say(str(embedding.plan))
        if by_kernel := [name for name, kernels in embedding.row_kernels.items() if kernels == "pallas"]:
            report.say(f"rows of {len(by_kernel)} of {len(embedding.row_kernels)} tables are moved by kernels")
        if step:
            report.say(f"goes on from step {step:,} of {self._total:,}", *self._news)
        self._write_config()
        preempted = False
        with Preemption() as preemption:
            has_pending = self._pending is not None
            if has_pending and not self._make_up(state, preemption.asked):
                report.say(f"SIGTERM: step {step:,} is saved; the same command goes on from there")
                preempted = True
            fed = self._batches(place)
            for batch, place in itertools.islice(fed, 0 if preempted else max(self._total - step, 0)):
                state, metrics = self.trainer.step(state, batch)
                step += 1
                report.step()
                self._watch.add(step, metrics, batch)
                if step % config.logs.every == 0:
                    report.training(step, self._watch.result(), self._watch.news())
                last = step == self._total
                preempted = preemption.reached(step) and not last
                is_due = last or self._is_due(step, config.training.evaluate_every)
                if preempted and is_due:
                    self._pending = self._trained(step, state)
                elif is_due:
                    preempted = not self._evaluate(state, self._trained(step, state), preemption.asked)
                if preempted or last or self._is_due(step, config.checkpoints.every):
                    self._save(state, place)
                if preempted:
                    self._checkpointer.wait()
                    report.say(f"SIGTERM: saved step {step:,}; the same command goes on from there")
                    break
            if step == first and not preempted and not has_pending:
                report.say(
                    f"nothing to do: step {step:,} of {self._total:,} is in {self._checkpointer.directory}"
                )
            self._checkpointer.wait()
        return Result(step, preempted, self._history, self._checkpointer.directory, self.trainer, state)

    def _is_due(self, step: int, every: int | None) -> bool:
        """Whether `every` steps are over, or where it is None an epoch: it may end within a batch."""
        if every is not None:
            return step % every == 0
        size, count = self._config.training.batch_size, len(self._sources.train)
        return step * size // count > (step - 1) * size // count

    def _start(self) -> tuple[TrainState, Any]:
        """The state to go on from, and the place in the input."""
        # Listings of one folder may differ for a while from host to host: what one of them has, all can open.
        latest = largest(on_all(self._checkpointer.latest_step, "list its checkpoints"))
        if latest is None:
            return self.trainer.init(jax.random.key(self._config.training.seed)), None
        try:
            # Into shapes alone: tables that were made first would be on the devices a second time.
            restored = self._checkpointer.restore(latest, model=self.trainer.abstract_state().model)
        except CheckpointError as e:
            folder = self._checkpointer.directory / str(latest)
            raise CheckpointError(
                f"{e} To go on from the step before it, move it away: mv {folder} {folder}.damaged"
            ) from e
        self._check_batches(restored)
        if restored.metadata.get("num_shards") == self.trainer.embedding.num_shards:
            self.trainer.embedding.reserve(restored.metadata.get("capacities", {}))
        self._watch.last_good = restored.step
        self._history = list(restored.metadata.get("history", []))
        self._pending = restored.metadata.get("pending")
        return TrainState(restored.state, **restored.model), restored.data

    def _check_batch_size(self) -> None:
        """One host pads its batches where they do not divide; several need the same shapes."""
        stacks, size = self.trainer.embedding.stacks.values(), self._config.training.batch_size
        cores = max((stack.cores for stack in stacks), default=0)
        count = self.trainer.embedding.num_shards * cores
        if jax.process_count() > 1 and cores and size % count:
            raise ValueError(
                f"training.batch_size must be a multiple of the {count} SparseCores of {jax.process_count()} hosts, got "
                f"{size}; change it, or take tables.engine='xla', which needs a multiple of the devices."
            )

    def _check_batches(self, restored: Restored) -> None:
        saved, own = restored.metadata.get("batches"), _json(self._config.batches_key())
        if restored.data is None or saved is None:
            raise ValueError(
                f"{self._checkpointer.directory} holds checkpoints that no training job wrote; take another `out`."
            )
        if saved != own:
            differing = sorted(key for key in saved | own if saved.get(key) != own.get(key))
            raise ValueError(
                f"{self._checkpointer.directory} holds a run on other batches: {', '.join(differing)} changed from "
                f"{ {key: saved.get(key) for key in differing} } to { {key: own.get(key) for key in differing} }. "
                "Change it back to go on at the exact batch, or take another `out`."
            )
        changed = difference(restored.metadata.get("data"), _json(self._sources.origin))
        if changed is None:
            return
        if self._config.training.data_changed == "refuse":
            raise ValueError(
                f"{self._checkpointer.directory} holds a run on other data: {changed}. Put back what it was trained on, "
                "take another `out`, or go on with the data as it is now by --set training.data_changed=accept: from the "
                "number of the batch that it had come to, so that examples may come twice in this epoch, or not at all."
            )
        self._news.append(f"goes on although its data has changed (training.data_changed): {changed}")

    def _batches(self, place: Any) -> Iterator[tuple[Any, Any]]:
        training = self._config.training
        return feed(
            self.trainer,
            self._sources.train,
            training.batch_size,
            state=place,
            observe=self._frequency.update,
            prefetch=training.prefetch,
            seed=training.seed,
        )

    def _trained(self, step: int, state: TrainState) -> dict[str, Any]:
        """What the steps since the last evaluation came to; the next ones are counted from zero."""
        assert self._report is not None
        self._watch.finish(state)  # the steps that are counted run until here
        self._report.pause()
        trained = {"step": step, "train": self._watch.result()}
        self._report.say(*self._watch.news())
        self._watch.reset()
        return trained

    def _evaluate(
        self, state: TrainState, trained: dict[str, Any], stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Evaluates and reports; False, without a report, where `stop` says so."""
        assert self._report is not None
        self._report.pause()
        if self._sources.evaluation is not None:
            found = evaluate(
                self.trainer,
                state,
                self._sources.evaluation,
                self._config.training.batch_size,
                self._config.training.evaluation_batches,
                stop,
            )
            if found is None:
                self._pending = trained
                return False
            self._evaluation = found
            self._report.evaluation(trained["step"], self._evaluation)
        self._history.append({**trained, "evaluation": self._evaluation})
        self._pending = None
        self._report.resume()
        return True

    def _make_up(self, state: TrainState, stop: Callable[[], bool]) -> bool:
        """The evaluation that SIGTERM stopped, stored with its step; False, with nothing changed, where `stop` says so."""
        assert self._pending is not None
        if not self._evaluate(state, self._pending, stop):
            return False
        folder = self._checkpointer.directory / str(int(state.embedding.step))
        found = {"evaluation": self._evaluation, "history": self._history, "pending": None}
        is_first = jax.process_index() == 0
        on_all(lambda: amend_metadata(folder, found) if is_first else None, "store an evaluation")
        return True

    def _save(self, state: TrainState, place: Any) -> None:
        assert self._report is not None
        self._watch.finish(state)
        self._report.pause()
        step = int(state.embedding.step)
        self._checkpointer.save(
            state.embedding,
            model=state.model,
            data=place,
            metadata={
                "batches": _json(self._config.batches_key()),
                "data": self._sources.origin,
                "capacities": self.trainer.embedding.capacities,
                "num_shards": self.trainer.embedding.num_shards,
                "evaluation": self._evaluation,
                "history": self._history,
                "pending": self._pending,
                "id_frequency": self._frequency.summary(self._first, jax.process_count()),
            },
            force=True,
        )
        self._watch.last_good = step
        self._report.resume()

    def _write_config(self) -> None:
        if jax.process_index() == 0:
            self._out.mkdir(parents=True, exist_ok=True)
            text = TypeAdapter(JobConfig).dump_json(self._config, indent=2)
            (self._out / "config.json").write_bytes(text)


def _json(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))
