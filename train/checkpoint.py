"""Saves training with Orbax and resumes it from the latest whole step, on the same mesh or another."""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxembed.checkpoint import digest_arrays, layout, steps
from jaxembed.checkpoint.files import absolute_path, disk_error
from jaxembed.checkpoint.reading import flat_arrays, open_checkpoint
from jaxembed.serialization import feature_config_to_json

from .embedding import ShardedEmbedding
from .engines.custom import checked_weights
from .fresh_slots import with_fresh_slots
from .hosts import largest, on_all
from .restoring import (
    check_meaning,
    check_slots,
    check_tables,
    restore_data,
    restore_model,
    takes_all_hosts,
)
from .saving import as_array, encode, save_arrays
from .stack_reading import read_stacks
from .state import EmbeddingState
from .writer_lock import WriterLock, claim

GROWTHS = (None, "initialize")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held, ready to train on.

    Attributes:
      step: number of training steps taken.
      state: the tables and slots in the layout of this trainer's mesh.
      model: structure like the `model` that was passed to `restore`, or None.
      data: state of the input pipeline, or None.
      metadata: what was passed to `save`.

    Examples:
      >>> import jaxembed as je
      >>> from jaxembed.optimizers import SGD
      >>> from jaxembed.train import ShardedEmbedding
      >>> movie = je.TableConfig(vocabulary_size=8, dim=2, combiner="sum", name="movie")
      >>> features = {"watched": je.FeatureConfig(movie)}
      >>> mesh = jax.make_mesh((jax.device_count(),), ("devices",))
      >>> embedding = ShardedEmbedding(features, SGD(1.0), mesh)
      >>> with Checkpointer("checkpoints", embedding) as checkpointer:
      ...     _ = checkpointer.save(embedding.init(jax.random.key(0)), data={"place": 7})
      ...     restored = checkpointer.restore()
      >>> restored.step, restored.data
      (0, {'place': 7})
    """

    step: int
    state: EmbeddingState
    model: Any
    data: Any
    metadata: dict[str, Any]


class Checkpointer:
    """Canonical checkpoints of a ShardedEmbedding and the model around it.

    Tables and slots are stored as global [V, D] arrays with the feature configuration beside them, so
    that any mesh can resume and `jaxembed.serve.load` needs nothing else. Any number of processes may read; one
    writes, from `claim` or its first `save` on until `close`.

    Args:
      directory: where the steps lie; created if needed.
      embedding: whose states are saved.
      max_to_keep: older steps are deleted, from the disk at the next save or `close`; None keeps all.
      save_interval_steps: `save` does nothing at other steps, unless forced.
      asynchronous: `save` returns once the arrays are copied to the host.

    Examples:
      >>> import jaxembed as je
      >>> from jaxembed.optimizers import SGD
      >>> from jaxembed.train import ShardedEmbedding
      >>> movie = je.TableConfig(vocabulary_size=8, dim=2, combiner="sum", name="movie")
      >>> features = {"watched": je.FeatureConfig(movie)}
      >>> mesh = jax.make_mesh((jax.device_count(),), ("devices",))
      >>> embedding = ShardedEmbedding(features, SGD(1.0), mesh)
      >>> with Checkpointer("checkpoints", embedding) as checkpointer:
      ...     checkpointer.save(embedding.init(jax.random.key(0)), metadata={"run": "first"})
      ...     checkpointer.restore().metadata
      True
      {'run': 'first'}
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        embedding: ShardedEmbedding,
        *,
        max_to_keep: int | None = 3,
        save_interval_steps: int = 1,
        asynchronous: bool = True,
    ):
        self.directory: pathlib.Path = absolute_path(directory)
        self._embedding = embedding
        self._feature_config = feature_config_to_json(embedding.feature_config)
        self._optimizers = layout.optimizers_to_json(
            {p.table.name: stack.optimizer for stack in embedding.stacks.values() for p in stack.placements}
        )
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            save_interval_steps=save_interval_steps,
            enable_async_checkpointing=asynchronous,
            todelete_subdir=layout.DELETING,
            create=True,
            # Else, after a save that fails, threads wait for its folders until they time out, and the
            # process cannot end before.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = self._open_manager()
        self._is_swept = self._is_claimed = False
        self._lock: WriterLock | None = None
        self._removals = concurrent.futures.ThreadPoolExecutor(1, "jaxembed-remove")

    def claim(self) -> None:
        """Makes this the only process that may save here, as the first `save` does; of several hosts, all call it.

        Raises:
          ValueError: if another job or process writes here.
          OSError: if the disk fails.
        """
        if not self._is_claimed:
            self._lock, self._is_claimed = claim(self.directory), True

    def save(
        self,
        state: EmbeddingState,
        *,
        model: Any = None,
        data: Any = None,
        metadata: dict[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Saves `state` as the step it is at.

        Args:
          state: of the embedding.
          model: any pytree of arrays: dense parameters, optimizer state.
          data: JSON-able state of the input pipeline.
          metadata: JSON-able, for the reader.
          force: save whatever `save_interval_steps` says.

        Returns:
          Whether the step was one to save.

        Raises:
          ValueError: if a later step is there, if `model` has no arrays, or two of one name, if `metadata` or `data`
            could not be read back, or if another process writes here.
          OSError: if the disk fails, now or in the save before.
        """
        step = int(state.step)
        self.claim()
        if not self._is_swept:
            self._sweep()
        self._refuse_before_later(step)
        if not force and not self._manager.should_save(step):
            return False
        tables, slots, _ = self._embedding.canonical_on_host(state)
        slots = {name: value for name, value in slots.items() if value}
        leaves = {} if model is None else {key: as_array(key, leaf) for key, leaf in flat_arrays(model).items()}
        if model is not None and not leaves:
            raise ValueError(f"model has no arrays, got {model!r:.80}; leave it out.")
        layout.check_digests((np.shape(a), a.dtype) for a in jax.tree.leaves((tables, slots)))
        digests = iter(
            [d.to_json() for d in digest_arrays([*jax.tree.leaves((tables, slots)), *leaves.values()])]
        )
        manifest = {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            "step": step,
            "feature_config": self._feature_config,
            "metadata": metadata or {},
            "combiner_weights": layout.combiner_weights_to_json(state.combiner_weights),
            "optimizers": self._optimizers,
            "digests": {
                "tables": jax.tree.map(lambda _: next(digests), tables),
                "slots": jax.tree.map(lambda _: next(digests), slots),
            },
        }
        items: dict[str, Any] = {layout.TABLES: save_arrays(encode(tables))}
        if slots:
            items[layout.SLOTS] = save_arrays(encode({name: encode(value) for name, value in slots.items()}))
        if model is not None:
            manifest["digests"][layout.MODEL] = {key: next(digests) for key in leaves}
            items[layout.MODEL] = ocp.args.PyTreeSave(model)
        if data is not None:
            items[layout.DATA] = ocp.args.JsonSave({"state": data})
            manifest["digests"][layout.DATA] = layout.readable_digest({"state": data}, "data")
        items[layout.MANIFEST] = ocp.args.JsonSave(layout.seal(manifest))
        if jax.process_index() == 0:
            self._removals.submit(steps.remove_deleted, self.directory)
        with self._afresh_after_errors():
            return self._manager.save(step, args=ocp.args.Composite(**items), force=force)

    def _refuse_before_later(self, step: int) -> None:
        """Of steps that are saved the latest counts: one before it would not be gone on from, and be the first to go."""
        if (self._manager.latest_step() or 0) <= step:
            return
        self.wait()  # what is being saved is not on the disk yet
        self._manager.reload()  # what is known may have been moved away
        latest = self._manager.latest_step() or 0
        if latest > step:
            raise ValueError(
                f"{self.directory} has step {latest}, later than step {step}, and the latest is what is gone on from. To go "
                f"back to an earlier step, move the later ones away (mv {self.directory / str(latest)} somewhere), or save "
                "to another folder."
            )

    def latest_step(self) -> int | None:
        """The last whole step, or None."""
        return steps.latest_step(self.directory)

    def restore(
        self,
        step: int | None = None,
        *,
        model: Any = None,
        verify: bool = True,
        vocabulary_growth: str | None = None,
        key: jax.Array | None = None,
        partial: bool = False,
        reinterpret: bool = False,
        fresh_slots: bool = False,
    ) -> Restored:
        """Restores a step (default: the latest whole one) onto this trainer's mesh.

        Args:
          step: which one.
          model: a pytree like the one saved, of arrays or ShapeDtypeStructs; None skips it.
          verify: compare what is read with the digests that were saved with it.
          vocabulary_growth: "initialize" lets tables have more rows than the checkpoint; these start, as
            do their slots, like those of `embedding.init(key)`. None makes that an error.
          key: of the rows that are new.
          partial: leave tables and slots of the checkpoint that this embedding has not behind; otherwise they are an
            error.
          reinterpret: let the rows stand for something else than when they were saved: look a table up through another
            quantization_config, or map a feature's ids by another preprocessing; otherwise that is an error, but for
            vocabulary files without out-of-vocabulary buckets that have grown at their end, where tables may grow.
          fresh_slots: start slots that the checkpoint lacks at their initial values, as of tables that were converted
            without them or, with `partial`, trained by another optimizer; otherwise they are an error. Slots of another
            optimizer start anew, with a warning where both have one of that name, and so do those of a CustomOptimizer,
            unless its function has the registered name that they were saved with. "accumulators" of Adagrad and FTRL are kept for each other, and for AdagradMomentum where `beta2` is 1: sums of squared gradients. Those of AdagradMomentum are
            kept for none. "linears" of FTRL, of which it makes the rows, start as those that make the rows that are restored.

        Raises:
          FileNotFoundError: if there is no such whole step.
          ValueError: if the checkpoint's tables are not those of this embedding, or are damaged.
        """
        if vocabulary_growth not in GROWTHS:
            raise ValueError(f"vocabulary_growth must be one of {GROWTHS}, got {vocabulary_growth!r}.")
        if vocabulary_growth and key is None:
            raise ValueError(
                "vocabulary_growth='initialize' needs a key for the rows that are new; pass key=..."
            )
        self.wait()
        if step is None:
            # Listings of one folder may differ for a while from host to host.
            step = largest(on_all(self.latest_step, "list the steps"))
        opened = on_all(lambda: open_checkpoint(self.directory, step, verify=verify), "open the checkpoint")

        def check() -> bool:
            grows = check_tables(self._embedding, opened, bool(vocabulary_growth), partial)
            check_slots(self._embedding, opened, partial, fresh_slots)
            if not reinterpret:
                check_meaning(self._embedding, opened, bool(vocabulary_growth))
            return grows

        grows = on_all(check, "fit the checkpoint")  # a host may have a vocabulary file of its own
        fresh = self._embedding.init(key) if grows and key is not None else None
        stored = with_fresh_slots(self._embedding, opened) if fresh_slots else opened.slots
        stacks, abstract = self._embedding.stacks, self._embedding.abstract_state()
        alone = model is None or not takes_all_hosts(model)

        def read() -> tuple[Any, Any, Any]:
            arrays = read_stacks(stacks, abstract, opened.tables, stored, fresh)
            dense = restore_model(opened, model) if model is not None and alone else None
            return arrays, dense, restore_data(opened)

        (tables, slots), dense, data = on_all(read, "read the checkpoint")
        found: int = opened.manifest["step"]
        weights = checked_weights(self._embedding.tables, layout.combiner_weights(opened.manifest))
        return Restored(
            step=found,
            state=EmbeddingState(
                tables, slots, *jax.device_put((np.int32(found), weights), self._embedding.replicated)
            ),
            model=dense if alone else restore_model(opened, model),
            data=data,
            metadata=opened.manifest["metadata"],
        )

    def wait(self) -> None:
        """Blocks until the saves under way are on disk; raises what went wrong in them."""
        with self._afresh_after_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the threads, and lets others write."""
        try:
            self._manager.close()
        finally:
            if jax.process_index() == 0 and self._is_claimed:
                self._removals.submit(steps.remove_deleted, self.directory)
            self._removals.shutdown()
            if self._lock is not None:
                self._lock.release()
            self._lock, self._is_claimed = None, False

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.directory, options=self._options)

    def _sweep(self) -> None:
        """Makes way for the first save, of the only writer; all processes wait until it is made."""

        def make_way() -> list[pathlib.Path]:
            if jax.process_index() != 0:
                return []
            if (
                self._lock is None or not self._lock.is_shared
            ):  # else another one here may be in the middle of a save
                steps.remove_unfinished(self.directory)
            return steps.set_aside(self.directory)

        for path in on_all(make_way, "make way for the first save"):
            warnings.warn(
                f"A step that cannot be restored was set aside: {path}.", RuntimeWarning, stacklevel=3
            )
        self._manager.reload()
        self._is_swept = True

    @contextlib.contextmanager
    def _afresh_after_errors(self) -> Iterator[None]:
        """A manager raises the error of a save that failed again in the next ones: another takes its place."""
        try:
            yield
        except Exception as e:
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager, self._is_swept = self._open_manager(), False
            failed = None if isinstance(e, OSError) else disk_error(e, self.directory)
            if failed is None:
                raise
            raise failed from e
