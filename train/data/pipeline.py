"""Batches of Examples through Grain: shuffled, sharded over hosts, prefetched, resumable to the batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .batch import Batch
from .shuffle import permute, permute_blocks

if TYPE_CHECKING:
    import grain


class ExampleSource(Protocol):
    """What `batches` reads: `Examples`, or a store that reads its examples when they are asked for.

    `block_splits` are the borders of the blocks that shuffling stays in, or None to shuffle all as one.
    """

    @property
    def block_splits(self) -> tuple[int, ...] | None: ...

    @property
    def ragged_features(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def capacities(self, batch_size: int) -> dict[str, int]: ...

    def take(self, rows: np.ndarray, batch_size: int, capacities: Mapping[str, int]) -> Batch: ...


def batches(
    examples: ExampleSource,
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    num_epochs: int | None = None,
    drop_remainder: bool = False,
    capacities: Mapping[str, int] | None = None,
    shard: grain.sharding.ShardOptions | None = None,
    transform: Callable[[Batch], Any] | None = None,
    prefetch: int = 2,
    num_threads: int = 1,
) -> grain.IterDataset[Any]:
    """A Grain data set of `Batch`, the same for the same arguments.

    Batch i is a pure function of (seed, i): epochs follow each other without a gap, each in an order of
    its own. `iter(...)` gives an iterator whose `get_state()` is one number, so a restored one goes on
    at exactly the next batch. With `shard`, host h of H gets rows [h B/H, (h + 1) B/H) of every batch:
    the hosts' batches put together are the batch of a single host, and a run may resume on another
    number of hosts.

    Args:
      examples: what to read.
      batch_size: B, over all hosts.
      shuffle: False reads in order.
      seed: seed of the order.
      num_epochs: how often every example is read; None for ever.
      drop_remainder: leave out the last examples where they do not fill a batch; otherwise the last
        batch is padded, with `mask` 0 on the padding.
      capacities: per ragged feature, how many ids a host's batch has room for. Default: B/H times the
        longest bag, which cannot overflow.
      shard: which host this is (`grain.sharding.ShardByJaxProcess()` under jax.distributed).
      transform: called on each batch on the prefetching threads, while a step runs: host preprocessing
        such as the layout of an engine, or the copy to the devices. Its value replaces the batch.
      prefetch: how many batches are made ahead, while a step runs; 0 for none.
      num_threads: how many threads make them.

    Raises:
      ImportError: if Grain is not installed (`pip install 'jaxembed[train]'`).
      ValueError: if the arguments do not fit each other.
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError("batches needs Grain: pip install 'jaxembed[train]'.") from error
    source = BatchSource(examples, batch_size, shuffle, seed, num_epochs, drop_remainder, capacities, shard)
    options = grain.ReadOptions(
        num_threads=num_threads if prefetch else 0,
        prefetch_buffer_size=max(prefetch, num_threads) if prefetch else 0,
    )
    dataset = grain.MapDataset.source(source)
    if transform is not None:
        dataset = dataset.map(transform)
    return dataset.to_iter_dataset(options)


class BatchSource:
    """Random access to the batches of `batches`, as a `grain.sources.RandomAccessDataSource`."""

    def __init__(
        self,
        examples: ExampleSource,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        num_epochs: int | None = None,
        drop_remainder: bool = False,
        capacities: Mapping[str, int] | None = None,
        shard: grain.sharding.ShardOptions | None = None,
    ):
        index, count = (shard.shard_index, shard.shard_count) if shard is not None else (0, 1)
        if batch_size < 1 or batch_size % count:
            raise ValueError(f"batch_size must be a positive multiple of {count} hosts, got {batch_size}.")
        if len(examples) == 0:
            raise ValueError("batches: examples must hold at least one example, got none.")
        if num_epochs is not None and num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1 or None, got {num_epochs}.")
        self._examples, self._batch_size, self._rows = examples, batch_size, batch_size // count
        self._first_row, self._shuffle, self._seed = index * self._rows, shuffle, seed
        ragged, capacities = set(examples.ragged_features), dict(capacities or {})
        if not ragged.issuperset(capacities):
            raise ValueError(
                f"capacities must be of ragged features {sorted(ragged)}, got {sorted(set(capacities) - ragged)} too."
            )
        if ragged.difference(capacities):
            capacities = examples.capacities(self._rows) | capacities
        self._capacities = capacities
        self._total = sys.maxsize if num_epochs is None else num_epochs * len(examples)
        self._length = self._total // batch_size if drop_remainder else -(-self._total // batch_size)
        if self._length == 0:
            raise ValueError(
                f"{len(examples)} examples do not fill one batch of {batch_size}; take a smaller batch or "
                "drop_remainder=False."
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self._batch_size + self._first_row
        positions = np.arange(start, max(start, min(start + self._rows, self._total)))
        epochs, rows = np.divmod(positions, len(self._examples))
        if self._shuffle:
            rows = self._shuffled(rows, epochs)
        return self._examples.take(rows, self._rows, self._capacities)

    def _shuffled(self, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        splits = self._examples.block_splits
        if splits is None:
            return permute(rows, len(self._examples), self._seed, epochs)
        parts = [permute_blocks(rows[epochs == e], splits, self._seed, int(e)) for e in np.unique(epochs)]
        return np.concatenate([*parts, np.zeros(0, np.int64)])

    def __repr__(self) -> str:
        return f"BatchSource({len(self._examples)} examples, batch_size={self._batch_size})"
