"""Where the tensors of a TensorFlow checkpoint lie in its files, so that they are mapped instead of read.

TensorFlow itself reads a tensor, or each piece of one that was saved in pieces, as a whole, however few of its rows are
asked for. `PREFIX.index` is a table of sorted strings: blocks of (shared length, own length, length of value, own key,
value), a block of where the blocks are, and a footer; the values are BundleEntryProtos.

References:
  tensorflow/core/protobuf/tensor_bundle.proto; tensorflow/core/lib/io/format.cc, block.cc;
  `EncodeTensorNameSlice` of tensorflow/core/util/saved_tensor_slice_util.cc, for the keys of pieces.
"""

import functools
import math
import mmap
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import open_regular, read_regular
from jaxembed.convert.formats import needed
from jaxembed.convert.pieces import Pieces

FOOTER_BYTES, TRAILER_BYTES = 48, 5
MAGIC = 0xDB4775248B80FB57
MAX_INDEX = 1 << 30
CHUNK_BYTES = 16 << 20


class TensorBundle:
    """The tensors of a checkpoint, mapped.

    Args:
      prefix: of the checkpoint.

    Raises:
      ValueError: if its index is not what TensorFlow writes.
    """

    def __init__(self, prefix: pathlib.Path):
        self._prefix, self._verified = prefix, set[bytes]()
        self._files: dict[int, mmap.mmap] = {}
        needed("tensorflow", "tensorflow")
        from tensorflow.core.protobuf import tensor_bundle_pb2  # type: ignore[import-not-found]

        index = pathlib.Path(f"{prefix}.index")
        try:
            # As much memory is taken as the limit says.
            content = read_regular(index, min(index.stat().st_size, MAX_INDEX))
        except OSError as e:
            raise ValueError(f"{index} cannot be read: {e.strerror}.") from e
        try:
            entries = dict(_entries(content))
            header = tensor_bundle_pb2.BundleHeaderProto.FromString(entries.pop(b""))
            self._entries = {
                key: tensor_bundle_pb2.BundleEntryProto.FromString(value) for key, value in entries.items()
            }
        except Exception as e:  # protobuf's DecodeError is of no common type
            raise CheckpointError(
                f"{index} is no index of a TensorFlow checkpoint, or is damaged: {str(e)[:200]}."
            ) from e
        self._num_shards, self._is_little = header.num_shards, header.endianness == 0

    def rows(
        self, key: str, shape: tuple[int, ...], dtype: np.dtype
    ) -> Callable[[int, int], np.ndarray] | None:
        """What reads the rows [start, stop) of a tensor, each piece mapped and checked with the first of its rows; None if it
        is in another byte order.

        Raises:
          ValueError: when called, if pieces of it are missing, or it is not what was saved.
        """
        if not self._is_little:
            return None
        name, what = key.encode(), f"{self._prefix}: {key}"
        entry = self._entries.get(name)
        if entry is None or not entry.slices:
            return lambda start, stop: self._map(what, name, shape, dtype)[start:stop]

        @functools.cache
        def pieces() -> Pieces:
            """Of a tensor that is asked for: others may be incomplete."""
            try:
                extents = [
                    (tuple(e.start for e in piece.extent), _lengths(piece, shape)) for piece in entry.slices
                ]
            except ValueError as e:
                raise CheckpointError(f"{what} is damaged: its pieces are not all of it.") from e
            keys = [_piece_key(name, piece) for piece in entry.slices]
            return Pieces(what, shape, dtype, extents, lambda i: self._map(what, keys[i], extents[i][1], dtype))

        return lambda start, stop: pieces().read_rows(start, stop)

    def _map(self, what: str, key: bytes, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        entry = self._entries.get(key)
        if entry is None or not 0 <= entry.shard_id < self._num_shards:
            raise CheckpointError(f"{what} cannot be read, or is damaged: its index does not say where it is.")
        data = self._file(entry.shard_id)
        if entry.size != math.prod(shape) * dtype.itemsize or not 0 <= entry.offset <= len(data) - entry.size:
            raise CheckpointError(
                f"{what} cannot be read, or is damaged: its file is not of the size that it should be."
            )
        if key not in self._verified:
            self._check(what, data, entry)
            self._verified.add(key)
        return np.frombuffer(data, dtype, math.prod(shape), entry.offset).reshape(shape)

    def _file(self, shard: int) -> mmap.mmap:
        if shard not in self._files:
            file = pathlib.Path(f"{self._prefix}.data-{shard:05d}-of-{self._num_shards:05d}")
            descriptor, size = open_regular(file)
            try:
                if not size:
                    raise ValueError(f"{file} is empty.")
                self._files[shard] = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
            finally:
                os.close(descriptor)
        return self._files[shard]

    def _check(self, what: str, data: mmap.mmap, entry: Any) -> None:
        crc32c: Any = needed("google_crc32c", "tensorflow")
        crc, end = 0, entry.offset + entry.size
        for start in range(entry.offset, end, CHUNK_BYTES):
            crc = crc32c.extend(crc, data[start : min(start + CHUNK_BYTES, end)])
        if _masked(crc) != entry.crc32c:
            raise CheckpointError(
                f"{what} cannot be read, or is damaged: it does not have the checksum it was saved with."
            )


def _lengths(piece: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a piece's axes; one without a length is all of it."""
    return tuple(e.length if e.HasField("length") else n for e, n in zip(piece.extent, shape, strict=True))


def _piece_key(name: bytes, piece: Any) -> bytes:
    """The key that a piece has in the index."""
    numbers = [n for e in piece.extent for n in (e.start, e.length if e.HasField("length") else -1)]
    rank = len(piece.extent)
    head = b"\0" + name.replace(b"\0", b"\0\xff") + b"\0\1" + (bytes([1, rank]) if rank else b"\0")
    return head + b"".join(map(_ordered, numbers))


def _ordered(number: int) -> bytes:
    """A number, at least -1, such that its bytes sort as it does: as many ones as there are bytes, a zero, and it."""
    if number < 0:
        return b"\x7f"
    size = number.bit_length() // 7 + 1
    return (number | ((1 << size) - 1) << 7 * size).to_bytes(size, "big")


def _masked(crc: int) -> int:
    """As TensorFlow stores a checksum."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _entries(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(content) < FOOTER_BYTES or int.from_bytes(content[-8:], "little") != MAGIC:
        raise ValueError("it has no such footer")
    at = len(content) - FOOTER_BYTES
    for _ in range(2):  # past where the block of metadata is
        _, at = _varint(content, at)
    offset, at = _varint(content, at)
    size, _ = _varint(content, at)
    for _, handle in _block(content, offset, size):
        first, after = _varint(handle, 0)
        length, _ = _varint(handle, after)
        yield from _block(content, first, length)


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    end = offset + size
    if size < 4 or end + TRAILER_BYTES > len(content) - FOOTER_BYTES:
        raise ValueError("a block is outside of it")
    if content[end]:
        raise ValueError("a block is compressed")
    crc32c: Any = needed("google_crc32c", "tensorflow")
    stored = int.from_bytes(content[end + 1 : end + 5], "little")
    if _masked(crc32c.value(content[offset : end + 1])) != stored:
        raise ValueError("a block does not have its checksum")
    restarts = int.from_bytes(content[end - 4 : end], "little")
    stop, at, key = end - 4 - 4 * restarts, offset, b""
    while at < stop:
        shared, at = _varint(content, at)
        own, at = _varint(content, at)
        length, at = _varint(content, at)
        key = key[:shared] + content[at : at + own]
        yield key, content[at + own : at + own + length]
        at += own + length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")
