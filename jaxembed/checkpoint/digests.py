"""Digests of arrays by blocks of rows, so that damage on disk is found and named.

A block is a number of rows that depends on the width of a row alone, so the same array has the same
digests whatever mesh it was saved from. Only where two processes share a block it is cut in two.
"""

import bisect
import concurrent.futures
import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xxhash

BLOCK_BYTES = 1 << 20
ALGORITHM = "xxh3-128"
HEX_DIGITS = 32


class CheckpointError(ValueError):
    """What is on disk is not what was saved."""


@dataclasses.dataclass(frozen=True)
class Digests:
    """The digests of one array [R, ...]; a scalar is one row.

    Attributes:
      shape: of the array.
      dtype: name of its type.
      borders: first row of each block, then R.
      blocks: xxh3-128 of the bytes of each block, in hexadecimal.
    """

    shape: tuple[int, ...]
    dtype: str
    borders: tuple[int, ...]
    blocks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        regular = range(0, num_rows(self.shape), block_rows(self.shape, self.dtype))
        # One string: the readers of JSON take a hundred times as long for a list.
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "cuts": sorted(set(self.borders[:-1]) - set(regular)),
            "blocks": "".join(self.blocks),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], what: str = "the manifest") -> "Digests":
        """The inverse of `to_json`; `what` is the array, for errors.

        Raises:
          CheckpointError: if `data` is nothing that `to_json` gives.
        """
        try:
            shape, dtype = tuple(data["shape"]), data["dtype"]
            if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in shape):
                raise ValueError(f"the shape is {list(shape)}")
            text = data["blocks"]
            if not isinstance(text, str):
                raise TypeError(f"blocks {type(text).__name__}")
            blocks = tuple(text[i : i + HEX_DIGITS] for i in range(0, len(text), HEX_DIGITS))
            rows, step = num_rows(shape), block_rows(shape, dtype)
            if rows > step * max(len(blocks), 1):
                raise ValueError(f"{len(blocks)} digests for {rows} rows")
            cuts = {n for n in data["cuts"] if 0 < n < rows}
            borders = (*sorted({*range(0, rows, step), *cuts}), rows)
            if len(blocks) != len(borders) - 1:
                raise ValueError(f"{len(blocks)} digests for {len(borders) - 1} blocks")
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise CheckpointError(f"{what}: not the digests of an array: {type(e).__name__}: {e}.") from e
        return cls(shape, dtype, borders, blocks)

    def spans(
        self, max_bytes: int = 16 << 20, start: int = 0, stop: int | None = None
    ) -> list[tuple[int, int]]:
        """The rows [start, stop), with the rest of their blocks, in runs of whole blocks.

        Args:
          max_bytes: of a run, unless one block is of more.
          start: first row.
          stop: one past the last row; default: all from `start` on.
        """
        row_bytes = max(_row_bytes(self.shape, self.dtype), 1)
        spans: list[tuple[int, int]] = []
        for low, high in itertools.pairwise(self._borders_around(start, stop)):
            if spans and (high - spans[-1][0]) * row_bytes <= max_bytes:
                spans[-1] = (spans[-1][0], high)
            else:
                spans.append((low, high))
        return spans

    def check(self, rows: np.ndarray, what: str, start: int = 0, threads: int | None = None) -> None:
        """Checks rows that begin at row `start`; only blocks that lie in them as a whole are looked at.

        Args:
          threads: that hash; default: as many as there are cores, up to 8.

        Raises:
          CheckpointError: naming `what` and the rows that are not those that were saved.
        """
        stop = start + (rows.shape[0] if rows.ndim else 1)
        first, last = bisect.bisect_left(self.borders, start), bisect.bisect_right(self.borders, stop)
        indices = range(first, last - 1)
        spans = list(itertools.pairwise(self.borders[first:last]))
        found = _hash_spans([(start, rows)], spans, threads)
        bad = [i for i, digest in zip(indices, found, strict=True) if digest != self.blocks[i]]
        if bad:
            runs = _runs([(self.borders[i], self.borders[i + 1]) for i in bad])
            raise CheckpointError(
                f"{what} is damaged: rows {runs} of {num_rows(self.shape)} do not have the digest they were "
                "saved with; restore another step, or pass verify=False (`jaxembed serve --no-verify`) to read it all the same."
            )

    def _borders_around(self, start: int, stop: int | None) -> Sequence[int]:
        """Those of the blocks that hold the rows [start, stop)."""
        first = max(bisect.bisect_right(self.borders, start) - 1, 0)
        last = len(self.borders) if stop is None else bisect.bisect_left(self.borders, stop) + 1
        return self.borders[first:last]


