"""torch: F.embedding_bag, and FBGEMM's table-batched embedding on CPU, each inside TorchScript."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from cells import Batch, Cell, Table
from torch import Tensor

from jaxembed.memory import aligned_empty

torch.set_num_threads(os.cpu_count() or 1)


class Torch:
    """F.embedding_bag; for int8 rows torch's own quantized embedding_bag."""

    name = "torch"
    sums_in_bfloat16 = False
    slow = False

    def refuses(self, cell: Cell) -> str | None:
        return None

    def load(self, table: Table) -> None:
        self._dtype = table.dtype
        self._table = to_torch(table.rows if table.fused is None else table.fused)

    def unload(self) -> None:
        self._table = None

    def program(self, cell: Cell, sets: list[list[Batch]], every: bool) -> Callable[[int], Any]:
        table = self._table
        weight_type = torch.bfloat16 if self._dtype == "bfloat16" else torch.float32
        inputs = [_tensors(batches, weight_type) for batches in sets]
        lookups = _scripted(_quantized_lookups if self._dtype == "int8" else _lookups)

        def run(i):
            with torch.inference_mode():
                return lookups(table, *inputs[i], every)

        return run

    def outputs(self, result: Any) -> list[np.ndarray]:
        return [from_torch(out) for out in result]


class Fbgemm:
    """IntNBitTableBatchedEmbeddingBagsCodegen, without its bounds check, which makes it slower."""

    name = "FBGEMM"
    sums_in_bfloat16 = False
    slow = False

    def refuses(self, cell: Cell) -> str | None:
        return None

    def load(self, table: Table) -> None:
        self._module = _scripted(_FbgemmLookups(fbgemm_tables([table])))

    def unload(self) -> None:
        self._module = None

    def program(self, cell: Cell, sets: list[list[Batch]], every: bool) -> Callable[[int], Any]:
        module = self._module
        inputs = [_tensors(batches, torch.float32) for batches in sets]

        def run(i):
            with torch.inference_mode():
                return module(*inputs[i], every)

        return run

    def outputs(self, result: Any) -> list[np.ndarray]:
        return [from_torch(out) for out in result]


def fbgemm_tables(tables: list[Table]) -> Any:
    """One table-batched embedding of all tables. FBGEMM has no bfloat16 rows: float16 rows stand in."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        BoundsCheckMode,
        EmbeddingLocation,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    row_types = {"float32": SparseType.FP32, "bfloat16": SparseType.FP16, "int8": SparseType.INT8}
    specs = [
        (f"table{i}", *table.rows.shape, row_types[table.dtype], EmbeddingLocation.HOST)
        for i, table in enumerate(tables)
    ]
    module = IntNBitTableBatchedEmbeddingBagsCodegen(
        specs,
        pooling_mode=PoolingMode.SUM,
        device="cpu",
        output_dtype=SparseType.BF16 if tables[0].dtype == "bfloat16" else SparseType.FP32,
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    module.initialize_weights()
    first = tables[0]
    if len(tables) == 1 and first.dtype == "float32" and module.weights_host.numel() == first.rows.nbytes:
        module.weights_host = to_torch(first.rows).view(torch.uint8).view(-1)  # in place, as ours and torch
        return module
    module.assign_embedding_weights([_fbgemm_rows(table) for table in tables])
    weights = to_torch(aligned_empty((module.weights_host.numel(),), np.uint8))  # on huge pages, as all others
    module.weights_host = weights.copy_(module.weights_host)
    return module


def to_torch(array: np.ndarray) -> Tensor:
    """The same memory as a tensor."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(tensor: Tensor) -> np.ndarray:
    """The same memory as an array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _fbgemm_rows(table: Table) -> tuple[Tensor, Tensor | None]:
    if table.scale is not None and table.bias is not None:
        parameters = np.stack([table.scale, table.bias], axis=1).astype(np.float16)
        return torch.from_numpy(table.rows), torch.from_numpy(parameters.view(np.uint8))
    rows = table.rows.astype(np.float16) if table.dtype == "bfloat16" else table.rows
    return torch.from_numpy(rows.view(np.uint8)), None


def _tensors(batches: list[Batch], weight_type: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    weights = [
        torch.from_numpy(batch.weights).to(weight_type) for batch in batches if batch.weights is not None
    ]
    ids = [torch.from_numpy(batch.ids) for batch in batches]
    return ids, [torch.from_numpy(batch.splits) for batch in batches], weights


def _scripted(program: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but is what serves without Python
        return torch.jit.script(program)


def _lookups(
    table: Tensor, ids: list[Tensor], splits: list[Tensor], weights: list[Tensor], every: bool
) -> list[Tensor]:
    outputs: list[Tensor] = []
    for k in range(len(ids)):
        if not every:
            outputs = []
        weight = weights[k] if len(weights) > 0 else None
        outputs.append(
            F.embedding_bag(
                ids[k], table, splits[k], mode="sum", per_sample_weights=weight, include_last_offset=True
            )
        )
    return outputs


def _quantized_lookups(
    table: Tensor, ids: list[Tensor], splits: list[Tensor], weights: list[Tensor], every: bool
) -> list[Tensor]:
    outputs: list[Tensor] = []
    for k in range(len(ids)):
        if not every:
            outputs = []
        weight = weights[k] if len(weights) > 0 else None
        outputs.append(
            torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
                table, ids[k], splits[k], False, 0, False, weight, None, True
            )
        )
    return outputs


class _FbgemmLookups(torch.nn.Module):
    def __init__(self, tables: Any):
        super().__init__()
        self.tables = tables

    def forward(
        self, ids: list[Tensor], splits: list[Tensor], weights: list[Tensor], every: bool
    ) -> list[Tensor]:
        outputs: list[Tensor] = []
        for k in range(len(ids)):
            if not every:
                outputs = []
            weight = weights[k] if len(weights) > 0 else None
            outputs.append(self.tables(ids[k], splits[k], weight))
        return outputs


def scripted_model(tables: list[Tensor], parameters: list[Tensor]) -> Any:
    """`f(ids, splits)`: F.embedding_bag per feature and the MLP, as one frozen TorchScript program."""
    return _frozen(_Model(tables, parameters))


def scripted_grouped_model(tables: list[Table], parameters: list[Tensor]) -> Any:
    """`f(ids, splits)`: one FBGEMM call for all features and the MLP; splits over features, then rows."""
    return _scripted(_GroupedModel(fbgemm_tables(tables), parameters).eval())


def _frozen(module: torch.nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(torch.jit.script(module.eval()))


class _Model(torch.nn.Module):
    def __init__(self, tables: list[Tensor], parameters: list[Tensor]):
        super().__init__()
        self.tables: list[Tensor] = tables
        self.hidden, self.bias, self.output = parameters

    def forward(self, ids: list[Tensor], splits: list[Tensor]) -> Tensor:
        lookups: list[Tensor] = []
        for i, table in enumerate(self.tables):
            lookups.append(F.embedding_bag(ids[i], table, splits[i], mode="sum", include_last_offset=True))
        return F.linear(F.relu(F.linear(torch.cat(lookups, 1), self.hidden, self.bias)), self.output)


class _GroupedModel(torch.nn.Module):
    def __init__(self, tables: Any, parameters: list[Tensor]):
        super().__init__()
        self.tables = tables
        self.hidden, self.bias, self.output = parameters

    def forward(self, ids: Tensor, splits: Tensor) -> Tensor:
        wide = self.tables(ids, splits, None)
        return F.linear(F.relu(F.linear(wide, self.hidden, self.bias)), self.output)
