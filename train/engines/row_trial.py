"""Tries the row kernels on the TPU at hand: whether it gives XLA's rows by them, and in no more time.

The compiler and the interpreter say that `pallas_rows` is right; only a device can say so of itself, and how fast.
"""

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxembed import optimizers
from jaxembed.optimizers import Optimizer

_LOG = logging.getLogger("jaxembed")
#: Values of the gradients of an update, 8 MB: many blocks, and far more than what starting a program takes.
_VALUES = 1 << 21
#: Rows of the table for each that is updated.
_SPREAD = 8
_CALLS = 8
#: Of values near 1. Square roots and divisions may be other ones in a kernel; a row that is not there is far off.
_TOLERANCE = 1e-3
#: Seconds; compiling takes a few.
_PATIENCE = 600.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
      problem: why kernels cannot be used, or None.
      kernels: seconds of a gather and an update by them.
      xla: seconds of both by XLA.
    """

    problem: str | None
    kernels: float = 0.0
    xla: float = 0.0

    @property
    def is_passed(self) -> bool:
        """Whether kernels are right, and no slower."""
        return self.problem is None and self.kernels <= self.xla


@functools.lru_cache
def try_kernels(optimizer: Optimizer, dim: int, device: Any) -> Trial:
    """Gathers and updates rows by kernels and by XLA, on one device; once a process, and logged.

    Args:
      optimizer: of which `row_kernels.why_not` says nothing.
      dim: D.
      device: a TPU of this process.

    Raises:
      RuntimeError: if it does not end.
    """
    what = f"row kernels for {type(optimizer).__name__}, D {dim}, on {device.device_kind}"
    _LOG.info("Trying %s.", what)
    found: list[Trial] = []

    def run():
        try:
            with jax.default_device(device):
                found.append(_trial(optimizer, dim))
        # Whatever a compiler or a device has against them, XLA does without.
        except Exception as error:
            found.append(Trial(f"{type(error).__name__}: {error}"))

    # A thread has no trace of a caller's jit, and can be left where a device does not come back.
    thread = threading.Thread(target=run, name="row_trial", daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if not found:
        raise RuntimeError(
            f"Trying {what} did not end within {_PATIENCE:g} s: the device may hang. Start the process again, with "
            "row_kernels='xla'."
        )
    (trial,) = found
    if trial.problem is not None:
        _LOG.warning("XLA takes the place of %s: %s", what, trial.problem)
    else:
        taken = "taken" if trial.is_passed else "XLA takes their place"
        _LOG.info("%s: %.0f us, by XLA %.0f us; %s.", what, trial.kernels * 1e6, trial.xla * 1e6, taken)
    return trial


def agreed(mesh: Mesh, verdicts: Sequence[bool]) -> list[bool]:
    """What all processes of a mesh, each of which has as many verdicts, say yes to."""
    if len({device.process_index for device in mesh.devices.flat}) == 1:
        return list(verdicts)
    mine = np.asarray([verdicts], np.int32)
    given = jax.make_array_from_callback(
        (mesh.size, len(verdicts)),
        NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
        lambda _: mine,
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.ensure_compile_time_eval():
        least = jax.jit(lambda x: jnp.min(x, axis=0), out_shardings=everywhere)(given)
    return [bool(x) for x in np.asarray(least)]


def _trial(optimizer: Optimizer, dim: int) -> Trial:
    from . import pallas_rows

    def gather(table, rows):
        return table.at[rows].get(mode="clip", wrap_negative_indices=False)

    by_kernels = _Programs(optimizer, pallas_rows.gather, pallas_rows.update_unique)
    by_xla = _Programs(optimizer, gather, optimizers.update_unique)
    given = _arguments(optimizer, dim)
    found, wanted = by_kernels.run(*given), by_xla.run(*given)
    problem = _difference(given, found, wanted)
    if problem is not None:
        return Trial(problem)
    return Trial(None, by_kernels.seconds(*given), by_xla.seconds(*given))


class _Programs:
    """A gather and an update of an optimizer, compiled.

    Args:
      optimizer: its.
      gather: of table and rows.
      update: as `jaxembed.optimizers.update_unique`.
    """

    def __init__(self, optimizer: Optimizer, gather: Callable[..., Any], update: Callable[..., Any]):
        self._gather: jax.stages.Wrapped = jax.jit(gather)
        self._update: jax.stages.Wrapped = jax.jit(functools.partial(update, optimizer), donate_argnums=(0, 1))

    def run(self, table: jax.Array, slots: Any, rows: jax.Array, *rest: Any) -> tuple[jax.Array, Any]:
        """The rows, and table and slots after the update; those given stay."""
        return self._gather(table, rows), self._update(*jax.tree.map(jnp.copy, (table, slots)), rows, *rest)

    def seconds(self, table: jax.Array, slots: Any, rows: jax.Array, *rest: Any) -> float:
        """Of one gather and one update, once compiled: the less of two times."""
        state = jax.block_until_ready(jax.tree.map(jnp.copy, (table, slots)))
        times, taken = [], None
        for _ in range(2):
            start = time.perf_counter()
            for _ in range(_CALLS):
                taken = self._gather(state[0], rows)
                state = self._update(*state, rows, *rest)
            jax.block_until_ready((taken, state))
            times.append((time.perf_counter() - start) / _CALLS)
        return min(times)


def _arguments(optimizer: Optimizer, dim: int) -> tuple[Any, ...]:
    """Those of an update of rows all over a table, the last one among them, a part of a block padded."""
    size = _VALUES // dim
    height = size * _SPREAD
    rng = np.random.default_rng(0)
    live = size - 5
    rows = np.full(size, height, np.int32)
    rows[:live] = np.sort(np.append(rng.choice(height - 1, live - 1, replace=False), height - 1))
    gradients = rng.standard_normal((size, dim), np.float32)
    gradients[live:] = np.nan
    table = jax.random.normal(jax.random.key(0), (height, dim), jnp.float32)
    slots = {
        name: jax.random.uniform(jax.random.key(i), table.shape, jnp.float32, 0.5, 1.5)
        for i, name in enumerate(optimizer.slot_names)
    }
    return table, slots, jnp.asarray(rows), jnp.asarray(gradients), jnp.float32(0.1), jnp.int32(3)


def _difference(given: tuple[Any, ...], found: Any, wanted: Any) -> str | None:
    """What is wrong with what was found, or None."""
    table, slots, rows = given[:3]
    close = jax.tree.map(
        lambda a, b: bool(jnp.allclose(a, b, _TOLERANCE, _TOLERANCE, equal_nan=True)), found, wanted
    )
    if not close[0]:
        return "it gathers other rows."
    if not all(jax.tree.leaves(close[1])):
        return "it updates rows to other values."
    rest = jnp.ones((table.shape[0], 1), bool).at[rows].set(False, mode="drop")
    kept = jax.tree.map(lambda new, old: bool(jnp.all((new == old) | ~rest)), found[1], (table, slots))
    return None if all(jax.tree.leaves(kept)) else "it changes rows that it should not."
