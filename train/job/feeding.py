"""Batches on the devices ahead of the step that takes them, each with the place to resume from."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax

from ..data import Batch, batches
from ..data.pipeline import ExampleSource
from ..trainer import Trainer

#: Steps between the start of an agreement of hosts and its use: it is then over, and no step waits for it.
_AHEAD = 2


def feed(
    trainer: Trainer,
    examples: ExampleSource,
    batch_size: int,
    *,
    state: Any = None,
    observe: Callable[[Batch], None] = lambda batch: None,
    prefetch: int = 2,
    **options: Any,
) -> Iterator[tuple[Batch, Any]]:
    """Batches laid out for `trainer.step`, in the order of `batches`.

    All host work (reading, padding, the layout over the shards) is done on Grain's thread while steps run.
    One host's batches are also copied to the devices there. Several hosts must first agree on shapes, in
    one order, which the caller's thread starts some steps ahead; with SparseCores, packing itself asks the
    other hosts, and is done on the caller's thread too.

    Args:
      trainer: lays the batches out.
      examples: to read; of all hosts.
      batch_size: B, over all hosts.
      state: where to go on, as yielded before; None starts at the first batch.
      observe: called on each host batch, on Grain's thread.
      prefetch: batches made ahead.
      **options: others of `batches`.

    Yields:
      A batch, and the JSON-able state of the input after it.
    """
    several = jax.process_count() > 1
    alone = trainer.embedding.packs_alone
    lay_out = trainer.pack_batch if several else trainer.shard_batch

    def transform(batch: Batch) -> Batch:
        observe(batch)
        return lay_out(batch) if alone else batch

    dataset = batches(
        examples,
        batch_size,
        shard=grain.sharding.ShardByJaxProcess() if several else None,
        transform=transform,
        prefetch=prefetch,
        **options,
    )
    iterator = iter(dataset)
    if state is not None:
        iterator.set_state(state)
    pairs = ((batch if alone else lay_out(batch), iterator.get_state()) for batch in iterator)
    return _agreed(trainer, pairs) if several else pairs


def first_batch(examples: ExampleSource, batch_size: int, seed: int) -> Batch:
    """The first batch of `feed`, this host's rows of it, as they were read."""
    shard = grain.sharding.ShardByJaxProcess() if jax.process_count() > 1 else None
    return next(iter(batches(examples, batch_size, shard=shard, seed=seed, prefetch=0)))


def _agreed(trainer: Trainer, pairs: Iterator[tuple[Batch, Any]]) -> Iterator[tuple[Batch, Any]]:
    waiting: deque = deque()
    for packed, state in itertools.chain(pairs, [(None, None)] * _AHEAD):
        waiting.append((packed, state, None if packed is None else trainer.embedding.agree(packed.features)))
        if len(waiting) > _AHEAD:
            packed, state, agreed = waiting.popleft()
            if packed is not None:
                yield trainer.place_batch(packed, agreed), state
