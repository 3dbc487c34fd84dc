"""Files that torch.save wrote: their tensors, mapped by torch, and compared with their checksums, which torch does not."""

import os
import pathlib
import pickle
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import open_regular, refuse_pointer
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.formats import needed
from jaxembed.convert.interface import stored
from jaxembed.convert.torch_pickle import flaw

MAX_DEPTH = 16
CRC_BYTES = 16 << 20


def read_file(path: pathlib.Path) -> tuple[dict[str, StoredArray], list[str]]:
    """The tensors by their names, each compared with its checksum when the first of its rows is asked for; and the names of
    those of types that numpy has not.

    Raises:
      ValueError: if it is no such file, or holds more than plain tensors.
    """
    torch: Any = needed("torch", "torchrec")
    descriptor, _ = open_regular(path)
    try:
        refuse_pointer(path, os.pread(descriptor, 64, 0))
    finally:
        os.close(descriptor)
    sums = _checksums(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError, OSError, KeyError, AttributeError) as e:
        raise CheckpointError(
            f"{path} is no torch checkpoint of plain tensors, or is damaged: {str(e)[:300]}. Save a state dict "
            "of whole tensors with torch.save, or sharded ones with torch.distributed.checkpoint.save."
        ) from e
    arrays, others, checked = {}, [], set[tuple[int, int]]()
    for name, tensor in _flat(content):
        array = _stored(f"{path}: {name}", tensor.detach(), sums, checked)
        if array is None:
            others.append(f"{name} ({tensor.dtype})")
        else:
            arrays[name] = array
    return arrays, others


def _checksums(path: pathlib.Path) -> set[tuple[int, int]] | None:
    """Size and checksum of each record of a tensor, once the other records have been compared with theirs; None where none is
    left to compare. A file of another form than torch.save's is left to it to refuse."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: info for info in archive.infolist()}
            prefix = min((n for n in records if n.split("/")[-1] == "data.pkl"), key=len, default="data.pkl")
            prefix = prefix.removesuffix("data.pkl")
            order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in records else b"little"
            # Of another byte order, torch changes the bytes as it maps them.
            later = (
                {n for n in records if n.startswith(f"{prefix}data/")}
                if order.decode() == sys.byteorder
                else set()
            )
            for name in records.keys() - later:
                with archive.open(name) as record:
                    while record.read(CRC_BYTES):
                        pass
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
    ) as e:
        raise CheckpointError(
            f"{path} is no torch checkpoint of plain tensors, or is damaged: {flaw(e)}."
        ) from e
    return {(records[name].file_size, records[name].CRC) for name in later} or None


def _flat(value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise ValueError(f"the checkpoint is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flat(child, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif hasattr(value, "untyped_storage"):
        yield prefix, value


def _stored(
    what: str, tensor: Any, sums: set[tuple[int, int]] | None, checked: set[tuple[int, int]]
) -> StoredArray | None:
    """None of a type that numpy has not."""
    torch: Any = needed("torch", "torchrec")
    is_bfloat16 = tensor.dtype == torch.bfloat16

    def values(part: Any) -> np.ndarray:
        part = part.contiguous()
        return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_bfloat16 else part.numpy()

    def read_rows(start: int, stop: int) -> np.ndarray:
        storage = tensor.untyped_storage()
        place = storage.data_ptr(), storage.nbytes()
        if sums is not None and place[1] and place not in checked:
            _check(what, torch.empty(0, dtype=torch.uint8).set_(storage).numpy(), sums)
            checked.add(place)
        return values(tensor[start:stop])

    try:
        dtype = values(tensor[:0]).dtype if tensor.ndim else np.dtype(np.float32)
    except (TypeError, RuntimeError):
        return None
    return stored(what, tensor.shape, dtype, read_rows)


def _check(what: str, content: np.ndarray, sums: set[tuple[int, int]]) -> None:
    """Torch does not say which record a tensor is mapped from: its own, as it must be one of them."""
    crc = 0
    for start in range(0, content.size, CRC_BYTES):
        crc = zlib.crc32(content[start : start + CRC_BYTES].data, crc)
    if (content.size, crc) not in sums:
        raise CheckpointError(f"{what} is damaged: it does not have the checksum it was saved with.")
