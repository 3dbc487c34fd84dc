"""Notices SIGTERM, which clouds send before they take a machine away, and picks the step to save at."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preemption:
    """While it is entered, SIGTERM asks for a checkpoint instead of ending the process.

    One process saves after the step that runs. Several agree, over jax.distributed, on the next step that
    none of them has passed, whichever of them got the signal. A second SIGTERM ends the process.
    """

    def __init__(self):
        self._asked = threading.Event()
        self._previous = None
        # Under jax.distributed, JAX's own preemption service takes the signal.
        self._several = jax.process_count() > 1
        self._handles = not self._several and threading.current_thread() is threading.main_thread()

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; every process must ask after every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()

    def asked(self) -> bool:
        """Whether to stop even between steps; never of several processes, which stop together."""
        return self._asked.is_set()

    def __enter__(self) -> "Preemption":
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _handle(self, number, frame) -> None:
        if self._asked.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked.set()
