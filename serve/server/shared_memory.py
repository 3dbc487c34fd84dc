"""SharedMemory: bytes on huge pages that processes of one machine share, and that are gone with the last of them."""

import ctypes
import fcntl
import functools
import mmap
import os
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

HUGE_PAGE = 2 << 20
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25


def is_available() -> bool:
    """Whether this system has such memory: Linux does."""
    return hasattr(os, "memfd_create")


class SharedMemory:
    """Read-only bytes, mapped; arrays that are made of it keep it.

    The memory is a file without a name (`memfd_create`), which others open by process and descriptor: there is nothing
    to remove, whatever its processes die of.

    Args:
      descriptor: of the file, which this object closes.
    """

    def __init__(self, descriptor: int):
        stat = os.fstat(descriptor)
        self.descriptor: int = descriptor
        self.inode: int = stat.st_ino
        self.size: int = stat.st_size
        try:
            reserved, self._address = _map(descriptor, stat.st_size)
        except BaseException:
            os.close(descriptor)
            raise
        # When the process ends the system does this, in whatever order its objects go.
        weakref.finalize(self, _release, reserved, descriptor).atexit = False
        #: Bytes that are on huge pages.
        self.huge: int = sum(
            _collapse(self._address + at) for at in range(0, self.size - HUGE_PAGE + 1, HUGE_PAGE)
        )

    @classmethod
    def create(cls, pieces: Mapping[int, np.ndarray], size: int) -> "SharedMemory":
        """Memory with the bytes of some arrays, by where they begin."""
        descriptor = os.memfd_create("jaxembed-table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            for offset, array in pieces.items():
                content = array.reshape(-1).view(np.uint8).data
                done = 0
                while done < len(content):
                    done += os.pwrite(descriptor, content[done : done + HUGE_PAGE], offset + done)
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            # Before Linux 6.7 a sealed file that was opened for writing cannot be mapped at all.
            found = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(descriptor)
        return cls(found)

    @classmethod
    def open(cls, pid: int, descriptor: int, inode: int, size: int) -> "SharedMemory | None":
        """What a process holds; None if it is gone, or holds something else by now."""
        try:
            found = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        stat = os.fstat(found)
        if (stat.st_ino, stat.st_size) == (inode, size) and os.readlink(f"/proc/self/fd/{found}").startswith(
            "/memfd:jaxembed-table"
        ):
            return cls(found)
        os.close(found)
        return None

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": "|u1", "shape": (self.size,), "data": (self._address, True)}


def _map(descriptor: int, size: int) -> tuple[tuple[int, int], int]:
    """The range of addresses that is used, and where in it the file begins: huge pages begin at multiples of theirs."""
    libc, length = _libc(), size + HUGE_PAGE
    base = libc.mmap(None, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if base == ctypes.c_void_p(-1).value:
        raise MemoryError(f"there are no {length} bytes of addresses for a table.")
    address = -(-base // HUGE_PAGE) * HUGE_PAGE
    if libc.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) != address:
        code = ctypes.get_errno()
        libc.munmap(base, length)
        raise OSError(code, f"a table of {size} bytes cannot be mapped: {os.strerror(code)}")
    return (base, length), address


def _release(reserved: tuple[int, int], descriptor: int) -> None:
    _libc().munmap(*reserved)
    os.close(descriptor)


def _collapse(address: int) -> int:
    """Puts 2 MiB on a huge page: the bytes that are on one, none where the system has no such pages for them."""
    return 0 if _libc().madvise(address, HUGE_PAGE, _MADV_COLLAPSE) else HUGE_PAGE


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, number]
    return libc
