"""How a warm-up tells how far it is."""

import sys
from collections.abc import Callable

#: Called with the number of shapes done and of all.
Progress = Callable[[int, int], None]


def reporter(progress: bool | Progress) -> Progress | None:
    """What an argument `progress` asks for: a bar on stderr for True, nothing for False."""
    return progress if callable(progress) else _print_bar if progress else None


def part_of(report: Progress, before: int, total: int) -> Progress:
    """Reports the shapes of one function, after `before` of others, among the `total` of all, each number once."""

    def shifted(done: int, of: int) -> None:
        if done < of or before + of == total:
            report(before + done, total)

    return shifted


def _print_bar(done: int, total: int) -> None:
    filled = 30 * done // total
    end = "\n" if done == total else ""
    sys.stderr.write(f"\rcompiling [{'#' * filled}{' ' * (30 - filled)}] {done}/{total}{end}")
    sys.stderr.flush()
