"""Who takes part in the lookup benchmark: ours on both paths, numpy, and the installed peers."""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from cells import Batch, Cell, Table, numpy_type

from jaxembed import backend
from jaxembed.bag import Bag, BagOperands, embedding_bags
from jaxembed.splits import SplitsRow

OURS, PLAIN, NUMPY = "jaxembed", "jaxembed, plain JAX", "numpy"


class Peer(Protocol):
    """One contender. It runs the lookups of an input set one after another, as one program if it can.

    Attributes:
      sums_in_bfloat16: it rounds a bfloat16 sum at every step, not once at the end.
      slow: so much that what a call costs from Python does not count; its calls are of fewer lookups.
    """

    name: str
    sums_in_bfloat16: bool
    slow: bool

    def refuses(self, cell: Cell) -> str | None:
        """Why it cannot run this cell, or None."""
        ...

    def load(self, table: Table) -> None:
        """Takes the table for the cells that follow."""
        ...

    def unload(self) -> None:
        """Lets go of the table."""
        ...

    def program(self, cell: Cell, sets: list[list[Batch]], every: bool) -> Callable[[int], Any]:
        """A call that looks up every batch of input set i and returns when all is computed.

        It returns `every` output, or the last one only: what a model takes in, Python never sees.
        """
        ...

    def outputs(self, result: Any) -> list[np.ndarray]:
        """The [B, D] arrays of what a program returned."""
        ...


_NUMPY_BLOCK = 4096
_MODULES = {"torch": ["torch"], "FBGEMM": ["torch", "fbgemm_gpu"], "TensorFlow": ["tensorflow"]}


def installed_peers(only: list[str] | None = None) -> tuple[list[Peer], dict[str, str]]:
    """The contenders, ours first, and why others are left out, by name.

    Args:
      only: of "torch", "FBGEMM" and "TensorFlow", those that are wanted; default: all.
    """
    peers: list[Peer] = [Jax(OURS, None), Jax(PLAIN, "xla"), Numpy()]
    left_out = {}
    for name, modules in _MODULES.items():
        if only is not None and name not in only:
            continue
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            left_out[name] = f"{' and '.join(missing)} not installed"
        else:
            peers += _make(name)
    return peers, left_out


def _make(name: str) -> list[Peer]:
    if name == "TensorFlow":
        from peers_tensorflow import tensorflow_peers

        return [*tensorflow_peers()]
    import peers_torch

    return [peers_torch.Torch() if name == "torch" else peers_torch.Fbgemm()]


def our_table(table: Table) -> Any:
    """The table as our lookup takes it, on the device: a numpy array would be copied there in every call."""
    if table.dtype == "int8":
        from jaxembed.quantized_table import QuantizedTable

        on_host: Any = QuantizedTable("int8", table.rows.shape[1], table.fused)
    else:
        on_host = table.rows
    return jax.device_put(on_host, jax.devices("cpu")[0])


class Jax:
    """Our lookup under jax.jit: by default on the path that it chooses itself, else on `path`."""

    sums_in_bfloat16 = False

    def __init__(self, name: str, path: str | None):
        self.name, self._path, self.slow = name, path, path == "xla"

    def refuses(self, cell: Cell) -> str | None:
        return None

    def load(self, table: Table) -> None:
        self._table = our_table(table)

    def unload(self) -> None:
        self._table = None

    def program(self, cell: Cell, sets: list[list[Batch]], every: bool) -> Callable[[int], Any]:
        # Plain JAX takes long to compile, and so little less for the last output only that one program will do.
        lookups, table = self._lookups(cell.batch, every or self._path == "xla"), self._table
        arguments = jax.device_put([_flat(batches) for batches in sets])
        return lambda i: jax.block_until_ready(lookups(table, *arguments[i]))

    @functools.cache  # noqa: B019 - so that cells of the same shapes share a compiled program
    def _lookups(self, num_bags: int, every: bool) -> Callable[..., Any]:
        bag = Bag("ragged", num_bags, "sum")
        path = self._path or backend()

        @jax.jit
        def lookups(table, ids, splits, weights):
            outputs = []
            count = ids.size // splits.shape[0]
            for k in range(splits.shape[0]):
                # All but the kernel, which reads its part in place, look at all ids that they are given.
                part = slice(0, ids.size) if path == "native" else slice(k * count, (k + 1) * count)
                own = SplitsRow(splits, k) if path == "native" else splits[k] - k * count
                operands = BagOperands(table, ids[part], own, weights=weights[0][part] if weights else None)
                (out,), _ = embedding_bags([bag], [operands], path)
                outputs.append(out)
                # Adds 0, but XLA cannot know: one lookup starts when the one before has ended. To one number,
                # in place: an addition to all splits costs as much as a small lookup.
                if k + 1 < splits.shape[0]:
                    splits = splits.at[k + 1, 0].add((out[0, 0] > 1e30).astype(jnp.int32))
            return outputs if every else outputs[-1:]

        return lookups

    def outputs(self, result: Any) -> list[np.ndarray]:
        return [np.asarray(out) for out in result]


