"""One safetensors file: tensors `tables/NAME`, `slots/NAME/SLOT`, the feature configuration in its metadata."""

import pathlib

from jaxembed.checkpoint.files import write_file
from jaxembed.checkpoint.safetensors_file import header_of, map_file
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.interface import Contents, Options, Source
from jaxembed.convert.keys import own_key, place_arrays
from jaxembed.convert.npy import guess_place
from jaxembed.convert.sidecar import read_sidecar, sidecar_of

METADATA = "jaxembed"


def matches(path: pathlib.Path) -> bool:
    """Whether it is a .safetensors file."""
    return path.suffix == ".safetensors" and path.is_file()


def read(path: pathlib.Path, options: Options) -> Source:
    """Maps the file."""
    tensors, metadata, others = map_file(path)
    arrays = {name: StoredArray(f"{path}: {name}", tensor) for name, tensor in tensors.items()}
    tables, slots, notes = place_arrays(path, arrays, options, guess_place, others)
    known = read_sidecar(path, metadata[METADATA]) if METADATA in metadata else {}
    return Source(tables, slots, notes=notes, **known)


def check(out: pathlib.Path, contents: Contents) -> None:
    """Of types, those that the format has."""
    del out
    _header(contents)


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes tables, then slots."""

    def parts():
        yield _header(contents)
        for stream in contents.streams:
            for _, rows in stream.blocks():
                yield rows.reshape(-1).view("u1").data

    write_file(out, parts())
    return []


def _header(contents: Contents) -> bytes:
    tensors = {own_key((s.table, s.slot)): (s.dtype, s.shape) for s in contents.streams}
    return header_of(tensors, {METADATA: sidecar_of(contents).decode()})
