"""Reads and updates rows of a table on a TPU by copies of single rows: kernels in Pallas.

For XLA's gathers and scatters of rows the compiler counts whole tiles of 8 rows. Here every row is one copy of its own
between the table, which stays where it is, and where it is needed:

    gather    row by row from the table to the result; the copies of a block are in flight while those of the block
              before it finish
    update    a block of rows and slots comes in while the rule runs on the block before it and the one before that
              goes out: three buffers. Rows differ, so that no copy waits for another block's.

Both are compiled for TPU topologies and interpreted on CPU in the tests; they have not run on a TPU, and are tried on the
one at hand (`row_trial`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxembed.optimizers import Optimizer
from jaxembed.optimizers.base import Slots

from .pallas_scalars import SplitRule, split_rule

#: Values of a block of rows: 128 KB, 32 registers.
_BLOCK_VALUES = 256 * 128
_SUBLANES = 8


def gather(table: jax.Array, rows: jax.Array, *, block: int | None = None) -> jax.Array:
    """The rows of a table, [N, D].

    Args:
      table: [R, D], one that `row_kernels.holds`.
      rows: int32 [N]; those outside [0, R) are clipped.
      block: how many rows are in flight, a multiple of 8; None takes those of 128 KB.
    """
    size, dim = rows.shape[0], table.shape[1]
    if not size:
        return jnp.zeros((0, dim), table.dtype)
    block = block or _block(dim)
    blocks = pl.cdiv(size, block)
    rows = _by_block(jnp.clip(rows, 0, table.shape[0] - 1), block)

    def kernel(rows, table, result, arrived):
        i = pl.program_id(0)

        def live(i):
            return jnp.minimum(block, size - i * block)

        def start(r):
            at = result.at[pl.ds(i * block + r, 1)]
            pltpu.make_async_copy(table.at[pl.ds(rows[0, 0, r], 1)], at, arrived.at[i % 2]).start()

        def wait(i):
            _wait(result, result, live(i), block, arrived.at[i % 2])

        _for_each(live(i), block, start)
        pl.when(i > 0)(lambda: wait(i - 1))
        pl.when(i == blocks - 1)(lambda: wait(i))

    return pl.pallas_call(
        kernel,
        grid=(blocks,),
        in_specs=[
            pl.BlockSpec((1, 1, block), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((size, dim), table.dtype),
        scratch_shapes=[pltpu.SemaphoreType.DMA((2,))],
        # What the copies read and write, and the row numbers.
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * size * dim * table.dtype.itemsize + 4 * rows.size
        ),
        name="gather_rows",
    )(rows, table)


def update_unique(
    optimizer: Optimizer,
    table: jax.Array,
    slots: Slots,
    rows: jax.Array,
    gradients: jax.Array,
    learning_rate: Any,
    step: Any,
    *,
    block: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`jaxembed.optimizers.update_unique`, by a kernel; in place where table and slots are donated.

    Args:
      optimizer: of which `row_kernels.why_not` says nothing.
      table: [R, D].
      slots: by name.
      rows: int32 [N], ascending, each once, then padding of R.
      gradients: float32 [N, D]; those of padding are not looked at.
      learning_rate: float32 scalar.
      step: int scalar.
      block: how many rows are updated at a time, a multiple of 8; None takes those of 128 KB.

    Returns:
      The table and slots, updated.
    """
    names = optimizer.slot_names
    arrays = [table, *(slots[name] for name in names)]
    size, dim = gradients.shape
    if not size or not table.shape[0]:
        return table, {name: slots[name] for name in names}
    block = block or _block(dim)
    split = _split(optimizer, (block, dim), learning_rate, step)
    count = jnp.sum(rows < table.shape[0], dtype=jnp.int32)[None]
    ids = _by_block(rows, block)
    before = [count, ids, ids, gradients, *(x[None] for x in split.scalars)]
    # What the copies of N rows read and write: less, where rows are padding.
    moved = (1 + 2 * len(arrays)) * size * dim * 4 + 8 * ids.size
    new = pl.pallas_call(
        _UpdateKernel(split, len(arrays), block),
        grid_spec=_update_grid(ids.shape[0], block, dim, len(split.scalars), len(arrays)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        input_output_aliases={len(before) + i: i for i in range(len(arrays))},
        cost_estimate=pl.CostEstimate(flops=8 * size * dim, transcendentals=0, bytes_accessed=moved),
        name="update_rows",
    )(*before, *arrays)
    return new[0], dict(zip(names, new[1:], strict=True))


def _split(optimizer: Optimizer, shape: tuple[int, int], learning_rate: Any, step: Any) -> SplitRule:
    """The rule of an optimizer on the gradients, rows and slots of a block, taken apart."""
    names = optimizer.slot_names

    def rule(gradient, row, *rest):
        row_slots, (learning_rate, step) = dict(zip(names, rest, strict=False)), rest[len(names) :]
        row, row_slots = optimizer.update_rows(gradient, row, row_slots, learning_rate, step)
        return row, *(row_slots[name] for name in names)

    block = jax.ShapeDtypeStruct(shape, jnp.float32)
    return split_rule(
        rule, [block] * (2 + len(names)), (jnp.asarray(learning_rate, jnp.float32), jnp.asarray(step))
    )


def _update_grid(blocks: int, block: int, dim: int, num_scalars: int, num_arrays: int) -> Any:
    """Where operands and results of `_UpdateKernel` are, whose operands after the count these are."""

    def now(i, count):
        # Blocks of padding are not brought.
        return jnp.minimum(i, jnp.maximum(pl.cdiv(count[0], block) - 1, 0))

    def ids_at(ahead):
        return pl.BlockSpec(
            (1, 1, block), lambda i, count: (now(i + ahead, count), 0, 0), memory_space=pltpu.SMEM
        )

    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(blocks,),
        in_specs=[
            ids_at(0),
            ids_at(1),
            pl.BlockSpec((block, dim), lambda i, count: (now(i, count), 0)),
            *[pl.BlockSpec(memory_space=pltpu.SMEM)] * num_scalars,
            *[pl.BlockSpec(memory_space=pl.ANY)] * num_arrays,
        ],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * num_arrays,
        scratch_shapes=[
            pltpu.VMEM((num_arrays, 3, block, dim), jnp.float32),
            pltpu.SemaphoreType.DMA((3,)),
            pltpu.SemaphoreType.DMA((3,)),
        ],
    )


