"""Measured limits of a lookup: how fast memory gives up the rows of a cell, without and with results to write."""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cells import Batch, Cell, Table
from results import LIMIT, LIMIT_WRITING

_SOURCE = Path(__file__).with_name("memory_limit.cc")
_DISTANCES = (4, 8, 16, 24, 32, 48, 64)


class MemoryLimit:
    """Reads the rows of each lookup and adds them up, as a contender that takes its turns with the others."""

    def __init__(self, library: Any, writes: bool = False):
        self.name, self._writes = LIMIT_WRITING if writes else LIMIT, writes
        self._read_rows, self._read_stream = library.ReadRows, library.ReadStream
        for function in (self._read_rows, self._read_stream):
            function.restype = ctypes.c_uint64
        self._threads = os.cpu_count() or 1

    def load(self, table: Table) -> None:
        """Takes the table for the cells that follow."""
        self._rows = table.rows if table.fused is None else table.fused

    def unload(self) -> None:
        """Lets go of the table."""
        self._rows = None

    def program(self, cell: Cell, sets: list[list[Batch]]) -> Callable[[int], tuple[int, np.ndarray]]:
        """A call that reads all rows of input set i, at the distance of fetching ahead that is fastest here.

        It returns the sum of their words, and the results.
        """
        rows = self._rows
        width = ctypes.c_int64(rows.nbytes // rows.shape[0])
        ids = [np.concatenate([batch.ids for batch in batches]) for batches in sets]
        # The lookups of a call write over each other's results.
        half = cell.dtype == "bfloat16"
        results = np.zeros((self._threads, cell.batch, cell.dim), np.uint16 if half else np.float32)
        sizes = results.strides[1], cell.batch * len(sets[0]), cell.batch
        result = (ctypes.c_void_p(results.ctypes.data if self._writes else None), *map(ctypes.c_int64, sizes))

        def read(i: int, ahead: int) -> int:
            of = ctypes.c_void_p(ids[i].ctypes.data), ctypes.c_int64(ids[i].size)
            return self._read_rows(
                ctypes.c_void_p(rows.ctypes.data), width, *of, ctypes.c_int64(ahead), *result, self._threads
            )

        best = min(_DISTANCES, key=lambda ahead: min(_seconds(read, i % len(ids), ahead) for i in range(5)))
        return lambda i: (read(i, best), results)

    def stream(self, megabytes: int = 256) -> float:
        """GB/s of a streaming read."""
        memory = np.ones(megabytes << 17)
        address, size = ctypes.c_void_p(memory.ctypes.data), ctypes.c_int64(memory.nbytes)
        passes = [_seconds(self._read_stream, address, size, self._threads) for _ in range(10)]
        return memory.nbytes / float(np.median(passes)) / 1e9


def memory_limits() -> list[MemoryLimit]:
    """Compiles memory_limit.cc, and gives the limits without and with results; none without a C++ compiler with OpenMP."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "memory_limit.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
        command = [*compiler.split(), *flags, str(_SOURCE), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode:
            return []
        loaded = ctypes.CDLL(str(library))
        return [MemoryLimit(loaded), MemoryLimit(loaded, writes=True)]


def _seconds(function: Callable[..., int], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
