"""Interleaved timing: contenders take turns, so that a slow moment of the machine hits them all."""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

_TURN = 5e-3
#: After a pause a second thread takes up to ten milliseconds to come at once where the cores are virtual ones.
_WARM = 10e-3
_LEAST_ROUNDS = 3
#: Longest time to wait for the threads of the contender before: OpenMP's spin for 2 to 10 ms after a call.
_SETTLE = 0.05


class Timing(NamedTuple):
    """Seconds of one call: median and quartiles over the rounds, and how many rounds there were."""

    median: float
    low: float
    high: float
    rounds: int

    def per(self, count: int) -> "Timing":
        """Seconds of one of the `count` lookups in a call."""
        return Timing(self.median / count, self.low / count, self.high / count, self.rounds)


def interleave(
    programs: Mapping[str, Callable[[int], Any]],
    num_sets: int,
    budget: float,
    seed: int,
    rounds: int = 15,
    turn: float = _TURN,
    warm: float = _WARM,
) -> dict[str, Timing]:
    """Times contenders in turn, in an order shuffled anew each round, over rotating inputs.

    A turn begins when no thread of the contender before it uses a core any more. Then come untimed calls for `warm`
    seconds, and as many timed ones as make `turn` seconds; where a call takes ten times that, a single timed
    call. Slow contenders take part in fewer, evenly spaced rounds.

    Args:
      programs: for each contender, a call on input set i that returns when its results are there. All must
        have run once, so that nothing is left to compile.
      num_sets: how many input sets there are.
      budget: seconds to spend on all contenders, if 3 rounds of each fit in.
      rounds: at most.
      turn: seconds of a contender's timed calls.
      warm: seconds of the untimed ones before.
      seed: of the order of turns; another one for each call, or the same contender follows the same always.
    """
    rng = np.random.default_rng(seed)
    clocks = {name: _Clock(program, num_sets, turn, warm) for name, program in programs.items()}
    shares = {name: clock.rounds_in(budget / len(clocks), rounds) for name, clock in clocks.items()}
    most = max(shares.values())
    with _no_collection():
        for i in range(most):
            for name in rng.permutation(list(clocks)):
                if (i + 1) * shares[name] // most > i * shares[name] // most:
                    clocks[name].sample()
    return {name: clock.timing() for name, clock in clocks.items()}


class _Clock:
    """One contender's calls, in rotation over its input sets."""

    def __init__(self, program: Callable[[int], Any], num_sets: int, turn: float, warm: float):
        self._program, self._num_sets, self._set, self._samples = program, num_sets, 0, []
        self._estimate = self._run(1)
        short = self._estimate < 10 * turn
        if short:
            # The first calls may still specialize (TorchScript does), so the fastest one tells.
            self._estimate = min(self._estimate, *(self._run(1) for _ in range(4)))
        else:
            self._samples.append(self._estimate)
        self._calls = max(1, math.ceil(turn / self._estimate))
        self._untimed = math.ceil(warm / self._estimate) if short else 0

    def rounds_in(self, seconds: float, most: int) -> int:
        """Rounds still to come."""
        taken = (self._calls + self._untimed) * self._estimate
        return int(np.clip(seconds / taken, _LEAST_ROUNDS, most)) - len(self._samples)

    def sample(self) -> None:
        _settle()
        if self._untimed:
            self._run(self._untimed)
        self._samples.append(self._run(self._calls))

    def timing(self) -> Timing:
        low, median, high = np.quantile(self._samples, (0.25, 0.5, 0.75))
        return Timing(float(median), float(low), float(high), len(self._samples))

    def _run(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self._program(self._set)
            self._set = (self._set + 1) % self._num_sets
        return (time.perf_counter() - start) / calls


def _settle() -> None:
    """Returns once this process uses next to nothing of any core: a thread that spins would take one from the next."""
    deadline = time.perf_counter() + _SETTLE
    while time.perf_counter() < deadline:
        used, begin = time.process_time(), time.perf_counter()
        time.sleep(1e-3)
        if time.process_time() - used < 0.2 * (time.perf_counter() - begin):
            return


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
