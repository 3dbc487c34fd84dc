"""Where the rows of each table lie: stacks of tables, and the position of every id in them.

Tables that share width, type, optimizer and quantization form one stack, so that the number of
collectives does not grow with the number of tables. A "row" stack is an array [n R, D] sharded over its
rows: each of the n shards holds R rows, a piece of every table after the other. Position p of the stack
is row p % R of shard p // R. With `rows` = ceil(V / n) and `first_row` the rows of the tables before:

    mod    id i is on shard (i + shift) % n, at row first_row + i // n
    div    id i is on shard i // rows,       at row first_row + i % rows
    table  id i is on shard `shift`,         at row first_row + i

A stack of the `sparsecore` engine is a "mod" one over the C SparseCores of every shard: R / C rows each, so
that n counts SparseCores in the formula above, and in `rows`. `engines.sparsecore_stacks` says how it is padded.

"mod" spreads neighbouring ids, which are often of similar frequency, over all shards. A "column" stack is
[R, D] sharded over D, a "replicated" one is [R, D] on every shard; their positions are first_row + i.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxembed.config import QuantizationConfig, TableConfig
from jaxembed.optimizers import Optimizer

Kind = Literal["row", "column", "replicated"]
SHARDINGS = ("mod", "div", "table", "column", "replicated")

#: Positions are int32, and one more value marks padding.
MAX_POSITIONS = 2**31 - 1

#: Tables of the `sparsecore` engine are kept as lines of 128 values, which lie on a TPU one after the other, as
#: SparseCores read rows of any width. As [R, D] they would be laid out anew in every step, unless D is 128.
LINE = 128


@dataclasses.dataclass(frozen=True)
class TablePlacement:
    """Where one table lies in its stack; see above.

    Attributes:
      table: its configuration.
      sharding: "mod", "div", "table", "column" or "replicated".
      first_row: its first row on the shards that hold it.
      rows: how many rows it takes there.
      shift: of "mod"; the shard of "table".
    """

    table: TableConfig
    sharding: str
    first_row: int
    rows: int
    shift: int = 0


class TablePlace(NamedTuple):
    """All that positions of a table's ids depend on, as a key: attributes as of Stack and TablePlacement."""

    table: str
    stack: str
    sharding: str
    num_shards: int
    cores: int
    num_rows: int
    first_row: int
    rows: int
    shift: int


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tables in one array.

    Attributes:
      name: of the stack, unique.
      kind: "row", "column" or "replicated".
      num_shards: n.
      num_rows: R.
      dim: D.
      dtype: of the rows.
      optimizer: of its tables.
      quantization: of its tables.
      placements: one a table.
      cores: C, SparseCores a shard, each with R / C of its rows; 0 on the `xla` engine.
    """

    name: str
    kind: Kind
    num_shards: int
    num_rows: int
    dim: int
    dtype: Any
    optimizer: Optimizer
    quantization: QuantizationConfig | None
    placements: tuple[TablePlacement, ...]
    cores: int = 0

    @property
    def num_blocks(self) -> int:
        """How many pieces ids are spread over: the shards, or all of their SparseCores."""
        return self.num_shards * max(self.cores, 1)

    @property
    def num_positions(self) -> int:
        """Number of positions; this value itself marks padding."""
        return self.num_rows * (self.num_shards if self.kind == "row" else 1)

    def shape(self, trailing: tuple[int, ...]) -> tuple[int, ...]:
        """Global shape of an array of this stack whose rows have the shape `trailing`."""
        if self.cores:
            return (self.num_positions * math.prod(trailing) // LINE, LINE)
        return (self.num_positions, *trailing)

    def rows_of(self, array: Any) -> Any:
        """A shard's piece of a table or slot as its rows [R, ...]."""
        return array.reshape(-1, self.dim) if self.cores else array

    def array_of(self, rows: Any) -> Any:
        """The inverse of `rows_of`."""
        return rows.reshape(-1, LINE) if self.cores else rows

    def slot_trailing(self, name: str) -> tuple[int, ...]:
        """Shape of one row of the slot `name`."""
        return self.optimizer.slot_shape(name, (self.num_positions, self.dim))[1:]

    def position(self, placement: TablePlacement, ids: Any) -> Any:
        """Positions of ids in [0, V): int32, numpy or JAX as `ids` are."""
        n, p = self.num_blocks, placement
        if p.sharding == "mod" and n > 1:
            row = ids // n
            # Below 2 n. A remainder would be another division, which takes milliseconds on the host.
            block = ids - row * n + p.shift
            block = block - n * (block >= n).astype(block.dtype)
            return (block * (self.num_positions // n) + p.first_row + row).astype(np.int32)
        if p.sharding == "div":
            shard, row = ids // p.rows, ids % p.rows
        elif p.sharding == "table":
            shard, row = p.shift, ids
        else:
            shard, row = 0, ids
        return (shard * self.num_rows + p.first_row + row).astype(np.int32)

    def ids_on_block(self, placement: TablePlacement, shard: Any) -> Any:
        """Which id each of the `rows` rows of a placement is on a shard, or a SparseCore of `num_blocks`.

        Rows of no id give V or more.
        """
        n, p = self.num_blocks, placement
        row = jnp.arange(p.rows, dtype=jnp.int32)
        if p.sharding == "mod":
            return row * n + (shard - p.shift) % n
        if p.sharding == "div":
            return row + shard * p.rows
        if p.sharding == "table":
            return jnp.where(shard == p.shift, row, p.table.vocabulary_size)
        return row

    def share(self, placement: TablePlacement, shard: int) -> range:
        """The ids whose rows a shard, or a SparseCore of `num_blocks`, holds, in order.

        The first is at its row `first_row`, the others follow.
        """
        n, p, vocabulary = self.num_blocks, placement, placement.table.vocabulary_size
        if p.sharding == "mod":
            return range((shard - p.shift) % n, vocabulary, n)
        if p.sharding == "div":
            return range(min(shard * p.rows, vocabulary), min((shard + 1) * p.rows, vocabulary))
        if p.sharding == "table":
            return range(vocabulary if shard == p.shift else 0)
        return range(vocabulary)

    @functools.cached_property
    def places(self) -> tuple[TablePlace, ...]:
        """Where each of its tables lies: made once, for every batch has them."""
        return tuple(
            TablePlace(
                p.table.name,
                self.name,
                p.sharding,
                self.num_shards,
                self.cores,
                self.num_rows,
                p.first_row,
                p.rows,
                p.shift,
            )
            for p in self.placements
        )


def places_of(stacks: Mapping[str, Stack]) -> tuple[TablePlace, ...]:
    """Where each table of the stacks lies."""
    return tuple(place for stack in stacks.values() for place in stack.places)


def stack_tables(
    tables: Mapping[str, TableConfig],
    optimizer: Optimizer | None,
    shardings: Mapping[str, str],
    num_shards: int,
) -> tuple[Stack, ...]:
    """Places every table.

    Args:
      tables: by name, in the order in which they are stacked.
      optimizer: of the tables without one of their own.
      shardings: table name to one of `SHARDINGS`.
      num_shards: n.

    Raises:
      ValueError: if a table has no optimizer, its sharding does not fit it, or its positions do not fit int32.
    """
    groups: dict[tuple, list[TableConfig]] = {}
    for name, table in tables.items():
        own = optimizer_of(table, optimizer)
        sharding = shardings[name]
        _check_sharding(table, own, sharding, num_shards)
        kind = sharding if sharding in ("column", "replicated") else "row"
        key = (kind, table.dim, table.dtype, own, table.quantization_config)
        groups.setdefault(key, []).append(table)
    stacks: list[Stack] = []
    for (kind, dim, dtype, own, quantization), members in groups.items():
        for placements, num_rows in _place(members, shardings, num_shards, kind):
            stacks.append(
                Stack(
                    f"{kind}{dim}_{len(stacks)}",
                    kind,
                    num_shards,
                    num_rows,
                    dim,
                    dtype,
                    own,
                    quantization,
                    tuple(placements),
                )
            )
    return tuple(stacks)


def optimizer_of(table: TableConfig, default: Optimizer | None) -> Optimizer:
    """The optimizer of a table.

    Raises:
      ValueError: if it has none, or one that is not registered.
    """
    own = table.optimizer if table.optimizer is not None else default
    if not isinstance(own, Optimizer):
        raise ValueError(
            f"table {table.name!r} needs an optimizer, got {own!r}; pass one to ShardedEmbedding or set "
            "TableConfig.optimizer, such as jaxembed.optimizers.Adagrad(0.05)."
        )
    _ = own.slot_names  # one that is not registered says so, before anything else is found wrong with it
    return own


def _check_sharding(table: TableConfig, optimizer: Optimizer, sharding: str, num_shards: int) -> None:
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding of table {table.name!r} must be one of {SHARDINGS}, got {sharding!r}.")
    if sharding == "column" and table.dim % num_shards:
        raise ValueError(
            f"table {table.name!r} cannot be column-sharded: its dim {table.dim} must be a multiple of the "
            f"{num_shards} shards; use 'mod'."
        )
    if sharding == "column" and not optimizer.is_elementwise:
        raise ValueError(
            f"table {table.name!r} cannot be column-sharded: its optimizer {type(optimizer).__name__} may mix the "
            "components of a row; use 'mod', or set `is_elementwise = True` on the class if it updates each component "
            "by itself."
        )
    if sharding == "replicated" and not optimizer.use_gradient_accumulation:
        raise ValueError(
            f"table {table.name!r} cannot be replicated: its optimizer has use_gradient_accumulation=False, "
            "which applies the occurrences of an id one by one; use 'mod'."
        )


def _place(tables: list[TableConfig], shardings: Mapping[str, str], n: int, kind: str):
    """Splits the tables of one group into stacks whose positions fit int32; ValueError if those of one do not."""
    limit = MAX_POSITIONS // (n if kind == "row" else 1)
    done, placements, shared = [], [], 0
    whole = np.zeros(n, np.int64)
    # Tables on one shard each come last, so that those on all shards start at one row everywhere.
    for table in sorted(tables, key=lambda t: shardings[t.name] == "table"):
        sharding, shift = shardings[table.name], 0
        rows = table.vocabulary_size if sharding not in ("mod", "div") else -(-table.vocabulary_size // n)
        if sharding == "table":
            shift = int(np.argmin(whole))
        if rows > limit:
            raise ValueError(
                f"table {table.name!r} cannot be sharded by {sharding!r} over {n} devices: it takes {rows} rows on each, "
                f"positions in int32 leave {limit}; use 'mod', or fewer rows or devices."
            )
        if placements and shared + whole[shift] + rows > limit:
            done.append((placements, shared + int(whole.max())))
            placements, shared, whole = [], 0, np.zeros(n, np.int64)
        first = shared + int(whole[shift])
        if sharding == "table":
            whole[shift] += rows
        else:
            shared += rows
            # Small tables hold few ids a shard: start each at another shard.
            shift = len(placements) % n if sharding == "mod" else 0
        placements.append(TablePlacement(table, sharding, first, rows, shift))
    return [*done, (placements, shared + int(whole.max()))]
