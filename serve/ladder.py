"""The ladder of shapes: which sizes are compiled, and which of them a request runs at."""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Rung(NamedTuple):  # a key of every call, which a dataclass would hash in Python
    """One compiled shape.

    Attributes:
      batch: rows.
      row_length: ids per row that there is room for, on average over the batch, in each feature (less
        where the feature's own limit is lower).
    """

    batch: int
    row_length: int

    def capacity(self, max_ids: int) -> int:
        """Ids that one feature of at most `max_ids` ids a row has room for."""
        return self.batch * min(self.row_length, max_ids)


@dataclasses.dataclass(frozen=True)
class Ladder:
    """All pairs of a batch size and a row length.

    Args:
      batch_sizes: rising ints; the last is the largest batch that runs at once.
      row_lengths: rising ints; the last is at least the limit of every feature.

    Raises:
      ValueError: if either is empty or not rising from at least 1.
    """

    batch_sizes: tuple[int, ...]
    row_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "row_lengths"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name} must be rising ints of at least 1, got {list(sizes)}.")

    @functools.cached_property
    def _only(self) -> dict[int, Rung]:
        """Where there is one row length: rungs by batch size, made beforehand."""
        return {batch: Rung(batch, self.row_lengths[-1]) for batch in self.batch_sizes}

    def __iter__(self) -> Iterator[Rung]:
        return (Rung(batch, length) for batch in self.batch_sizes for length in self.row_lengths)

    def __len__(self) -> int:
        return len(self.batch_sizes) * len(self.row_lengths)

    def rung(self, rows: int, ids: Sequence[int], limits: Sequence[int]) -> Rung:
        """The smallest rung with room for `rows` rows and, by feature, `ids` ids."""
        batch = self._batch(rows)
        if len(self.row_lengths) == 1:
            return self._only[batch]
        for length in self.row_lengths[:-1]:
            rung = Rung(batch, length)
            if all(n <= rung.capacity(limit) for n, limit in zip(ids, limits, strict=True)):
                return rung
        return Rung(batch, self.row_lengths[-1])

    def padded_size(self, rows: int) -> int:
        """The rows that are computed for a batch of `rows`, which runs in parts where it is too large."""
        whole, rest = divmod(rows, self.batch_sizes[-1])
        return whole * self.batch_sizes[-1] + (self._batch(rest) if rest else 0)

    def _batch(self, rows: int) -> int:
        return self.batch_sizes[bisect.bisect_left(self.batch_sizes, rows)]


def batch_ladder(largest: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to `largest`: the powers of two, and halfway between them.

    Padding a batch costs the work of its empty rows, so steps of at most 1.5 bound the waste at half; batches are
    often powers of two, and these are not padded at all.
    """
    sizes = {1, largest}
    power = 2
    while power < largest:
        sizes |= {power, power * 3 // 2}
        power *= 2
    return tuple(sorted(size for size in sizes if size <= largest))


def geometric(largest: int, step: float) -> tuple[int, ...]:
    """1, 2, ... up to `largest`, each about `step` times the one before."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + 1, round(sizes[-1] * step))))
    return tuple(sizes)


def make_ladder(
    longest: int,
    max_batch_size: int,
    batch_sizes: Sequence[int] | None,
    row_lengths: Sequence[int] | None,
    native: bool,
) -> Ladder:
    """The ladder of a ServingFunction, whose arguments these are.

    Args:
      longest: the largest limit of a feature.
      native: whether the native kernel runs it, to which padding of ids costs nothing.

    Raises:
      ValueError: if sizes are not rising ints of at least 1.
    """
    if batch_sizes is None:
        if not isinstance(max_batch_size, int) or max_batch_size < 1:
            raise ValueError(f"max_batch_size must be an int of at least 1, got {max_batch_size!r}.")
        # A rung of the plain path takes XLA seconds where the kernel's takes a fraction of one.
        batch_sizes = batch_ladder(max_batch_size) if native else geometric(max_batch_size, 4)
    if row_lengths is None:
        row_lengths = () if native else (max(1, longest // 8),)
    row_lengths = [length for length in row_lengths if length < longest]
    return Ladder(tuple(batch_sizes), (*row_lengths, longest))
