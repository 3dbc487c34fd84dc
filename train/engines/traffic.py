"""How many bytes a shard exchanges for a lookup and an update of a stack, by formula.

N entries and S segments a shard, n shards, C the window of all_to_all; a collective counts the larger of what
a shard gives and gets:

    row, all_gather    2 n (8 N + 4 S D)               entries and sums, both ways
    row, all_to_all    k n C (2 * 4 + (item + 4) D)    rows wanted, rows, and their gradients, in k rounds
    column             2 n 8 N + 2 * 4 S D             entries; of the sums just a shard's own columns
    replicated         4 (R D + R)                     gradient of the whole table, and which rows it has
    sparsecore         C K U (4 + 2 * 4 W)             rows that each of C SparseCores wants of each of all K, at
                                                       most U of each, of W columns, and their gradients

Entries with weights take 12 bytes in place of 8. `mod`, `div` and `table` placements are all rows. There is one round
where ids are spread evenly over their owners, unless these are fewer than the shards, as those of `table` placements.
"""

import math

import jax.numpy as jnp

from .placement import Stack

_EXCHANGES = ("auto", "all_gather", "all_to_all")


def check_exchange(exchange: str) -> None:
    """Raises ValueError if it is neither one of them nor "auto"."""
    if exchange not in _EXCHANGES:
        raise ValueError(f"exchange must be one of {_EXCHANGES}, got {exchange!r}.")


def pair_window(capacity: int, num_shards: int) -> int:
    """Room for rows between two shards in a round of all_to_all.

    Different ids spread over the shards like balls over bins: five standard deviations leave a second
    round to one batch in hundreds, or skewed ones.
    """
    mean = capacity / num_shards
    return min(capacity, -(-math.ceil(mean + 5 * math.sqrt(mean)) // 8) * 8)


def exchanged_bytes(
    stack: Stack, exchange: str, num_segments: int, capacity: int, is_weighted: bool = False
) -> int:
    """Bytes that one shard exchanges for a lookup and an update of this stack; see above.

    Args:
      stack: which.
      exchange: "all_gather" or "all_to_all"; of no use to stacks that are not sharded by rows.
      num_segments: S.
      capacity: N.
      is_weighted: whether entries have weights.
    """
    n, entry = stack.num_shards, 12 if is_weighted else 8
    if stack.kind == "replicated":
        return 4 * stack.num_rows * (stack.dim + 1)
    if stack.kind == "column":
        return 2 * n * entry * capacity + 8 * num_segments * stack.dim
    if exchange == "all_gather":
        return 2 * n * (entry * capacity + 4 * num_segments * stack.dim)
    # Weights stay where they are.
    return (
        _rounds(stack, capacity)
        * n
        * pair_window(capacity, n)
        * (8 + stack.dim * (jnp.dtype(stack.dtype).itemsize + 4))
    )


def _rounds(stack: Stack, capacity: int) -> int:
    """Rounds of all_to_all for N different ids, evenly of the stack's owners."""
    owners = {p.shift for p in stack.placements}
    if any(p.sharding != "table" for p in stack.placements):
        return 1
    wanted = min(-(-capacity // len(owners)), stack.num_rows)
    return max(-(-wanted // max(pair_window(capacity, stack.num_shards), 1)), 1)


def sparsecore_bytes(stack: Stack, max_unique_ids: int) -> int:
    """Bytes that the SparseCores of one device exchange at most for a lookup and an update of this stack."""
    return stack.cores * stack.num_blocks * max_unique_ids * (4 + 8 * stack.dim)


def cheaper_exchange(stack: Stack, num_segments: int, capacity: int, is_weighted: bool = False) -> str:
    """The exchange that moves fewer bytes."""
    return min(
        ("all_to_all", "all_gather"),
        key=lambda name: exchanged_bytes(stack, name, num_segments, capacity, is_weighted),
    )
