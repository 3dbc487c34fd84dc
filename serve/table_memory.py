"""in_memory: a bundle whose tables are copied into memory, on huge pages, instead of mapped from their files."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxembed.checkpoint import Bundle
from jaxembed.memory import aligned_empty
from jaxembed.quantized_table import QuantizedTable

TABLES = ("mapped", "memory")
_CHUNK_BYTES = 1 << 20

Arrays = Mapping[str, np.ndarray]


def copy_arrays(digest: str, arrays: Arrays) -> Arrays:
    """The arrays of one table in memory of this process alone.

    Args:
      digest: of the table.
      arrays: by name of the part.
    """
    copies = {}
    for part, array in arrays.items():
        copies[part] = aligned_empty(array.shape, array.dtype)
        rows = max(_CHUNK_BYTES * len(array) // max(array.nbytes, 1), 1)
        # In pieces, so that a thread which is paced can stop between them.
        for start in range(0, len(array), rows):
            np.copyto(copies[part][start : start + rows], array[start : start + rows])
    return copies


def in_memory(bundle: Bundle, copy: Callable[[str, Arrays], Arrays] = copy_arrays) -> Bundle:
    """The bundle with copies of its tables; `verify` then looks at these.

    Args:
      bundle: that is mapped.
      copy: as `copy_arrays`.
    """
    tables: dict[str, Any] = {}
    parts = {}
    for name, stored in bundle.parts.items():
        copies = copy(bundle.table_digests[name], {part: array.source for part, array in stored.items()})
        parts[name] = {part: dataclasses.replace(array, source=copies[part]) for part, array in stored.items()}
        table = bundle.tables[name]
        quantized = isinstance(table, QuantizedTable)
        tables[name] = dataclasses.replace(table, **copies) if quantized else next(iter(copies.values()))
    return dataclasses.replace(bundle, tables=tables, parts=parts)