def _flat(batches: list[Batch]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Ids [K N], splits of these [K, B + 1] and weights ([K N], or none): jax.jit takes time for every argument."""
    weights = [batch.weights for batch in batches if batch.weights is not None]
    return (
        np.concatenate([batch.ids for batch in batches]),
        np.stack([batch.splits + k * batch.ids.size for k, batch in enumerate(batches)]),
        [np.concatenate(weights)] if weights else [],
    )


class Numpy:
    """take and add.reduceat: the reference that all others must agree with."""

    name = NUMPY
    sums_in_bfloat16 = False
    slow = True

    def refuses(self, cell: Cell) -> str | None:
        return None

    def load(self, table: Table) -> None:
        self._table: Any = table

    def unload(self) -> None:
        self._table = None

    def program(self, cell: Cell, sets: list[list[Batch]], every: bool) -> Callable[[int], Any]:
        table = self._table
        return lambda i: [numpy_lookup(table, batch) for batch in sets[i]]

    def outputs(self, result: Any) -> list[np.ndarray]:
        return result


def numpy_lookup(table: Table, batch: Batch) -> np.ndarray:
    """sum_i w_i table[ids_i] of each bag, [B, D], in the table's type or float32 for int8."""
    out = np.zeros((batch.splits.size - 1, table.rows.shape[1]), np.float32)
    full = np.flatnonzero(np.diff(batch.splits))
    # Blocks of bags that stay in cache. reduceat takes an empty bag for the id that follows it, so it
    # gets the others only.
    blocks = np.searchsorted(batch.splits[full], np.arange(0, batch.ids.size, _NUMPY_BLOCK))
    for first, last in itertools.pairwise([*dict.fromkeys(blocks.tolist()), full.size]):
        bags = full[first:last]
        if bags.size:
            out[bags] = _numpy_block(table, batch, bags)
    return out if table.dtype == "int8" else out.astype(numpy_type(table.dtype), copy=False)


def _numpy_block(table: Table, batch: Batch, bags: np.ndarray) -> np.ndarray:
    start, stop = batch.splits[bags[0]], batch.splits[bags[-1] + 1]
    ids = batch.ids[start:stop]
    rows = table.rows[ids].astype(np.float32, copy=False)
    if table.scale is not None and table.bias is not None:
        rows *= table.scale[ids, None]
        rows += table.bias[ids, None]
    if batch.weights is not None:
        rows *= batch.weights[start:stop, None]
    return np.add.reduceat(rows, batch.splits[bags] - start, axis=0)


def disagreement(
    cell: Cell, expected: list[np.ndarray], got: list[np.ndarray], rounded_sums: bool = False
) -> str | None:
    """How the outputs of a contender differ from the reference, or None.

    float32 and int8 tables sum exactly here (see cells.py). bfloat16 outputs that are rounded to the other
    side differ by a unit in the last place, up to 2^-7; with `rounded_sums`, once for about every id.
    """
    if len(expected) != len(got):
        return f"{len(got)} outputs for {len(expected)} lookups"
    tolerance = 2.0**-7 if cell.dtype == "bfloat16" else 1e-6
    if rounded_sums:
        tolerance *= max(1, cell.valency)
    for k, (want, have) in enumerate(zip(expected, got, strict=True)):
        if want.shape != have.shape:
            return f"lookup {k} has shape {have.shape}, expected {want.shape}"
        a, b = want.astype(np.float32), np.asarray(have).astype(np.float32)
        excess = np.nan_to_num(np.abs(a - b) - tolerance * np.maximum(np.abs(a), 1), nan=np.inf)
        if (excess > 0).any():
            row, column = np.unravel_index(np.argmax(excess), a.shape)
            return (
                f"lookup {k}, bag {row}, column {column}: {b[row, column]:g}, expected {a[row, column]:g} "
                f"({np.mean(excess > 0):.1%} of the values are off)"
            )
    return None
