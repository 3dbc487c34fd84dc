"""TorchRec EmbeddingBagCollection state dicts: a torch checkpoint, or a safetensors file.

A table is `embedding_bags.NAME.weight`, behind whatever prefix the model gives it (`embeddings.NAME.weight` of
an EmbeddingCollection); a fused optimizer's state is beside it, `....NAME.weight.NAME.momentum1`.
"""

import os
import pathlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.checkpoint.files import open_regular, refuse_pointer, write_file
from jaxembed.checkpoint.safetensors_file import header_of, map_file
from jaxembed.checkpoint.stored import StoredArray
from jaxembed.convert.arrays import mapped_rows
from jaxembed.convert.formats import needed
from jaxembed.convert.interface import Contents, Options, Place, Source, Stream, stored
from jaxembed.convert.keys import key_for, place_arrays

#: Fused optimizers keep their state sharded, and read it in no other form.
SLOTS = False
COMBINER_WEIGHTS = False
COMBINER = "sum"
SUFFIXES = (".pt", ".pth")
MAX_DEPTH = 16
_TABLE = re.compile(r"(?:^|\.)(?:embedding_bags|embeddings)\.([^.]+)\.weight(?:\.\1\.(\w+))?$")
_ADAGRAD = {"momentum1": "accumulators", "momentum_1": "accumulators", "sum": "accumulators"}
_ADAM = {"momentum1": "momenta", "exp_avg": "momenta", "exp_avg_sq": "velocities", "momentum2": "velocities"}


def matches(path: pathlib.Path) -> bool:
    """Whether it is a torch checkpoint, or a safetensors file with such names."""
    if path.suffix in SUFFIXES:
        return path.is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        return any(_TABLE.search(name) for name in map_file(path)[0])
    except ValueError:
        return False


def read(path: pathlib.Path, options: Options) -> Source:
    """Maps the file."""
    if path.suffix == ".safetensors":
        tensors = map_file(path)[0]
        arrays = {name: StoredArray(f"{path}: {name}", tensor) for name, tensor in tensors.items()}
    else:
        arrays = {name: _stored(path, name, tensor) for name, tensor in _flat(_load(path))}

    def guess(key: str, array: StoredArray) -> Place | None:
        found = _TABLE.search(key)
        if found is None or found[2] is None:
            return found and (found[1], None)
        beside = {other.removeprefix(key[: -len(found[2])]) for other in arrays}
        names = _ADAM if beside & {"exp_avg_sq", "momentum2"} else _ADAGRAD
        # One value a row is row-wise Adagrad's, which is no slot of TensorFlow's optimizers.
        return (found[1], names[found[2]]) if found[2] in names and len(array.shape) == 2 else None

    tables, slots, notes = place_arrays(path, arrays, options, guess)
    return Source(tables, slots, notes=notes)


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes a state dict that `load_state_dict` of the collection takes."""
    names = {}
    for stream in contents.tables:
        key = key_for(contents.options, (stream.table, None))
        if key is None and "." in stream.table:
            raise ValueError(f"table {stream.table!r} cannot be a module of torch, for its '.'; give it a key.")
        names[key or f"embedding_bags.{stream.table}.weight"] = stream
    if out.suffix == ".safetensors":
        write_file(out, _safetensors(names))
    else:
        _save(out, names)
    return [f"table {stream.table!r} -> {name}" for name, stream in names.items()]


def _safetensors(names: Mapping[str, Stream]) -> Iterator[Any]:
    yield header_of({name: (stream.dtype, stream.shape) for name, stream in names.items()}, {"format": "pt"})
    for stream in names.values():
        for _, rows in stream.blocks():
            yield rows.reshape(-1).view(np.uint8).data


def _save(out: pathlib.Path, names: Mapping[str, Stream]) -> None:
    torch: Any = needed("torch", "torchrec")
    state = {}
    for i, (name, stream) in enumerate(names.items()):
        # torch.save takes whole tensors: these are mapped files, so that they need no memory.
        is_bfloat16 = stream.dtype == ml_dtypes.bfloat16
        dtype = np.dtype(np.int16) if is_bfloat16 else None
        tensor = torch.from_numpy(mapped_rows(out.parent / f"rows-{i}", stream, stream.blocks(), dtype))
        state[name] = tensor.view(torch.bfloat16) if is_bfloat16 else tensor
    torch.save(state, out)


def _load(path: pathlib.Path) -> Any:
    torch: Any = needed("torch", "torchrec")
    descriptor, _ = open_regular(path)
    try:
        refuse_pointer(path, os.pread(descriptor, 64, 0))
    finally:
        os.close(descriptor)
    _check_sums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError, OSError, KeyError, AttributeError) as e:
        raise ValueError(
            f"{path} is no torch checkpoint of plain tensors, or is damaged: {str(e)[:300]}. Save a state dict "
            "of whole tensors with torch.save; sharded tensors must be gathered first."
        ) from e


def _check_sums(path: pathlib.Path) -> None:
    """Torch compares no checksums; a file of another form than torch.save's is left to it to refuse."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
    ) as e:
        raise ValueError(
            f"{path} is no torch checkpoint of plain tensors, or is damaged: {str(e)[:200]}."
        ) from e
    if bad is not None:
        raise ValueError(
            f"{path} is damaged: {bad} does not have the checksum it was saved with (torch saves checksums unless "
            "torch.serialization.set_crc32_options(False) was called)."
        )


def _flat(value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise ValueError(f"the checkpoint is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flat(child, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif hasattr(value, "untyped_storage"):
        yield prefix, value


def _stored(path: pathlib.Path, name: str, tensor: Any) -> StoredArray:
    torch: Any = needed("torch", "torchrec")
    tensor = tensor.detach()
    is_bfloat16 = tensor.dtype == torch.bfloat16

    def values(part: Any) -> np.ndarray:
        part = part.contiguous()
        return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_bfloat16 else part.numpy()

    try:
        dtype = values(tensor[:0]).dtype if tensor.ndim else np.dtype(np.float32)
    except (TypeError, RuntimeError) as e:
        raise ValueError(f"{path}: {name!r} has a type that numpy has not: {tensor.dtype}.") from e
    return stored(f"{path}: {name}", tensor.shape, dtype, lambda start, stop: values(tensor[start:stop]))
