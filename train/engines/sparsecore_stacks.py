"""Which tables SparseCores hold, and how: stacked, mod-sharded over all SparseCores, rotated and padded."""

import importlib.util
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.config import TableConfig
from jaxembed.optimizers import Optimizer

from .placement import LINE, MAX_POSITIONS, Stack, TablePlacement, optimizer_of

ENGINES = ("auto", "xla", "sparsecore")

#: SparseCores a device where there are none: those of a v5p.
_EMULATED_CORES = 4
_LOG = logging.getLogger("jaxembed")


def sparse_cores(engine: str, device: Any, num_devices: int = 1) -> int:
    """SparseCores a device that the engine uses: 0 is the `xla` engine.

    Args:
      engine: "auto" takes the SparseCores that are there, where jax-tpu-embedding is installed;
        "sparsecore" on a device without a TPU runs the same layout and host preprocessing, and looks up as
        the `xla` engine does.
      device: of the mesh.
      num_devices: over which tables are sharded.

    Raises:
      ValueError: if `engine` is none of `ENGINES`, or "sparsecore" and the library or the cores are missing, or those
        of all devices are no power of two.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}.")
    if engine == "xla" or (engine == "auto" and device.platform != "tpu"):
        return 0
    if importlib.util.find_spec("jax_tpu_embedding") is None:
        if engine == "auto":
            return 0
        raise ValueError("engine='sparsecore' needs jax-tpu-embedding: pip install 'jaxembed[sparsecore]'.")
    cores = _cores_of(engine, device)
    if engine == "sparsecore" and not _is_power_of_two(num_devices * cores):
        raise ValueError(
            f"engine='sparsecore' needs a power of two of SparseCores, got {num_devices * cores}, {cores} on each of "
            f"{num_devices} devices; take a mesh of 1, 2, 4, 8, ... devices, or engine='xla'."
        )
    return cores


def _cores_of(engine: str, device: Any) -> int:
    if device.platform != "tpu":
        return _EMULATED_CORES
    from jax_tpu_embedding.sparsecore.utils import utils

    try:
        return utils.num_sparsecores_per_device(device)
    except ValueError:
        if engine == "auto":
            return 0
        raise ValueError(
            f"engine='sparsecore' needs a TPU with SparseCores (v5p, v6e or later), got {device.device_kind!r}; "
            "use 'auto' or 'xla'."
        ) from None


def refused_tables(
    tables: Mapping[str, TableConfig], optimizer: Optimizer | None, shardings: Mapping[str, str], blocks: int
) -> dict[str, str]:
    """The tables that SparseCores cannot hold, and why not.

    Args:
      tables: by name.
      optimizer: of the tables without one of their own.
      shardings: table name to the sharding that was asked for.
      blocks: SparseCores of all devices.
    """
    refused = {}
    for name, table in tables.items():
        reason = _why_not(table, optimizer_of(table, optimizer), shardings[name], blocks)
        if reason:
            refused[name] = reason
    return refused


def log_refused(refused: Mapping[str, str]) -> None:
    """Warns of what `refused_tables` found, if anything."""
    names: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names.setdefault(reason, []).append(repr(name))
    if names:
        reasons = "; ".join(f"{', '.join(those)}: {reason}" for reason, those in names.items())
        _LOG.warning("Tables that the sparsecore engine leaves to the xla engine: %s.", reasons)


def stack_on_sparsecores(
    tables: Mapping[str, TableConfig], optimizer: Optimizer | None, num_shards: int, cores: int
) -> tuple[Stack, ...]:
    """Stacks the tables of one width, optimizer and quantization.

    Rows are padded to a multiple of 8 a SparseCore, columns to a multiple of 8, and the whole stack to full
    lines. Each table starts on the SparseCores of another device.

    Args:
      tables: by name; `refused_tables` refuses none of them.
      optimizer: of the tables without one of their own.
      num_shards: devices.
      cores: SparseCores a device.
    """
    groups: dict[tuple, list[TableConfig]] = {}
    for table in tables.values():
        key = (table.dim, optimizer_of(table, optimizer), table.quantization_config)
        groups.setdefault(key, []).append(table)
    stacks = []
    blocks = num_shards * cores
    for (dim, own, quantization), members in groups.items():
        width = _round_up(dim, 8)
        for placements, rows in _place(members, blocks, cores, width):
            stack = Stack(
                f"sparsecore{dim}_{len(stacks)}",
                "row",
                num_shards,
                rows * cores,
                width,
                np.dtype(np.float32),
                own,
                quantization,
                tuple(placements),
                cores,
            )
            stacks.append(stack)
    return tuple(stacks)


def _place(tables: list[TableConfig], blocks: int, cores: int, width: int):
    """Splits tables into stacks whose positions fit int32, with the rows that one SparseCore has of each."""
    unit, limit = _unit(width), _most_rows(blocks, width)
    done, placements, first = [], [], 0
    for table in tables:
        rows = _rows(table, blocks)
        if placements and first + rows > limit:
            done.append((placements, _round_up(first, unit)))
            placements, first = [], 0
        shift = len(placements) * cores % blocks
        placements.append(TablePlacement(table, "mod", first, rows, shift))
        first += rows
    return [*done, (placements, _round_up(first, unit))]


def _rows(table: TableConfig, blocks: int) -> int:
    return _round_up(-(-table.vocabulary_size // blocks), 8)


def _unit(width: int) -> int:
    """A SparseCore's rows fill whole tiles of 8 lines: they are a multiple of this."""
    return 8 * LINE // math.gcd(8 * LINE, width)


def _most_rows(blocks: int, width: int) -> int:
    """That one SparseCore can have of a stack, so that positions fit int32."""
    return MAX_POSITIONS // blocks // _unit(width) * _unit(width)


def _why_not(table: TableConfig, optimizer: Optimizer, sharding: str, blocks: int) -> str:
    if not _is_power_of_two(blocks):
        # jax-tpu-embedding would end the process.
        return f"there are {blocks} SparseCores, which must be a power of two"
    if sharding != "mod":
        return f"its plan is {sharding!r}, SparseCores shard by 'mod'"
    if table.dtype != np.float32:
        return f"its dtype is {table.dtype}, SparseCores hold float32"
    if not optimizer.is_elementwise:
        return (
            f"its optimizer {type(optimizer).__name__} may mix the components of a row (set `is_elementwise = True` on "
            "the class if it updates each component by itself)"
        )
    if not optimizer.is_lazy:
        return f"its optimizer {type(optimizer).__name__} updates rows that are not looked up"
    if not optimizer.use_gradient_accumulation:
        return "its optimizer has use_gradient_accumulation=False, SparseCores sum the gradients of an id"
    if _rows(table, blocks) > _most_rows(blocks, _round_up(table.dim, 8)):
        return f"its vocabulary_size {table.vocabulary_size} leaves no room for padding below 2**31"
    return ""


def _is_power_of_two(value: int) -> bool:
    return value & (value - 1) == 0


def _round_up(value: int, multiple: int) -> int:
    return int(-(-value // multiple) * multiple)
