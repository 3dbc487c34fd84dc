"""QuantizedTable: a table stored as codes, to be passed wherever a [V, D] array may be."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: Type of the codes, and how many share a byte.
KINDS: dict[str, tuple[type[np.integer], int]] = {
    "int8": (np.int8, 1),
    "int4": (np.uint8, 2),
    "codes8": (np.uint8, 1),
    "codes4": (np.uint8, 2),
}
_CODEBOOK = {"codes8": 256, "codes4": 16}


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTable:
    """[V, D] values as codes, a pytree of arrays.

        int8    value = code scale + bias of the row, code in [-128, 127]
        int4    value = code scale + bias of the row, code in [0, 15], two codes to a byte
        codes8  value = codebook[code], code in [0, 255]
        codes4  value = codebook[code], code in [0, 15], two codes to a byte

    Of two codes in a byte, the even column has the low half. Lookups decode to float32 and accumulate there.
    `jaxembed.quantization` makes such tables.

    Args:
      kind: one of the above.
      dim: D.
      codes: [V, D] int8 or uint8, or [V, (D + 1) // 2] uint8.
      scale_bias: float32 [V, 2], scale and bias of each row beside each other, so that a row costs one
        more line of memory, not two; or None.
      codebook: float32 [256] or [16], or None.
      dtype: floating point type of what is looked up.

    Raises:
      ValueError: if an argument is not of the form above.

    Examples:
      >>> from jaxembed.quantization import quantize
      >>> table = quantize(np.eye(4, dtype=np.float32), "int8")
      >>> table.codes.dtype.name, table.shape
      ('int8', (4, 4))
    """

    kind: str
    dim: int
    codes: Any
    scale_bias: Any = None
    codebook: Any = None
    dtype: Any = np.float32

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {tuple(KINDS)}, got {self.kind!r}.")
        dtype = jnp.dtype(self.dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating point type, got {dtype.name}.")
        object.__setattr__(self, "dtype", dtype)
        shapes = self.array_shapes(self.kind, self.codes.shape[0], self.dim)
        for name in ("codes", "scale_bias", "codebook"):
            array, wanted = getattr(self, name), shapes.get(name)
            found = None if array is None else (tuple(array.shape), np.dtype(array.dtype))
            if found != wanted:
                raise ValueError(f"{name} of an {self.kind} table must be {_form(wanted)}, got {_form(found)}.")

    @staticmethod
    def array_shapes(kind: str, num_rows: int, dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of each array that a table of V rows has, by the names above."""
        dtype, packed = KINDS[kind]
        shapes = {"codes": ((num_rows, -(-dim // packed)), np.dtype(dtype))}
        if kind in _CODEBOOK:
            return {**shapes, "codebook": ((_CODEBOOK[kind],), np.dtype(np.float32))}
        return {**shapes, "scale_bias": ((num_rows, 2), np.dtype(np.float32))}

    @classmethod
    def from_codes(cls, codes: Any, scale: Any, bias: Any, dtype: Any = np.float32) -> "QuantizedTable":
        """An int8 table with value = code scale + bias of the row.

        Args:
          codes: [V, D] int8, or uint8 as torch and FBGEMM have them, which are shifted.
          scale: float32 [V].
          bias: float32 [V].
          dtype: of what is looked up.
        """
        if codes.dtype == np.uint8:
            codes = (np.asarray(codes) ^ np.uint8(128)).view(np.int8)
            bias = (np.float64(128) * scale + bias).astype(np.float32)
        pairs = np.stack([np.asarray(scale, np.float32), np.asarray(bias, np.float32)], axis=1)
        return cls("int8", codes.shape[1], codes, pairs, dtype=dtype)

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
        named = {"codes": self.codes, "scale_bias": self.scale_bias, "codebook": self.codebook}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def rows(self, ids: Any) -> jax.Array:
        """The rows of ids [N], float32 [N, D]; ids outside [0, V) give some row."""

        def take(array):
            return jnp.asarray(array).at[ids].get(mode="clip", wrap_negative_indices=False)

        if self.codebook is not None:
            return self._decode(take(self.codes), None, jnp)
        return self._decode(take(self.codes), take(self.scale_bias), jnp)

    def dequantize(self) -> jax.Array:
        """All values, [V, D] in `dtype`."""
        codes, scale_bias = jax.tree.map(jnp.asarray, (self.codes, self.scale_bias))
        return self._decode(codes, scale_bias, jnp).astype(self.dtype)

    def host_rows(self, start: int, stop: int, codes: np.ndarray | None = None) -> np.ndarray:
        """Rows [start, stop) of a table on the host, float32 numpy; `codes` are theirs if at hand."""
        codes = self.codes[start:stop] if codes is None else codes
        if self.codebook is not None:
            return self._decode(codes, None, np)
        return self._decode(codes, self.scale_bias[start:stop], np)

    def _decode(self, codes: Any, scale_bias: Any, xp: Any) -> Any:
        if KINDS[self.kind][1] == 2:
            codes = xp.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
            codes = codes.reshape(codes.shape[0], -1)[:, : self.dim]
        if self.codebook is not None:
            return xp.asarray(self.codebook)[codes.astype(np.int32)]
        return codes.astype(np.float32) * scale_bias[:, :1] + scale_bias[:, 1:]

    def tree_flatten(self) -> tuple[Any, Any]:
        """The arrays, and what is static."""
        return (self.codes, self.scale_bias, self.codebook), (self.kind, self.dim, self.dtype)

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Any) -> "QuantizedTable":
        """The inverse; unchecked, since transformations put other things in place of the arrays."""
        table = object.__new__(cls)
        names = ("kind", "dim", "dtype", "codes", "scale_bias", "codebook")
        for name, value in zip(names, (*static, *arrays), strict=True):
            object.__setattr__(table, name, value)
        return table


def _form(form: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "None" if form is None else f"{form[1].name}{list(form[0])}"