class BlockDigester:
    """The digests of an array whose rows come in order, some at a time.

    Args:
      shape: of the array, [R, ...].
      dtype: of the array.
    """

    def __init__(self, shape: Sequence[int], dtype: Any):
        self._shape, self._dtype, self._step = tuple(shape), np.dtype(dtype), block_rows(shape, dtype)
        self._hash, self._rows = xxhash.xxh3_128(), 0
        self._blocks: list[str] = []

    def update(self, rows: np.ndarray) -> None:
        """Takes the next rows."""
        octets, start = _as_bytes(rows), 0
        while start < octets.shape[0]:
            stop = min(start + self._step - self._rows % self._step, octets.shape[0])
            self._hash.update(octets[start:stop].reshape(-1).data)
            self._rows, start = self._rows + stop - start, stop
            if self._rows % self._step == 0:
                self._close()

    def digests(self) -> Digests | None:
        """Those of the array once all of its rows are here; None before."""
        if self._rows != self._shape[0]:
            return None
        if len(self._blocks) * self._step < self._rows:
            self._close()
        borders = (*range(0, self._rows, self._step), self._rows)
        return Digests(self._shape, self._dtype.name, borders, tuple(self._blocks))

    def _close(self) -> None:
        self._blocks.append(self._hash.hexdigest())
        self._hash.reset()


def digest_arrays(arrays: Sequence[Any]) -> list[Digests]:
    """The digests of numpy or (possibly multi-process) jax arrays; all processes get all of them.

    Processes wait for each other only where rows, or columns, of one of the arrays are spread over them; one that is
    spread by columns is gathered as a whole.

    The host copies that are hashed stay with the arrays, so that saving these does not copy them again.
    """
    owned = [_owned_ranges(array) for array in arrays]
    borders = [
        _borders(np.shape(array), array.dtype, ranges) for array, ranges in zip(arrays, owned, strict=True)
    ]
    me = jax.process_index()
    found = []
    for array, ranges, edges in zip(arrays, owned, borders, strict=True):
        spans = list(itertools.pairwise(edges))
        held = [(first, stop) for first, stop, process in ranges if process == me]
        mine = [any(first <= start < stop for first, stop in held) for start, _ in spans]
        digests = iter(_hash_spans(_pieces(array), [s for s, own in zip(spans, mine, strict=True) if own]))
        found.append([next(digests) if own else "0" * 32 for own in mine])
    spread = [i for i, array in enumerate(arrays) if _is_spread(array)]
    if spread:
        for i, blocks in zip(spread, _exchange([found[i] for i in spread]), strict=True):
            found[i] = blocks
    return [
        Digests(tuple(np.shape(array)), np.dtype(array.dtype).name, tuple(edges), tuple(blocks))
        for array, edges, blocks in zip(arrays, borders, found, strict=True)
    ]


