"""Folders of torch.distributed.checkpoint, read without torch: tensors in chunks, mapped where they lie.

`.metadata` is a pickle of which tensors there are, their chunks, and where each chunk is: a part of a `.distcp` file
that is what torch.save writes, a zip with a pickle that says type and strides, and the bytes. Both pickles may name
only what torch.distributed.checkpoint writes; nothing of them is run.

References:
  `torch.distributed.checkpoint.FileSystemReader`; torch/distributed/checkpoint/metadata.py.
"""

import io
import itertools
import math
import mmap
import os
import pathlib
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import open_regular, read_regular
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.interface import stored
from jaxembed.convert.pieces import Pieces
from jaxembed.convert.torch_pickle import DTYPES, flaw, load

METADATA, SUFFIX = ".metadata", ".distcp"
MAX_METADATA, MAX_PICKLE = 256 << 20, 1 << 20
CRC_BYTES = 16 << 20
LOCAL_HEADER = 30


class Chunk(NamedTuple):
    """Some rows and columns of a tensor: first ones, how many, and the part of the file that has them."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def is_folder(path: pathlib.Path) -> bool:
    """Whether it is such a folder, finished or not."""
    return path.is_dir() and ((path / METADATA).is_file() or next(path.glob(f"*{SUFFIX}"), None) is not None)


def read_folder(folder: pathlib.Path) -> tuple[dict[str, StoredArray], list[str]]:
    """The tensors of floats in it, by their names; and the names of those of other types.

    Raises:
      ValueError: if it is unfinished or damaged, or names what such a folder has no use for.
    """
    if not (folder / METADATA).exists():
        raise ValueError(f"{folder} has no {METADATA}: the save was not finished; take another checkpoint.")
    content = read_regular(folder / METADATA, MAX_METADATA)
    what = f"{folder / METADATA}"
    metadata = load(what, content)
    try:
        tensors = {
            str(name): (tuple(entry["size"]), str(entry["properties"][0]), entry["chunks"])
            for name, entry in metadata["state_dict_metadata"].items()
            if "chunks" in entry.fields
        }
        places = {
            (str(index["fqn"]), tuple(index["offset"] or ())): _place(folder, info)
            for index, info in metadata["storage_data"].items()
            if str(index["fqn"]) in tensors
        }
        arrays, others = {}, []
        for name, (shape, dtype, parts) in tensors.items():
            if dtype not in DTYPES:
                others.append(f"{name} ({dtype})")
            else:
                chunks = [
                    Chunk(tuple(part["offsets"]), tuple(part["sizes"]), *places[name, tuple(part["offsets"])])
                    for part in parts
                ]
                arrays[name] = _array(folder, name, shape, DTYPES[dtype], chunks)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise CheckpointError(
            f"{what} is no metadata of torch.distributed.checkpoint, or is damaged: {e!s:.200}."
        ) from e
    return arrays, others


def _place(folder: pathlib.Path, info: Any) -> tuple[str, int, int]:
    file, start, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
        raise ValueError(f"{folder / METADATA} names a file that is not in its folder: {file!s:.80}.")
    if info.fields.get("transform_descriptors"):
        raise ValueError(f"{folder / file} is compressed, or changed otherwise; save it without extensions.")
    if not all(isinstance(n, int) and n >= 0 for n in (start, length)):
        raise CheckpointError(f"{folder / METADATA} is damaged: a part of {file} is outside of it.")
    return file, start, length


def _array(
    folder: pathlib.Path, name: str, shape: tuple[int, ...], dtype: np.dtype, chunks: list[Chunk]
) -> StoredArray:
    what = f"{folder}: {name}"
    if not all(
        isinstance(n, int) and 0 <= n < 2**63 for n in itertools.chain(shape, *(c[0] + c[1] for c in chunks))
    ):
        raise CheckpointError(f"{what} is damaged: it has sizes that are none.")
    files: dict[str, mmap.mmap] = {}

    def open_chunk(i: int) -> np.ndarray:
        file = chunks[i].file
        if file not in files:
            files[file] = _map(folder / file)
        return _view(what, files[file], chunks[i], dtype)

    def read_scalar(start: int, stop: int) -> np.ndarray:
        raise ValueError(f"{what} is no array.")

    pieces = Pieces(what, shape, dtype, [(c.offsets, c.sizes) for c in chunks], open_chunk)
    return stored(what, shape, dtype, pieces.read_rows if shape else read_scalar)


def _map(file: pathlib.Path) -> mmap.mmap:
    descriptor, size = open_regular(file)
    try:
        if not size:
            raise ValueError(f"{file} is empty.")
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def _view(what: str, data: mmap.mmap, chunk: Chunk, dtype: np.dtype) -> np.ndarray:
    """The values of a chunk where they lie, compared with their checksum."""
    if chunk.start + chunk.length > len(data):
        raise CheckpointError(f"{what} is damaged: {chunk.file} is too short.")
    try:
        with zipfile.ZipFile(io.BufferedReader(_Part(data, chunk.start, chunk.length))) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickled = min((n for n in entries if n.split("/")[-1] == "data.pkl"), key=len)
            prefix = pickled.removesuffix("data.pkl")
            order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in entries else b"little"
            if entries[pickled].file_size > MAX_PICKLE or order != b"little":
                raise ValueError("its bytes are in another order, or its pickle is too large")
            tensor = load(what, archive.read(pickled), persistent=True)
        storage, offset, sizes, strides = tensor["args"][:4]
        kind, record = str(storage[1]), entries[f"{prefix}data/{storage[2]}"]
        at = chunk.start + record.header_offset
        header = data[at : at + LOCAL_HEADER]
        at += LOCAL_HEADER + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        size = record.file_size
        if record.compress_type or at + size > chunk.start + chunk.length:
            raise ValueError("its bytes are packed, or outside of it")
        if DTYPES.get(kind) != dtype or tuple(sizes) != chunk.sizes or len(strides) != len(sizes):
            raise ValueError(f"it is not {dtype.name}{list(chunk.sizes)}")
        ends = [offset, *(s * (n - 1) for s, n in zip(strides, sizes, strict=True) if math.prod(sizes))]
        if min(0, offset, *strides) < 0 or (math.prod(sizes) and (sum(ends) + 1) * dtype.itemsize > size):
            raise ValueError("its values are outside of it")
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as e:
        raise CheckpointError(f"{what} is damaged: {chunk.file}: {flaw(e)}.") from e
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
        raise CheckpointError(f"{what} cannot be read, or is damaged: {chunk.file}: {e!s:.200}.") from e
    crc = 0
    for first in range(at, at + size, CRC_BYTES):
        crc = zlib.crc32(data[first : min(first + CRC_BYTES, at + size)], crc)
    if crc != record.CRC:
        raise CheckpointError(f"{what} is damaged: it does not have the checksum it was saved with.")
    steps = tuple(s * dtype.itemsize for s in strides)
    return np.ndarray(chunk.sizes, dtype, data, at + offset * dtype.itemsize, steps)


class _Part(io.RawIOBase):
    """A part of a mapped file, as a file."""

    def __init__(self, data: mmap.mmap, start: int, length: int):
        self._data, self._start, self._length, self._at = data, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._length - self._at), 0)
        first = self._start + self._at
        buffer[:count] = self._data[first : first + count]
        self._at += count
        return count
