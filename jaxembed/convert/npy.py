"""A folder of .npy files, or one .npy file: `tables/NAME.npy`, `slots/NAME/SLOT.npy`, `feature_config.json`."""

import io
import os
import pathlib
import tokenize
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import open_regular, read_regular, refuse_pointer, write_file
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.arrays import native, refuse_types
from jaxembed.convert.interface import Contents, Options, Place, Source, Stream, stored
from jaxembed.convert.keys import is_table, own_key, own_place, place_arrays
from jaxembed.convert.sidecar import MAX_SIDECAR, SIDECAR, read_sidecar, sidecar_of

MAX_FILES = 100_000
#: Of the name of a file.
MAX_NAME = 255
TYPES = ("float16", "float32", "float64")


def matches(path: pathlib.Path) -> bool:
    """Whether it is a .npy file or a folder with some."""
    if path.is_dir():
        return any(next(path.glob(pattern), None) for pattern in ("*.npy", "tables/*.npy"))
    return path.suffix == ".npy"


def read(path: pathlib.Path, options: Options) -> Source:
    """Maps the files; a table is named by its file."""
    if path.is_dir():
        files = sorted(path.rglob("*.npy"))[: MAX_FILES + 1]
        if len(files) > MAX_FILES:
            raise ValueError(f"{path} has more than {MAX_FILES:,} .npy files.")
        arrays = {file.relative_to(path).with_suffix("").as_posix(): _open(file) for file in files}
    else:
        arrays = {path.stem: _open(path)}
    tables, slots, notes = place_arrays(path, arrays, options, guess_place)
    sidecar = path / SIDECAR
    known = read_sidecar(sidecar, read_regular(sidecar, MAX_SIDECAR)) if sidecar.exists() else {}
    return Source(tables, slots, notes=notes, **known)


def check(out: pathlib.Path, contents: Contents) -> None:
    """Of types, those that numpy has itself; of names, those that file systems take."""
    del out
    refuse_types(contents, ".npy", TYPES)
    sidecar_of(contents)
    for stream in contents.streams:
        longest = max(f"{own_key((stream.table, stream.slot))}.npy".split("/"), key=len)
        if len(longest) > MAX_NAME:
            raise ValueError(
                f"table {stream.table[:40]!r}... has too long a name for a file: {len(longest)} characters of at most "
                f"{MAX_NAME}; convert it to .npz or safetensors."
            )


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes a file an array."""
    out.mkdir()
    for stream in contents.streams:
        file = out / f"{own_key((stream.table, stream.slot))}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, _parts(stream))
    write_file(out / SIDECAR, [sidecar_of(contents)])
    return []


def guess_place(key: str, array: StoredArray) -> Place | None:
    """As jaxembed names its arrays, else every array that may be a table is one."""
    return own_place(key) or ((key, None) if is_table(array) else None)


def header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The beginning of a .npy file, to be followed by the rows."""
    out = io.BytesIO()
    np.lib.format.write_array_header_2_0(out, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return out.getvalue()


def _parts(stream: Stream) -> Iterator[Any]:
    yield header(stream.dtype, stream.shape)
    for _, rows in stream.blocks():
        yield rows.reshape(-1).view(np.uint8).data


def _open(file: pathlib.Path) -> StoredArray:
    descriptor, _ = open_regular(file)
    try:
        refuse_pointer(file, os.pread(descriptor, 64, 0))
    finally:
        os.close(descriptor)
    try:
        mapped: Any = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(mapped, np.memmap):
            raise ValueError("it is no .npy file")
    except (ValueError, OSError, OverflowError, MemoryError, SyntaxError, EOFError, tokenize.TokenError) as e:
        raise CheckpointError(f"{file} is no .npy file of numbers, or is damaged: {str(e)[:200]}.") from e
    dtype = native(mapped.dtype)
    return stored(
        str(file), mapped.shape, dtype, lambda start, stop: np.array(mapped[start:stop], dtype, order="C")
    )
