"""ResidentTable: a table in host memory that the native kernel finds by its address.

XLA takes about half a microsecond for every array that a program is called with: for requests of a few rows to many
tables, more than their lookups take. All the addresses are one array.
"""

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxembed.memory import ALIGNMENT
from jaxembed.quantized_table import QuantizedTable


@dataclasses.dataclass(frozen=True)
class TableForm:
    """What a program knows of a table before it has one.

    Attributes:
      shape: V, D.
      dtype: of what is looked up.
      kind: of a QuantizedTable, or the name of the array's type.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    kind: str

    @classmethod
    def of(cls, table: Any) -> "TableForm":
        """The form of an array or a QuantizedTable."""
        vocabulary, dim = table.shape
        kind = table.kind if isinstance(table, QuantizedTable) else table.dtype.name
        return cls((vocabulary, dim), np.dtype(table.dtype), kind)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class ResidentTable:
    """A table for lookups by the native kernel alone, which finds it by its address.

    Args:
      addresses: [T, 4] int32 of T tables, as `addresses` makes it.
      row: which of them.
      form: of the table.
    """

    addresses: Any
    row: int
    form: TableForm

    @property
    def shape(self) -> tuple[int, int]:
        """V, D."""
        return self.form.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what is looked up."""
        return self.form.dtype

    def tree_flatten(self) -> tuple[tuple[Any], tuple[int, TableForm]]:
        """The array, and what is static."""
        return (self.addresses,), (self.row, self.form)

    @classmethod
    def tree_unflatten(cls, static: tuple[int, TableForm], children: tuple[Any]) -> "ResidentTable":
        """The inverse."""
        return cls(children[0], *static)


def addresses(tables: Sequence[Any]) -> np.ndarray:
    """Where host tables lie, as they must from now on; the result keeps them.

    Args:
      tables: T C-contiguous numpy arrays, or QuantizedTables of such.

    Returns:
      [T, 4] int32, aligned as CPU devices like it: the addresses of rows and codebook (0: none), two words each.
    """
    # numpy arrays keep what their memory belongs to, and XLA keeps the array of a program that still runs, even if
    # whoever called it was interrupted and is gone.
    owner = _owner(16 * len(tables) + ALIGNMENT, tables)
    memory = np.frombuffer(owner, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    found = memory[start : start + 16 * len(tables)].view(np.uint64).reshape(-1, 2)
    for i, table in enumerate(tables):
        arrays = (table.codes, table.codebook) if isinstance(table, QuantizedTable) else (table,)
        for j, array in enumerate(arrays):
            if array is not None:
                assert isinstance(array, np.ndarray), type(array)
                assert array.flags.c_contiguous
                found[i, j] = array.ctypes.data
    return found.view(np.int32)


def _owner(size: int, kept: Any) -> Any:
    """Memory of zeros that keeps something; a numpy array of a subclass would not, as numpy looks past it."""

    class Owner(ctypes.c_char * size):
        kept: Any = None

    owner = Owner()
    owner.kept = kept
    return owner
