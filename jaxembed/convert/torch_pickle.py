"""Pickles that torch writes, opened without torch, and without running anything they name."""

import collections
import io
import pickle
import pickletools
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.checkpoint.digests import CheckpointError

_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}
_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
}
#: Of torch, by name; others are no tables.
DTYPES: dict[str, Any] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def flaw(e: Exception) -> str:
    """What a zip of torch's has, as its reader says it; torch may have been told to save none of its checksums."""
    hint = ""
    if "Bad CRC-32" in str(e):
        hint = ". If torch.serialization.set_crc32_options(False) was called, save it again with True"
    return f"{e!s:.200}{hint}"


class Record:
    """What stands for an object of torch.

    Attributes:
      fields: its state by name, or position in a tuple; without a state "args", what it was made of.
    """

    fields: dict[Any, Any]

    def __new__(cls, *args: Any) -> "Record":
        self = super().__new__(cls)
        self.fields = {"args": args}
        return self

    def __setstate__(self, state: Any) -> None:
        self.fields = dict(state) if isinstance(state, dict) else dict(enumerate(state))

    def __getitem__(self, name: Any) -> Any:
        return self.fields[name]


class Name(str):
    """A type of values."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()) or (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return Record
        if module == "torch" and name == "Size":
            return tuple
        if module == "torch":
            return Name(_STORAGES.get(name, name))
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch.serialization", "_get_layout"):
            return Name
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "PurePosixPath"):
            return _path
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load(what: Any, content: bytes, persistent: bool = False) -> Any:
    """The object, with Records in place of those of torch.

    Args:
      what: how errors name it.
      content: the pickle.
      persistent: whether it refers to storages.

    Raises:
      ValueError: if it is none, or names anything but what torch's checkpoints are made of.
    """
    try:
        # The lengths in it must be true before any memory is taken for them.
        for code, argument, _ in pickletools.genops(content):
            if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(content):
                raise ValueError("it has a memo that is too large")
            if code.name in ("PERSID", "BINPERSID") and not persistent:
                raise ValueError("it refers to what is elsewhere")
        return _Unpickler(io.BytesIO(content)).load()
    except Exception as e:  # a pickle can fail in any way
        raise CheckpointError(f"{what} is no pickle of torch's checkpoints, or is damaged: {e!s:.200}.") from e


def _path(*parts: str) -> str:
    return "/".join(map(str, parts))
