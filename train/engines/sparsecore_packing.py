"""Host preprocessing for SparseCores: jax-tpu-embedding sorts a batch's ids by the SparseCores that hold them."""

import itertools
import threading
from typing import Any, NamedTuple

import jax
import numpy as np

from .batch import FeatureLayout
from .placement import Stack
from .sparsecore import SparseCoreIds
from .sparsecore_order import SampleOrder


class Part(NamedTuple):
    """What one feature of a stack has in a batch, over the shards of this host.

    Attributes:
      feature: which.
      positions: [N] in the stack.
      segments: [N] ascending, in [0, shards S_f).
    """

    feature: FeatureLayout
    positions: np.ndarray
    segments: np.ndarray


class Limits(NamedTuple):
    """The sizes that a program is compiled for.

    Attributes:
      max_ids: of one SparseCore for another.
      max_unique_ids: likewise, each id once.
      places: M / C, of one SparseCore.
    """

    max_ids: int = 0
    max_unique_ids: int = 0
    places: int = 0


class SparseCorePacking:
    """Lays out the ids of batches; remembers the limits, which only grow, so that few programs are compiled.

    The library would end the process, or drop ids, where a batch does not fit its limits: they are measured
    first, and what it dropped is counted after.
    """

    def __init__(self):
        self._limits: dict[str, Limits] = {}
        self._lock = threading.Lock()

    def pack(self, stack: Stack, parts: list[Part], num_shards: int) -> SparseCoreIds:
        """The ids of one stack, as numpy arrays [num_shards, ...].

        Args:
          stack: which.
          parts: one a feature, in the order of their segments.
          num_shards: of this host.
        """
        counts, positions, gains = _by_sample(stack, parts, num_shards)
        limits = self._limits.get(stack.name, Limits())
        most = agree(Limits(_most_ids(stack, counts, positions, num_shards))).max_ids
        fits = most <= limits.max_ids
        # Where it does not fit, as many as there can be of each first: how many there are is known after.
        tried = limits if fits else Limits(_room(most), _room(most), _room(most) * stack.num_blocks)
        out, needed = _preprocess(stack, counts, positions, gains, num_shards, tried)
        needed = agree(needed)._replace(max_ids=most)
        if any(a > b for a, b in zip(needed, limits, strict=True)):
            with self._lock:  # another thread's batch may have needed more meanwhile
                known = self._limits.get(stack.name, Limits())
                limits = Limits(*(max(_room(a), b) if a > b else b for a, b in zip(needed, known, strict=True)))
                self._limits[stack.name] = limits
            out, _ = _preprocess(stack, counts, positions, gains, num_shards, limits)
        pointers, ids, samples, gains = (np.asarray(x).reshape(num_shards, -1) for x in out)
        return SparseCoreIds(pointers, ids, samples, gains, None, None, limits.max_ids, limits.max_unique_ids)


