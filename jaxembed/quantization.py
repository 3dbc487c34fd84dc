"""Makes QuantizedTables of [V, D] tables, and says what that costs.

quantize(table, QuantizationConfig(256, -1, 1))   codes of its values: what training simulated
quantize(table, "int8"), quantize(table, "int4")  evenly spaced from the least to the greatest value of each row
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxembed.buckets import MAX_BUCKETS, Buckets, simulate_quantization
from jaxembed.config import QuantizationConfig, TableConfig
from jaxembed.memory import aligned_empty
from jaxembed.quantized_table import KINDS, QuantizedTable, fused
from jaxembed.shapes import AnyTable, HostCodebook, HostCodes, HostRows

__all__ = [
    "MAX_BUCKETS",
    "QuantizationError",
    "QuantizedTable",
    "RowCodec",
    "UnquantizableError",
    "quantization_error",
    "quantize",
    "quantize_as_trained",
    "row_codec",
    "simulate_quantization",
]

ROW_WISE = ("int8", "int4")
_BLOCK_BYTES = 16 << 20
# A scale of few bits, so that code times scale is exact and all programs decode to the same bits.
_SCALE_BITS = 16


class UnquantizableError(ValueError):
    """A table holds values that no code stands for."""


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """Absolute differences between a table and its quantized form.

    Attributes:
      max: the largest.
      mean: of all values.
    """

    max: float
    mean: float


def quantize(table: AnyTable, how: str | QuantizationConfig) -> QuantizedTable:
    """A table as codes.

    Args:
      table: [V, D] floating point array.
      how: "int8" or "int4", row by row; or a QuantizationConfig of at most 256 buckets, whose codes take 8
        bits, or 4 where there are at most 16.

    Raises:
      UnquantizableError: if a value is NaN or, row by row, infinite, or a row's values lie farther apart than
        float32 can tell.
      ValueError: if there are more buckets, or the table is of another form.
    """
    codec, table = row_codec(how), _floats(table)
    num_rows, dim = table.shape
    shapes = QuantizedTable.array_shapes(codec.kind, num_rows, dim)
    arrays = {name: aligned_empty(*shapes[name]) for name in shapes if name != "codebook"}
    for start, stop in _blocks(num_rows, dim):
        parts = codec.encode(table[start:stop].astype(np.float32), start)
        for name, part in parts.items():
            arrays[name][start:stop] = part
    return QuantizedTable(codec.kind, dim, **arrays, codebook=codec.codebook, dtype=table.dtype)


def quantize_as_trained(table: AnyTable, config: TableConfig) -> Any:
    """What serving looks up, so that it equals training's forward with `config.quantization_config`.

    Args:
      table: [V, D] floating point array, on the host or a device.
      config: its configuration.

    Returns:
      A QuantizedTable; for more than 256 buckets an array of the quantized values. `table` itself where
      there is no quantization_config, or it holds these values already.
    """
    quantization = config.quantization_config
    if quantization is None:
        return table
    if quantization.num_buckets <= 256:
        return quantize(table, quantization)
    rows = _floats(table)
    blocks = list(_blocks(*rows.shape))
    if all(_is_quantized(rows[start:stop], quantization) for start, stop in blocks):
        return table
    out = aligned_empty(rows.shape, rows.dtype)
    for start, stop in blocks:
        out[start:stop] = simulate_on_host(rows[start:stop], quantization)
    return out


def quantization_error(table: AnyTable, quantized: QuantizedTable) -> QuantizationError:
    """How far the values of `quantized` are from those of `table`, [V, D]."""
    if tuple(table.shape) != quantized.shape:
        raise ValueError(f"table must be {list(quantized.shape)}, got {list(table.shape)}.")
    quantized = dataclasses.replace(quantized, **{k: np.asarray(v) for k, v in quantized.arrays.items()})
    total, largest = 0.0, 0.0
    for start, stop in _blocks(*quantized.shape):
        gap = np.abs(np.asarray(table[start:stop]).astype(np.float32) - quantized.host_rows(start, stop))
        largest, total = max(largest, float(gap.max(initial=0))), total + float(gap.sum(dtype=np.float64))
    return QuantizationError(largest, total / max(table.shape[0] * table.shape[1], 1))


@dataclasses.dataclass(frozen=True)
class RowCodec:
    """Encodes tables by blocks of rows.

    Attributes:
      kind: of the QuantizedTable.
      buckets: whose values they become, or None.
    """

    kind: str
    buckets: Buckets | None = None

    @property
    def codebook(self) -> HostCodebook | None:
        """Float32 [256] or [16], or None."""
        return None if self.buckets is None else self.buckets.codebook(256 if self.kind == "codes8" else 16)

    def encode(self, rows: HostRows, start: int = 0) -> dict[str, HostCodes]:
        """The arrays of a QuantizedTable, but its codebook, for float32 rows [N, D], the first being row `start`.

        Raises:
          UnquantizableError: as `quantize`.
        """
        if self.buckets is None:
            _refuse(~np.isfinite(rows), "NaN or infinity", start)
            return _encode_row_wise(rows, self.kind, start)
        _refuse(np.isnan(rows), "NaN", start)
        return {"codes": _pack(self.buckets.codes(rows).astype(np.uint8), self.kind)}


def row_codec(how: str | QuantizationConfig) -> RowCodec:
    """The codec of `how`, as `quantize` takes it."""
    if isinstance(how, QuantizationConfig):
        if how.num_buckets > 256:
            raise ValueError(
                f"codes have at most 8 bits: num_buckets must be at most 256, got {how.num_buckets}."
            )
        return RowCodec("codes4" if how.num_buckets <= 16 else "codes8", Buckets(how))
    if how not in ROW_WISE:
        raise ValueError(f"how must be one of {ROW_WISE} or a QuantizationConfig, got {how!r}.")
    return RowCodec(how)


def simulate_on_host(rows: HostRows, config: QuantizationConfig) -> HostRows:
    """`simulate_quantization` in numpy, to the same bits."""
    buckets, values = Buckets(config), rows.astype(np.float32)
    with np.errstate(invalid="ignore"):
        quantized = buckets.values(buckets.codes(values))
    return np.where(np.isnan(values), values, quantized).astype(rows.dtype)


def _is_quantized(rows: np.ndarray, config: QuantizationConfig) -> bool:
    return np.array_equal(simulate_on_host(rows, config), rows)


def _encode_row_wise(rows: np.ndarray, kind: str, start: int) -> dict[str, np.ndarray]:
    steps = 255 if kind == "int8" else 15
    low, high = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
    mantissa, exponent = np.frexp((high - low) / steps)
    scale = np.ldexp(np.ceil(np.ldexp(mantissa, _SCALE_BITS)), exponent - _SCALE_BITS)
    scale[scale < 2.0**-90] = 0  # a row of one value; also keeps products from being subnormal
    too_wide = np.maximum(scale * steps, scale * steps + low) > np.finfo(np.float32).max
    if too_wide.any():
        row = int(np.argmax(too_wide))
        raise UnquantizableError(
            f"row {start + row} of the table ranges from {low[row]:g} to {high[row]:g}, too far for float32 to count its "
            "steps; clip or scale the rows, or leave the table unquantized."
        )
    scale, bias = scale.astype(np.float32), low.astype(np.float32)
    divisor = np.where(scale > 0, scale, np.float32(1))
    codes = np.rint((rows - bias[:, None]) / divisor[:, None])
    codes = np.where(scale[:, None] > 0, np.clip(codes, 0, steps), 0)
    return {"codes": fused(_pack(codes.astype(np.uint8), kind), scale, bias)}


def _floats(table: Any) -> np.ndarray:
    """On the host, if it is a [V, D] floating point array."""
    table = np.asarray(table)
    if table.ndim != 2 or not table.shape[1] or not jnp.issubdtype(table.dtype, jnp.floating):
        raise ValueError(
            f"table must be a floating point array of [V, D] with D of at least 1, got {table.dtype}{list(table.shape)}."
        )
    return table


def _pack(codes: np.ndarray, kind: str) -> np.ndarray:
    """[N, D] codes to bytes: unchanged, or two in one."""
    if KINDS[kind] == 1:
        return codes
    codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return codes[:, ::2] | (codes[:, 1::2] << np.uint8(4))


def _refuse(bad: np.ndarray, what: str, start: int) -> None:
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UnquantizableError(
            f"the table holds {what}, first at row {start + row}, column {column}, which no code stands for; "
            "repair the rows or leave the table unquantized."
        )


def _blocks(num_rows: int, dim: int) -> Iterator[tuple[int, int]]:
    step = max(_BLOCK_BYTES // (4 * max(dim, 1)), 1)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
