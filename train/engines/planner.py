"""Chooses how each table is sharded, from sizes alone, and says why."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxembed.config import TableConfig
from jaxembed.features import feature_tables
from jaxembed.optimizers import Optimizer

from .placement import SHARDINGS, Stack, stack_tables
from .stacking import stacks_of
from .traffic import cheaper_exchange, check_exchange, exchanged_bytes

#: Narrower columns would fill a part of a TPU's lanes only, at the memory of whole ones.
_LANES = 128


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """How one table is sharded.

    Attributes:
      name: of the table.
      sharding: "mod", "div", "table", "column" or "replicated".
      bytes_per_device: of rows and slots on each device, of the table in a stack of its own.
      exchanged_bytes: a device and step, predicted, its share of its stack's; of SparseCores' tables what the xla engine
        would exchange.
      why: in words.
    """

    name: str
    sharding: str
    bytes_per_device: int
    exchanged_bytes: int
    why: str


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """How all tables are sharded; print it, and pass it to ShardedEmbedding as `plan`.

    Attributes:
      tables: one a table.
      num_shards: n it was made for.
      memory_per_device: bytes it was made for.
      bytes_per_device: of all tables. Less than their sum where "table" ones of one stack lie on different devices:
        a stack takes as many rows on all devices as on the fullest.

    Examples:
      >>> tables = (TablePlan("user", "mod", 16_000_000, 800_000, "rows spread"),)
      >>> plan = ShardingPlan(tables, 8, 1 << 30, 16_000_000)
      >>> print(plan)
      table  sharding  MB a device  MB exchanged a step  why
      user   mod             16.00                0.800  rows spread
      all                    16.00                0.800  of 1,074 MB on each of 8 devices
    """

    tables: tuple[TablePlan, ...]
    num_shards: int
    memory_per_device: int
    bytes_per_device: int

    @property
    def shardings(self) -> dict[str, str]:
        """Table name to sharding."""
        return {t.name: t.sharding for t in self.tables}

    def __str__(self) -> str:
        header = ("table", "sharding", "MB a device", "MB exchanged a step", "why")
        rows = [
            (t.name, t.sharding, f"{t.bytes_per_device / 1e6:,.2f}", f"{t.exchanged_bytes / 1e6:,.3f}", t.why)
            for t in self.tables
        ]
        exchanged = sum(t.exchanged_bytes for t in self.tables) / 1e6
        of = f"of {self.memory_per_device / 1e6:,.0f} MB on each of {self.num_shards} devices"
        rows.append(("all", "", f"{self.bytes_per_device / 1e6:,.2f}", f"{exchanged:,.3f}", of))
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(4)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}"
            for a, b, c, d, e in (header, *rows)
        )


def plan_tables(
    feature_config: Any,
    optimizer: Optimizer | None,
    num_shards: int,
    *,
    memory_per_device: int,
    ids_per_batch: Mapping[str, int],
    bags_per_batch: Mapping[str, int],
    overrides: Mapping[str, str] | None = None,
    cores: int = 0,
    exchange: str = "auto",
) -> ShardingPlan:
    """Chooses a sharding for every table.

    Each table gets the sharding that its share of a step exchanges the fewest bytes with. Rows lie "mod":
    that spreads frequent ids. "div" is never better, and is there to be asked for. A table of fewer rows than
    devices lies whole on one ("table"). "column" is for dims whose columns still fill a TPU's lanes.
    "replicated" takes memory on every device, and is given to the tables that save most a byte of it.

    Args:
      feature_config: a structure of FeatureConfig.
      optimizer: of the tables that have none of their own.
      num_shards: n, devices that tables are spread over.
      memory_per_device: bytes there are for tables and slots on one device.
      ids_per_batch: table name to number of ids a global batch looks up in it, over all features.
      bags_per_batch: likewise, the number of output rows.
      overrides: table name to sharding, kept as they are.
      cores: SparseCores of a device that the `sparsecore` engine uses, which pads what they hold; 0 for `xla`.
      exchange: how rows travel, as of ShardedEmbedding.

    Raises:
      ValueError: if an argument is not of the form above, or the tables do not fit.

    Examples:
      >>> import jaxembed as je
      >>> from jaxembed.optimizers import SGD
      >>> user = je.TableConfig(vocabulary_size=1_000_000, dim=32, name="user")
      >>> age = je.TableConfig(vocabulary_size=10, dim=32, name="age")
      >>> counts = {"user": 4096, "age": 4096}
      >>> plan = plan_tables(
      ...     [je.FeatureConfig(user), je.FeatureConfig(age)], SGD(0.1), num_shards=8,
      ...     memory_per_device=1 << 30, ids_per_batch=counts, bags_per_batch=counts)
      >>> plan.shardings
      {'age': 'replicated', 'user': 'mod'}
    """
    configs = feature_tables(feature_config)
    overrides = dict(overrides or {})
    _check(configs, num_shards, memory_per_device, ids_per_batch, bags_per_batch, overrides, cores)
    check_exchange(exchange)
    # Of numpy they would overflow.
    num_shards, memory_per_device, cores = int(num_shards), int(memory_per_device), int(cores)
    ids_per_batch = {name: int(count) for name, count in ids_per_batch.items()}
    bags_per_batch = {name: int(count) for name, count in bags_per_batch.items()}
    choice = _Choice(configs, optimizer, num_shards, cores, exchange, ids_per_batch, bags_per_batch)
    chosen: dict[str, TablePlan] = {}
    replicas: list[TablePlan] = []
    for name, table in configs.items():
        if name in overrides:
            chosen[name] = choice.plan(table, overrides[name], "as asked for")
            continue
        best = chosen[name] = choice.spread(table)
        why = f"small: moves less than {best.exchanged_bytes / 1e6:,.3f} MB of rows"
        whole = choice.plan_if_it_suits(table, "replicated", why)
        if whole is not None and whole.exchanged_bytes < best.exchanged_bytes:
            replicas.append(whole)
    _replicate(chosen, replicas, memory_per_device, choice.stored_bytes)
    stored = choice.stored_bytes(chosen.values())
    plan = ShardingPlan(choice.together(chosen), num_shards, memory_per_device, stored)
    if plan.bytes_per_device > memory_per_device:
        raise ValueError(
            f"the tables and slots need {plan.bytes_per_device:,} bytes a device, more than the "
            f"memory_per_device of {memory_per_device:,}; use more devices, bfloat16 tables, an optimizer with "
            f"fewer slots, or drop overrides to 'replicated' and 'table'. The plan was:\n{plan}"
        )
    return plan


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What a sharding of a table would cost.

    Attributes:
      tables: by name.
      optimizer: of the tables that have none of their own.
      num_shards: n devices.
      cores: SparseCores of each.
      exchange: as of `plan_tables`.
      ids_per_batch: by table.
      bags_per_batch: by table.
    """

    tables: Mapping[str, TableConfig]
    optimizer: Optimizer | None
    num_shards: int
    cores: int
    exchange: str
    ids_per_batch: Mapping[str, int]
    bags_per_batch: Mapping[str, int]

    def plan(self, table: TableConfig, sharding: str, why: str) -> TablePlan:
        """The table with that sharding; `ValueError` if it does not suit the table."""
        (stack,) = stack_tables({table.name: table}, self.optimizer, {table.name: sharding}, self.num_shards)
        bags, entries = self._size([table.name])
        moved = exchanged_bytes(stack, self._exchange(stack, bags, entries), bags, entries)
        alone = TablePlan(table.name, sharding, 0, moved, why)
        return dataclasses.replace(alone, bytes_per_device=self.stored_bytes([alone]))

    def stored_bytes(self, plans: Iterable[TablePlan]) -> int:
        """Of rows and slots of these tables together, on each device."""
        return sum(map(_stored_bytes, self.stacks(plans)))

    def together(self, chosen: Mapping[str, TablePlan]) -> tuple[TablePlan, ...]:
        """With what each table exchanges as one of a stack: all of this travel the same way, and share its windows."""
        plans = dict(chosen)
        for stack in self.stacks(chosen.values()):
            names = [p.table.name for p in stack.placements]
            if stack.kind == "row" and stack.cores:
                plans |= {
                    k: dataclasses.replace(plans[k], why=f"{plans[k].why}, by SparseCores") for k in names
                }
            elif stack.kind == "row":
                exchange, whole, parts = self._exchanged(stack, names)
                ends = [whole * done // max(sum(parts), 1) for done in itertools.accumulate(parts, initial=0)]
                for name, (start, end) in zip(names, itertools.pairwise(ends), strict=True):
                    why = f"{plans[name].why}, by {exchange}"
                    plans[name] = dataclasses.replace(plans[name], exchanged_bytes=end - start, why=why)
        return tuple(plans.values())

    def stacks(self, plans: Iterable[TablePlan]) -> Iterable[Stack]:
        """What these tables lie in."""
        shardings = {plan.name: plan.sharding for plan in plans}
        tables = {name: self.tables[name] for name in shardings}
        return stacks_of(tables, self.optimizer, shardings, self.num_shards, self.cores).values()

    def _exchanged(self, stack: Stack, names: list[str]) -> tuple[str, int, list[int]]:
        """How a stack exchanges, its bytes, and those of each table by itself."""
        sizes = [self._size(some) for some in (names, *([name] for name in names))]
        exchange = self._exchange(stack, *sizes[0])
        whole, *parts = (exchanged_bytes(stack, exchange, *size) for size in sizes)
        return exchange, whole, parts

    def _exchange(self, stack: Stack, bags: int, entries: int) -> str:
        return cheaper_exchange(stack, bags, entries) if self.exchange == "auto" else self.exchange

    def _size(self, names: list[str]) -> tuple[int, int]:
        """Bags and entries a shard of these tables together."""
        bags = sum(self.bags_per_batch[name] for name in names)
        entries = sum(self.ids_per_batch[name] for name in names)
        return -(-bags // self.num_shards), -(-entries // self.num_shards)

    def plan_if_it_suits(self, table: TableConfig, sharding: str, why: str) -> TablePlan | None:
        """The same, or None if it does not suit the table."""
        try:
            return self.plan(table, sharding, why)
        except ValueError:
            return None

    def spread(self, table: TableConfig) -> TablePlan:
        """The table in parts, not copies: of what suits it, what exchanges the fewest bytes."""
        sharding, why = "mod", "rows spread over all devices"
        if table.vocabulary_size < self.num_shards:
            sharding, why = "table", "fewer rows than devices"
        best = self.plan(table, sharding, why)
        if table.dim < _LANES * self.num_shards:
            return best
        column = self.plan_if_it_suits(table, "column", "exchanges sums of its own columns only")
        return min(filter(None, (best, column)), key=lambda plan: plan.exchanged_bytes)


def _replicate(
    chosen: dict[str, TablePlan],
    replicas: list[TablePlan],
    memory: int,
    stored_bytes: Callable[[Iterable[TablePlan]], int],
) -> None:
    """Makes tables replicated while there is memory, those first that save most bytes a byte of it."""

    def saved(p: TablePlan) -> float:
        return (chosen[p.name].exchanged_bytes - p.exchanged_bytes) / max(p.bytes_per_device, 1)

    room = memory - stored_bytes(chosen.values())
    for plan in sorted(replicas, key=saved, reverse=True):
        # What it took before becomes free, which is worth finding out only where it matters.
        left = room - plan.bytes_per_device
        if left < 0:
            left = memory - stored_bytes({**chosen, plan.name: plan}.values())
        if left >= 0:
            chosen[plan.name], room = plan, left


def _stored_bytes(stack: Stack) -> int:
    """Of rows and slots on one device."""
    row = stack.dim * jnp.dtype(stack.dtype).itemsize
    for slot in stack.optimizer.slot_names:
        elements = 1
        for size in stack.slot_trailing(slot):
            elements *= size
        row += 4 * elements
    return stack.num_rows * row // (stack.num_shards if stack.kind == "column" else 1)


def _check(configs, num_shards, memory_per_device, ids_per_batch, bags_per_batch, overrides, cores) -> None:
    if not _is_count(cores) or cores < 0:
        raise ValueError(f"cores must be an int of at least 0, got {cores!r}.")
    for what, value in (("num_shards", num_shards), ("memory_per_device", memory_per_device)):
        if not _is_count(value) or value < 1:
            raise ValueError(f"{what} must be a positive int, got {value!r}.")
    for what, given in (("ids_per_batch", ids_per_batch), ("bags_per_batch", bags_per_batch)):
        if set(given) != set(configs) or any(not _is_count(v) or v < 0 for v in given.values()):
            raise ValueError(
                f"{what} must give a number of at least 0 for each table of {list(configs)}, got {dict(given)}."
            )
    unknown = {name: s for name, s in overrides.items() if name not in configs or s not in SHARDINGS}
    if unknown:
        raise ValueError(f"overrides must give tables of {list(configs)} one of {SHARDINGS}, got {unknown}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