def digest_bytes(data: bytes) -> str:
    """xxh3-128 of `data`, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def num_rows(shape: Sequence[int]) -> int:
    """The length of the first axis; 1 for a scalar."""
    return int(shape[0]) if len(shape) else 1


def block_rows(shape: Sequence[int], dtype: Any) -> int:
    """How many rows make a block: the largest power of two of at most a megabyte, at least one row."""
    rows = BLOCK_BYTES // max(_row_bytes(shape, dtype), 1)
    return 1 << max(rows.bit_length() - 1, 0)


def _row_bytes(shape: Sequence[int], dtype: Any) -> int:
    return math.prod(shape[1:]) * jax.numpy.dtype(dtype).itemsize


def _borders(shape: Sequence[int], dtype: Any, ranges: Iterable[tuple[int, int, int]]) -> list[int]:
    rows = num_rows(shape)
    cuts: set[int] = set()
    ordered = sorted(ranges)
    for (_, stop, process), (_, _, other) in itertools.pairwise(ordered):
        if process != other:
            cuts.add(stop)
    return [*sorted({*range(0, rows, block_rows(shape, dtype)), *cuts}), rows]


def _owned_ranges(array: Any) -> list[tuple[int, int, int]]:
    """(first row, end, process) of the rows, each row once."""
    rows = num_rows(np.shape(array))
    if not _is_spread(array):
        return [(0, rows, jax.process_index())]
    owners: dict[tuple[int, int], int] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        start, stop, _ = index[0].indices(rows)
        process: int = device.process_index
        owners[start, stop] = min(owners.get((start, stop), process), process)
    return [(start, stop, process) for (start, stop), process in owners.items() if stop > start]


def _pieces(array: Any) -> list[tuple[int, np.ndarray]]:
    """(first row, rows) of what this process has, in order of the rows."""
    if not isinstance(array, jax.Array) or not array.ndim:
        return [(0, np.asarray(array))]
    if not _is_row_sharded(array):
        if not array.is_fully_addressable and not array.is_fully_replicated:
            from jax.experimental import multihost_utils

            return [(0, np.asarray(multihost_utils.process_allgather(array, tiled=True)))]
        return [(0, np.asarray(array))]
    starts: dict[int, Any] = {}
    for shard in array.addressable_shards:
        starts.setdefault(shard.index[0].indices(array.shape[0])[0], shard.data)
    for data in starts.values():
        data.copy_to_host_async()
    return [(start, np.asarray(starts[start])) for start in sorted(starts)]


def _is_spread(array: Any) -> bool:
    """Whether processes have rows of it that others lack; all of them say the same."""
    if not isinstance(array, jax.Array) or not array.ndim or array.is_fully_addressable:
        return False
    return not array.is_fully_replicated and _is_row_sharded(array)


def _is_row_sharded(array: jax.Array) -> bool:
    local = array.sharding.shard_shape(array.shape)
    return local[1:] == array.shape[1:]


def _hash_spans(
    pieces: Sequence[tuple[int, np.ndarray]], spans: Sequence[tuple[int, int]], threads: int | None = None
) -> list[str]:
    flat = [(start, _as_bytes(rows)) for start, rows in pieces]

    def one(span: tuple[int, int]) -> str:
        digest = xxhash.xxh3_128()
        for start, rows in flat:
            low, high = max(span[0], start), min(span[1], start + rows.shape[0])
            if low < high:
                digest.update(rows[low - start : high - start].reshape(-1).data)
        return digest.hexdigest()

    if len(spans) < 4 or threads == 1:
        return [one(span) for span in spans]
    with concurrent.futures.ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, spans))


def _as_bytes(rows: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(rows)
    rows = rows.reshape(num_rows(rows.shape), math.prod(rows.shape[1:]))
    return rows.view(np.uint8) if rows.size else np.zeros((rows.shape[0], 0), np.uint8)


def _exchange(found: list[list[str]]) -> list[list[str]]:
    """Puts together what the processes have; a digest that a process lacks is zeros."""
    from jax.experimental import multihost_utils

    lengths = [len(blocks) for blocks in found]
    local = np.frombuffer(bytes.fromhex("".join(b for blocks in found for b in blocks)), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(local))
    merged = everyone.reshape(-1, local.size).max(axis=0).tobytes().hex()
    digests = iter(merged[i : i + 32] for i in range(0, len(merged), 32))
    return [[next(digests) for _ in range(length)] for length in lengths]


def _runs(spans: Sequence[tuple[int, int]]) -> str:
    runs: list[list[int]] = []
    for start, stop in spans:
        if runs and runs[-1][1] == start:
            runs[-1][1] = stop
        else:
            runs.append([start, stop])
    shown = ", ".join(f"{start} to {stop - 1}" for start, stop in runs[:4])
    return shown + (f" and {len(runs) - 4} more runs" if len(runs) > 4 else "")
