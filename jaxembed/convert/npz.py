"""One .npz file: arrays `tables/NAME`, `slots/NAME/SLOT`, and `feature_config.json` beside them in the archive."""

import functools
import mmap
import os
import pathlib
import struct
import threading
import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import open_regular, refuse_pointer
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.arrays import native, refuse_types
from jaxembed.convert.interface import Contents, Options, Source, stored
from jaxembed.convert.keys import own_key, place_arrays
from jaxembed.convert.mapped import temporary_mapped
from jaxembed.convert.npy import TYPES, guess_place, header
from jaxembed.convert.sidecar import MAX_SIDECAR, SIDECAR, read_sidecar, sidecar_of

#: Of the name of a member.
MAX_NAME = 65_535
COPY_BYTES = 16 << 20

#: What zipfile and numpy raise besides, of a damaged file.
OTHERS = (
    OSError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    MemoryError,
    KeyError,
    struct.error,
)


class _Mapped(mmap.mmap):
    """A file that needs no closing, as zipfile reads it."""

    def seekable(self) -> bool:
        return True


def matches(path: pathlib.Path) -> bool:
    """Whether it is a .npz file."""
    return path.suffix == ".npz" and path.is_file()


def read(path: pathlib.Path, options: Options) -> Source:
    """Opens the archive; rows are read, and unpacked if need be, as they are asked for."""
    descriptor, size = open_regular(path)
    try:
        refuse_pointer(path, os.pread(descriptor, 64, 0))
        stream: Any = _Mapped(descriptor, size, access=mmap.ACCESS_READ)
        archive = zipfile.ZipFile(stream)
        members = {i.filename: i for i in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("it has two members of one name")
        arrays = {
            name.removesuffix(".npy"): _open(path, archive, info)
            for name, info in members.items()
            if name.endswith(".npy")
        }
        if SIDECAR in members and members[SIDECAR].file_size > MAX_SIDECAR:
            raise ValueError(f"{SIDECAR} is too large")
        sidecar = archive.read(SIDECAR) if SIDECAR in members else None
    except (zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError, ValueError, *OTHERS) as e:
        raise CheckpointError(f"{path} is no .npz file, or is damaged: {str(e)[:300]}.") from e
    finally:
        os.close(descriptor)
    known = {} if sidecar is None else read_sidecar(f"{path}: {SIDECAR}", sidecar)
    tables, slots, notes = place_arrays(path, arrays, options, guess_place)
    return Source(tables, slots, notes=notes, **known)


def check(out: pathlib.Path, contents: Contents) -> None:
    """Of types, those that numpy has itself; of names, those that a zip archive takes."""
    del out
    refuse_types(contents, ".npz", TYPES)
    sidecar_of(contents)
    for stream in contents.streams:
        length = len(own_key((stream.table, stream.slot))) + len(".npy")
        if length > MAX_NAME:
            raise ValueError(
                f"table {stream.table[:40]!r}... has too long a name for a zip archive: {length} characters of at most "
                f"{MAX_NAME}; convert it to safetensors."
            )


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes them uncompressed, so that others can map them."""
    with zipfile.ZipFile(out, "x", zipfile.ZIP_STORED) as archive:
        for stream in contents.streams:
            name = f"{own_key((stream.table, stream.slot))}.npy"
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(header(stream.dtype, stream.shape))
                for _, rows in stream.blocks():
                    member.write(rows.reshape(-1).view(np.uint8).data)
        archive.writestr(SIDECAR, sidecar_of(contents))
    return []


def _open(path: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredArray:
    what = f"{path}: {info.filename}"
    member = archive.open(info)
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{info.filename} has .npy version {version}")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(member)
    first, row = member.tell(), int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    if (
        dtype.hasobject
        or min((*shape, 1)) < 0
        or info.file_size - first != int(np.prod(shape, dtype=object)) * dtype.itemsize
    ):
        raise ValueError(f"{info.filename} is not of the size that its header says, or holds objects")
    lock = threading.Lock()

    def read(start: int, num_bytes: int) -> bytes:
        try:
            member.seek(first + start)
            data = member.read(num_bytes)
            if len(data) < num_bytes:
                raise EOFError(f"it ends after {start + len(data):,} bytes")
            return data
        except (zipfile.BadZipFile, zlib.error, *OTHERS) as e:
            raise CheckpointError(f"{what} is damaged: {e}.") from e

    @functools.cache
    def copied() -> np.ndarray:
        """By columns each row is all over the member: it is copied once, to a file where all of it is at hand."""
        mapped = temporary_mapped(np.uint8, (info.file_size - first,))
        for start in range(0, mapped.size, COPY_BYTES):
            part = read(start, min(COPY_BYTES, mapped.size - start))
            mapped[start : start + len(part)] = np.frombuffer(part, np.uint8)
        return mapped.view(dtype).reshape(shape, order="F")

    def read_rows(start: int, stop: int) -> np.ndarray:
        with lock:
            if fortran:
                rows = np.array(copied()[start:stop], native(dtype), order="C")
                if stop == shape[0]:  # they are asked for in order
                    copied.cache_clear()
                return rows
            values: Any = np.frombuffer(read(start * row, (stop - start) * row), dtype)
        return np.ascontiguousarray(values.reshape(stop - start, *shape[1:]), native(dtype))

    return stored(what, shape, native(dtype), read_rows)
