"""QuantizedTable: a table stored as codes, to be passed wherever a [V, D] array may be."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.memory import aligned_empty
from jaxembed.shapes import (
    AnyCodebook,
    AnyCodes,
    AnyIds,
    AnyPerRow,
    AnyTableCodes,
    HostCodes,
    HostRows,
    Rows,
    Table,
)

#: How many codes share a byte.
KINDS: dict[str, int] = {"int8": 1, "int4": 2, "codes8": 1, "codes4": 2}
_CODEBOOK = {"codes8": 256, "codes4": 16}
_SCALE_BIAS_BYTES = 8


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTable:
    """[V, D] values as codes, a pytree of arrays.

        int8    value = code scale + bias of the row, code in [0, 255]
        int4    value = code scale + bias of the row, code in [0, 15], two codes to a byte
        codes8  value = codebook[code], code in [0, 255]
        codes4  value = codebook[code], code in [0, 15], two codes to a byte

    Of two codes in a byte, the even column has the low half. Scale and bias, float32, are the last eight bytes
    of their row, so that a row is one place in memory; an int8 row is as
    `torch.ops.quantized.embedding_bag_byte_prepack` makes it. Lookups decode to float32 and accumulate there.
    `jaxembed.quantization` makes such tables.

    Args:
      kind: one of the above.
      dim: D.
      codes: uint8 [V, D + 8] (int8), [V, (D + 1) // 2 + 8] (int4), [V, D] (codes8) or [V, (D + 1) // 2] (codes4).
      codebook: float32 [256] or [16], or None.
      dtype: floating point type of what is looked up; float64 becomes float32 unless JAX computes in 64 bits.

    Raises:
      ValueError: if an argument is not of the form above.

    Examples:
      >>> from jaxembed.quantization import quantize
      >>> table = quantize(np.eye(4, dtype=np.float32), "int8")
      >>> table.codes.dtype.name, table.shape
      ('uint8', (4, 4))
    """

    kind: str
    dim: int
    codes: AnyCodes
    codebook: AnyCodebook | None = None
    dtype: Any = np.float32

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {tuple(KINDS)}, got {self.kind!r}.")
        if not isinstance(self.dim, int | np.integer) or self.dim < 1:
            raise ValueError(f"dim must be an int of at least 1, got {self.dim!r}.")
        dtype = jnp.dtype(self.dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating point type, got {dtype.name}.")
        object.__setattr__(self, "dtype", jax.dtypes.canonicalize_dtype(dtype.newbyteorder("=")))
        for name in ("codes",) if self.codebook is None else ("codes", "codebook"):
            array = getattr(self, name)
            if not (hasattr(array, "shape") and hasattr(array, "dtype")):
                raise ValueError(
                    f"{name} must be an array, got {type(array).__name__}; convert it with numpy.asarray, or make the "
                    "table with jaxembed.quantization.quantize."
                )
        num_rows = self.codes.shape[0] if self.codes.shape else 0
        shapes = self.array_shapes(self.kind, num_rows, self.dim)
        for name in ("codes", "codebook"):
            array, wanted = getattr(self, name), shapes.get(name)
            found = None if array is None else (tuple(array.shape), np.dtype(array.dtype))
            if found != wanted:
                raise ValueError(f"{name} of {self.kind} rows must be {_form(wanted)}, got {_form(found)}.")

    @staticmethod
    def array_shapes(kind: str, num_rows: int, dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of each array that a table of V rows has, by the names above."""
        width = -(-dim // KINDS[kind])
        if kind in _CODEBOOK:
            codebook = ((_CODEBOOK[kind],), np.dtype(np.float32))
            return {"codes": ((num_rows, width), np.dtype(np.uint8)), "codebook": codebook}
        return {"codes": ((num_rows, width + _SCALE_BIAS_BYTES), np.dtype(np.uint8))}

    @classmethod
    def from_codes(
        cls, codes: AnyTableCodes, scale: AnyPerRow, bias: AnyPerRow, dtype: Any = np.float32
    ) -> "QuantizedTable":
        """An int8 table with value = code scale + bias of the row.

        Args:
          codes: [V, D] uint8, as torch and FBGEMM have them, or int8, which are shifted.
          scale: float32 [V].
          bias: float32 [V].
          dtype: of what is looked up.

        Raises:
          ValueError: if an argument is of another type or shape.
        """
        codes, scale, bias = (np.asarray(array) for array in (codes, scale, bias))
        if codes.ndim != 2 or codes.dtype not in (np.uint8, np.int8):
            raise ValueError(f"codes must be uint8 or int8 [V, D], got {codes.dtype}{list(codes.shape)}.")
        for name, array in (("scale", scale), ("bias", bias)):
            if array.shape != codes.shape[:1] or array.dtype.kind not in "fiu":
                raise ValueError(
                    f"{name} must be float32 [V] = [{codes.shape[0]}], got {array.dtype}{list(array.shape)}."
                )
        if codes.dtype == np.int8:
            codes = codes.view(np.uint8) ^ np.uint8(128)
            bias = (bias - np.float64(128) * scale).astype(np.float32)
        return cls("int8", codes.shape[1], fused(codes, scale, bias), dtype=dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)."""
        return (self.codes.shape[0], self.dim)

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that it has, by name."""
        return {"codes": self.codes} | ({} if self.codebook is None else {"codebook": self.codebook})

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def rows(self, ids: AnyIds) -> Rows:
        """The rows of ids [N], float32 [N, D]; ids outside [0, V) give some row."""
        codes = jnp.asarray(self.codes).at[ids].get(mode="clip", wrap_negative_indices=False)
        return self._decode(codes, jnp)

    def dequantize(self) -> Table:
        """All values, [V, D] in `dtype`."""
        return self._decode(jnp.asarray(self.codes), jnp).astype(self.dtype)

    def host_rows(self, start: int, stop: int, codes: HostCodes | None = None) -> HostRows:
        """Rows [start, stop) of a table on the host, float32 numpy; `codes` are theirs if at hand."""
        return self._decode(self.codes[start:stop] if codes is None else codes, np)

    def _decode(self, codes: Any, xp: Any) -> Any:
        scale_bias = None
        if self.codebook is None:
            codes, last = codes[:, :-_SCALE_BIAS_BYTES], codes[:, -_SCALE_BIAS_BYTES:]
            if xp is np:
                scale_bias = np.ascontiguousarray(last).view(np.float32)
            else:
                # Not bytes to floats at once, which exports of any batch size cannot do.
                words = sum(last[:, byte::4].astype(np.uint32) << np.uint32(8 * byte) for byte in range(4))
                scale_bias = jax.lax.bitcast_convert_type(words, np.float32)
        if KINDS[self.kind] == 2:
            codes = xp.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
            codes = codes.reshape(codes.shape[0], 2 * codes.shape[1])[:, : self.dim]
        if scale_bias is None:
            return xp.asarray(self.codebook)[codes.astype(np.int32)]
        return codes.astype(np.float32) * scale_bias[:, :1] + scale_bias[:, 1:]

    def tree_flatten(self) -> tuple[Any, Any]:
        """The arrays, and what is static."""
        return (self.codes, self.codebook), (self.kind, self.dim, self.dtype)

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Any) -> "QuantizedTable":
        """The inverse; unchecked, since transformations put other things in place of the arrays."""
        table = object.__new__(cls)
        names = ("kind", "dim", "dtype", "codes", "codebook")
        for name, value in zip(names, (*static, *arrays), strict=True):
            object.__setattr__(table, name, value)
        return table


def fused(codes: HostCodes, scale: AnyPerRow, bias: AnyPerRow) -> HostCodes:
    """Rows of bytes [V, C] with scale and bias [V] of each behind it: uint8 [V, C + 8]."""
    rows = aligned_empty((codes.shape[0], codes.shape[1] + _SCALE_BIAS_BYTES), np.uint8)
    rows[:, :-_SCALE_BIAS_BYTES] = codes
    rows[:, -_SCALE_BIAS_BYTES:] = np.stack([scale, bias], axis=1).astype(np.float32).view(np.uint8)
    return rows


def _form(form: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "None" if form is None else f"{form[1].name}{list(form[0])}"