class _UpdateKernel:
    """One block: brings the next one's rows, applies the rule to this one's, and takes them back."""

    def __init__(self, split: Any, num_arrays: int, block: int):
        self.split, self.num_arrays, self.block = split, num_arrays, block

    def __call__(self, count, ids, next_ids, gradients, *refs):
        num_scalars = len(self.split.scalars)
        scalars, arrays = refs[:num_scalars], refs[num_scalars + self.num_arrays : -3]
        buffers, arrived, left = refs[-3:]
        block, i = self.block, pl.program_id(0)
        blocks = pl.cdiv(count[0], block)

        def live(i):
            return jnp.minimum(block, count[0] - i * block)

        def bring(i, ids):
            def start(r):
                for k, array in enumerate(arrays):
                    row, at = array.at[pl.ds(ids[0, 0, r], 1)], buffers.at[k, i % 3, pl.ds(r, 1)]
                    pltpu.make_async_copy(row, at, arrived.at[i % 3]).start()

            _for_each(live(i), block, start)

        def take_back(i):
            def start(r):
                for k, array in enumerate(arrays):
                    row, at = array.at[pl.ds(ids[0, 0, r], 1)], buffers.at[k, i % 3, pl.ds(r, 1)]
                    pltpu.make_async_copy(at, row, left.at[i % 3]).start()

            _for_each(live(i), block, start)

        def wait(i, semaphores):
            for k in range(self.num_arrays):
                buffer = buffers.at[k, i % 3]
                _wait(buffer, buffer, live(i), block, semaphores.at[i % 3])

        pl.when((i == 0) & (blocks > 0))(lambda: bring(i, ids))

        @pl.when(i + 1 < blocks)
        def _():
            pl.when(i >= 2)(lambda: wait(i - 2, left))
            bring(i + 1, next_ids)

        @pl.when(i < blocks)
        def _():
            wait(i, arrived)
            rows = [buffers[k, i % 3] for k in range(self.num_arrays)]
            new = self.split.on_rows([gradients[...], *rows], [x[0] for x in scalars])
            for k, value in enumerate(new):
                buffers[k, i % 3] = value
            take_back(i)

        @pl.when(i == blocks - 1)
        def _():
            for back in (2, 1, 0):
                pl.when(i >= back)(lambda back=back: wait(i - back, left))


def _block(dim: int) -> int:
    """Rows of a block."""
    return max(_BLOCK_VALUES // dim // _SUBLANES, 1) * _SUBLANES


def _by_block(rows: jax.Array, block: int) -> jax.Array:
    """[N] as [N / block, 1, block], the last one padded."""
    return jnp.pad(rows, (0, -rows.shape[0] % block)).reshape(-1, 1, block)


def _for_each(live: Any, block: int, function: Any) -> None:
    """`function` of the rows [0, live) of a block."""

    def call(r, carry):
        function(r)
        return carry

    pl.when(live == block)(lambda: lax.fori_loop(0, block, call, None, unroll=_SUBLANES))
    pl.when(live < block)(lambda: lax.fori_loop(0, live, call, None))


def _wait(source: Any, target: Any, live: Any, block: int, semaphore: Any) -> None:
    """Waits for the copies of `live` rows of a block; only the sizes of the references matter."""

    def wait(rows):
        pltpu.make_async_copy(source.at[pl.ds(0, rows)], target.at[pl.ds(0, rows)], semaphore).wait()

    if source.shape[0] >= block:
        pl.when(live == block)(lambda: wait(block))
    pl.when(live < block)(lambda: lax.fori_loop(0, live, lambda r, carry: wait(1), None))