def slots_of(
    ids: SparseCoreIds,
    stack: Stack,
    features: tuple[FeatureLayout, ...],
    positions: np.ndarray,
    segments: np.ndarray,
) -> np.ndarray:
    """Which place of `ids` each entry is in: int32 [n, N], M for padding.

    Args:
      ids: of the stack.
      stack: which.
      features: of the stack.
      positions: [n, N] of the entries.
      segments: [n, N].
    """
    num_shards, size = ids.embedding_ids.shape
    blocks, cores = stack.num_blocks, stack.cores
    segment_of = SampleOrder(features, cores).to_segments_numpy()
    slots = np.full(positions.shape, size, np.int32)
    ends = ids.row_pointers.reshape(num_shards, cores, -1)[:, :, :blocks]
    for shard in range(num_shards):
        places, keys = [], []
        for core in range(cores):
            first = core * (size // cores)
            end = ends[shard, core].astype(np.int64)
            start = np.concatenate([[0], -(-end[:-1] // 8) * 8])
            count = end - start
            place = first + np.repeat(start - (np.cumsum(count) - count), count) + np.arange(count.sum())
            block = np.repeat(np.arange(blocks), count)
            position = block * (stack.num_positions // blocks) + ids.embedding_ids[shard, place]
            segment = segment_of[core, ids.sample_ids[shard, place]].astype(np.int64)
            places.append(place)
            keys.append(segment * stack.num_positions + position)
        place, key = np.concatenate(places), np.concatenate(keys)
        order = np.argsort(key)
        live = positions[shard] < stack.num_positions
        wanted = segments[shard, live].astype(np.int64) * stack.num_positions + positions[shard, live]
        slots[shard, live] = place[order][np.searchsorted(key[order], wanted)]
    return slots


def agree(limits: Limits) -> Limits:
    """The largest of all hosts: they run one program."""
    if jax.process_count() == 1:
        return limits
    from jax.experimental import multihost_utils

    return Limits(*np.max(multihost_utils.process_allgather(np.array(limits, np.int32)), axis=0).tolist())


def _by_sample(stack: Stack, parts: list[Part], num_shards: int):
    """How many entries each sample of this host has, and their positions and gains, in the order of samples."""
    cores = num_shards * stack.cores
    by_feature = []
    for part in parts:
        size = part.feature.num_segments // stack.cores
        edges = np.arange(1, cores) * size
        entries = np.searchsorted(part.segments, edges)
        counts = np.bincount(part.segments, minlength=cores * size)
        shares = (
            np.split(counts, edges),
            np.split(part.positions, entries),
            np.split(_divided(part), entries),
        )
        by_feature.append(shares)
    # The shares of a SparseCore follow each other by feature.
    return tuple(np.concatenate([f[i][core] for core in range(cores) for f in by_feature]) for i in range(3))


def _divided(part: Part) -> np.ndarray:
    """One over the combiner's divisor, float32 [N], for weights of 1."""
    combiner = part.feature.bag.combiner
    if not part.feature.is_combined or combiner == "sum":
        return np.ones(part.segments.size, np.float32)
    count = np.bincount(part.segments).astype(np.float64)
    return (1 / (count if combiner == "mean" else np.sqrt(count))[part.segments]).astype(np.float32)


def _most_ids(stack: Stack, counts: np.ndarray, positions: np.ndarray, num_shards: int) -> int:
    """Of one SparseCore for another, at least 1."""
    cores = num_shards * stack.cores
    per_core = counts.reshape(cores, -1).sum(axis=1)
    owner = positions // (stack.num_positions // stack.num_blocks)
    pair = np.repeat(np.arange(cores), per_core) * stack.num_blocks + owner
    return int(np.bincount(pair, minlength=1).max(initial=1))


def _preprocess(stack: Stack, counts, positions, gains, num_shards: int, limits: Limits):
    """The library's arrays, and the limits that this batch needs of it."""
    from jax_tpu_embedding.sparsecore.lib.nn import embedding

    blocks, rows = stack.num_blocks, stack.num_positions // stack.num_blocks
    # The library takes id i to row i // blocks of SparseCore i % blocks.
    ids = (positions % rows * blocks + positions // rows).astype(np.int32)
    spec = _spec(stack, counts.size // num_shards, limits)
    out, stats = embedding.preprocess_sparse_dense_matmul_input(
        [_bags(ids, counts)],
        [_bags(gains, counts)],
        [spec],
        num_shards,
        stack.num_shards,
        num_sc_per_device=stack.cores,
        allow_id_dropping=True,
    )
    found = Limits(
        int(np.max(stats.max_ids_per_partition[stack.name])),
        int(np.max(stats.max_unique_ids_per_partition[stack.name])),
        int(np.max(stats.required_buffer_size_per_sc[stack.name])),
    )
    dropped = int(stats.id_drop_counters.get(stack.name, 0))
    if dropped and all(a <= b for a, b in zip(found, limits, strict=True)):
        raise RuntimeError(
            f"jax-tpu-embedding dropped {dropped} ids of stack {stack.name!r}, though they fit its limits {limits}; "
            "use engine='xla'."
        )
    names = ("lhs_row_pointers", "lhs_embedding_ids", "lhs_sample_ids", "lhs_gains")
    return tuple(getattr(out, name)[stack.name] for name in names), found


def _spec(stack: Stack, samples: int, limits: Limits) -> Any:
    """A stack as one table of the library's, and its samples as one feature: `positions` are stacked already."""
    from jax_tpu_embedding.sparsecore.lib.nn import embedding, embedding_spec

    table = embedding_spec.TableSpec(
        name=stack.name,
        vocabulary_size=stack.num_positions,
        embedding_dim=stack.dim,
        initializer=jax.nn.initializers.zeros,
        optimizer=embedding_spec.SGDOptimizerSpec(),
        combiner="sum",
        max_ids_per_partition=limits.max_ids,
        max_unique_ids_per_partition=limits.max_unique_ids,
        suggested_coo_buffer_size_per_device=limits.places * stack.cores,
    )
    batch = samples * stack.num_shards
    spec = embedding_spec.FeatureSpec(
        name=stack.name, table_spec=table, input_shape=(batch, 1), output_shape=(batch, stack.dim)
    )
    embedding.prepare_feature_specs_for_training([spec], stack.num_shards, stack.cores)
    return spec


def _bags(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[B, L] where all samples have the same number of values, else a [B] array of arrays."""
    if counts.size and values.size and counts[0] * counts.size == values.size and (counts == counts[0]).all():
        return values.reshape(counts.size, -1)
    edges = [0, *np.cumsum(counts).tolist()]
    return np.fromiter((values[a:b] for a, b in itertools.pairwise(edges)), object, counts.size)


def _room(count: int) -> int:
    """The next of numbers in steps of 8, later of an eighth to a sixteenth."""
    step = 1 << max(count.bit_length() - 4, 3)
    return -(-count // step) * step
