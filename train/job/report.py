"""What a job shows: a progress bar, lines, and TensorBoard logs."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from .config import Logs

#: Shown on the bar where there are any, and logged always.
_COUNTS = ("bad_ids", "extra_rounds")


class Report:
    """Shows figures on process 0; the others stay silent.

    Args:
      config: what to show.
      out: of the job.
      batch_size: B, over all hosts.
      start: step to begin at.
      total: steps in all.
    """

    def __init__(self, config: Logs, out: Path, batch_size: int, start: int, total: int):
        first = jax.process_index() == 0
        errors = sys.stderr  # None where the process began without one
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            disable=not (config.progress and first and errors is not None),
            dynamic_ncols=True,
            # In seconds; a file keeps all that is drawn.
            mininterval=0.1 if errors is not None and errors.isatty() else 30.0,
        )
        self._writer = _writer(out / "logs", start) if config.tensorboard and first else None
        self._batch_size, self._quiet = batch_size, not first
        self._since, self._steps, self._is_first = time.perf_counter(), 0, True
        self._paused: float | None = None

    def step(self) -> None:
        """A step was begun; the first, which compiles, is not counted in the speed."""
        if self._is_first:
            self._is_first, self._since = False, time.perf_counter()
        else:
            self._steps += 1
        self._bar.update()

    def training(self, step: int, figures: Mapping[str, float], news: Sequence[str] = ()) -> dict[str, float]:
        """Shows figures, the speed since the last call, and news; returns figures and speed."""
        now = time.perf_counter()
        speed = self._batch_size * self._steps / max(now - self._since, 1e-9)
        self._since, self._steps = now, 0
        shown = {**figures, "examples_per_second": speed}
        self._bar.set_postfix_str(_text(shown), refresh=False)
        self._write("train", step, shown)
        self.say(*news)
        return shown

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Shows an evaluation on a line of its own."""
        self.say(f"step {step:,}: evaluation " + (_text(figures) or "had labels of one kind only"))
        self._write("evaluation", step, figures)

    def pause(self) -> None:
        """What follows until `resume` (evaluation, saving) is not training time, from the first of several calls on."""
        self._paused = self._paused or time.perf_counter()

    def resume(self) -> None:
        """Training goes on."""
        if self._paused is not None:
            self._since, self._paused = self._since + time.perf_counter() - self._paused, None

    def say(self, *lines: str) -> None:
        """Lines above the bar."""
        if not self._quiet:
            for line in lines:
                self._bar.write(line)

    def close(self) -> None:
        """Flushes the logs."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, group: str, step: int, figures: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)


def _writer(directory: Path, start: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as e:
        raise ImportError(
            "TensorBoard logs need tensorboardX: pip install 'jaxembed[train]', or set logs.tensorboard = false."
        ) from e
    # What a run logged beyond the step that this one starts from is taken back; all, if it saved none.
    return SummaryWriter(str(directory), purge_step=start + 1)


def _text(figures: Mapping[str, float]) -> str:
    parts = []
    for name, value in figures.items():
        if name == "examples_per_second":
            parts.append(f"{value:,.0f} examples/s")
        elif name in ("examples", *_COUNTS):
            if value or name not in _COUNTS:
                parts.append(f"{value:,.0f} {name.replace('_', ' ')}")
        else:
            parts.append(f"{name} {value:.4f}")
    return ", ".join(parts)
