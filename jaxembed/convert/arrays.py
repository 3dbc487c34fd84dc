"""Types of values: what becomes of bytes of another order, and which types a format cannot hold."""

import numpy as np

from jaxembed.convert.interface import Contents


def native(dtype: np.dtype) -> np.dtype:
    """The same type in this machine's byte order."""
    return dtype.newbyteorder("=")


def bits(dtype: np.dtype) -> np.dtype:
    """What values are mapped and lent as: themselves, or where numpy does not know them ints of their size."""
    return np.dtype(np.int16) if dtype.name == "bfloat16" else dtype


def refuse_types(contents: Contents, form: str, names: tuple[str, ...]) -> None:
    """Raises ValueError if an array is of none of the types `names`, which are all that `form` can hold."""
    for stream in contents.streams:
        if stream.dtype.name not in names:
            slot = "" if stream.slot is None else f"slot {stream.slot!r} of "
            how = (
                "convert it with --dtype float32, or to safetensors" if stream.slot is None else "leave it out"
            )
            raise ValueError(
                f"{form} cannot hold {stream.dtype.name}, the type of {slot}table {stream.table!r}; {how}. "
                f"It holds {', '.join(names)}."
            )
