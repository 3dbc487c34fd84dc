"""TensorFlow's serving_embedding_lookup inside tf.function, for ragged and for sparse inputs."""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from cells import Batch, Cell, Table

tf.get_logger().setLevel("ERROR")
tf.config.threading.set_intra_op_parallelism_threads(os.cpu_count() or 1)
tf.config.set_visible_devices([], "GPU")
embedding = tf.tpu.experimental.embedding


def tensorflow_peers() -> list["TensorFlow"]:
    """Both layouts, on one copy of the table."""
    variable = _Variable()
    return [TensorFlow("ragged", variable), TensorFlow("sparse", variable)]


class _Variable:
    """The table as a variable, made once for both layouts."""

    def __init__(self):
        self._rows, self._variable = None, None

    def of(self, rows: np.ndarray) -> Any:
        if self._rows is not rows:
            self.drop()
            self._rows, self._variable = rows, tf.Variable(rows, trainable=False)
        return self._variable

    def drop(self) -> None:
        self._rows, self._variable = None, None


class TensorFlow:
    """One layout of inputs ("ragged" or "sparse")."""

    sums_in_bfloat16 = True
    slow = True

    def __init__(self, layout: str, variable: _Variable):
        self.name, self._sparse, self._variable = f"TensorFlow, {layout}", layout == "sparse", variable

    def refuses(self, cell: Cell) -> str | None:
        if cell.dtype == "int8":
            return "serving_embedding_lookup has no quantized tables"
        if cell.dtype == "bfloat16" and cell.weighted:
            return "raises on bfloat16 tables with weights"
        return None

    def load(self, table: Table) -> None:
        if table.dtype == "int8":
            return
        vocabulary, dim = table.rows.shape
        config = embedding.FeatureConfig(
            table=embedding.TableConfig(vocabulary, dim, combiner="sum", name="table")
        )
        self._lookups: Any = _lookups_function(config, self._variable.of(table.rows), self._sparse)

    def unload(self) -> None:
        self._lookups = None
        self._variable.drop()

    def program(self, cell: Cell, sets: list[list[Batch]], every: bool) -> Callable[[int], Any]:
        del every  # costs it little, and another trace would cost a lot
        inputs = [self._tensors(batches) for batches in sets]
        lookups = self._lookups(len(sets[0]), cell.weighted)

        def run(i):
            outputs = lookups(*inputs[i])
            outputs[-1].numpy()  # on CPU a view: waits, copies nothing
            return outputs

        return run

    def outputs(self, result: Any) -> list[np.ndarray]:
        return [out.numpy() for out in result]

    def _tensors(self, batches: list[Batch]) -> tuple[list, list, list]:
        ids = [tf.constant(batch.ids) for batch in batches]
        weights = [tf.constant(batch.weights) for batch in batches if batch.weights is not None]
        if not self._sparse:
            return ids, [tf.constant(batch.splits) for batch in batches], weights
        return ids, [tf.constant(_indices(batch)) for batch in batches], weights


def _indices(batch: Batch) -> np.ndarray:
    columns = np.arange(batch.ids.size) - batch.splits[batch.rows]
    # The last row carries the batch size, so that shapes stay tensors and one trace serves all cells.
    size = (batch.splits.size - 1, max(1, int(np.diff(batch.splits).max(initial=1))))
    return np.concatenate([np.stack([batch.rows, columns], axis=1), [size]]).astype(np.int64)


def _lookups_function(config: Any, table: Any, sparse: bool) -> Callable[[int, bool], Callable[..., Any]]:
    """By the number of lookups and whether they have weights, one program for batches of any size: tracing is slow."""

    def tensor(values, place):
        if sparse:
            return tf.SparseTensor(place[:-1], values, place[-1])
        return tf.RaggedTensor.from_row_splits(values, place, validate=False)

    @functools.cache
    def program(count: int, weighted: bool) -> Callable[..., Any]:
        place = tf.TensorSpec([None, 2], tf.int64) if sparse else tf.TensorSpec([None], tf.int32)
        signature = [
            [tf.TensorSpec([None], tf.int32)] * count,
            [place] * count,
            [tf.TensorSpec([None], tf.float32)] * (count if weighted else 0),
        ]

        @tf.function(autograph=False, input_signature=signature)
        def lookups(ids, places, weights):
            outputs = []
            for k in range(count):
                with tf.control_dependencies(outputs[-1:]):  # one after another, as everybody
                    inputs = [tensor(ids[k], places[k])]
                    weight = [tensor(weights[k], places[k])] if weighted else None
                    outputs += embedding.serving_embedding_lookup(
                        inputs, weight, {config.table: table}, [config]
                    )
            return outputs

        return lookups

    return program


def model_function(tables: list[np.ndarray], parameters: Any) -> Callable[..., Any]:
    """`f(ids, splits)`: serving_embedding_lookup of ragged features and the MLP; numpy arrays in."""
    configs = [
        embedding.FeatureConfig(table=embedding.TableConfig(*rows.shape, combiner="sum", name=f"table{i}"))
        for i, rows in enumerate(tables)
    ]
    variables = {
        config.table: tf.Variable(rows, trainable=False) for config, rows in zip(configs, tables, strict=True)
    }
    hidden, bias, output = (tf.Variable(parameter, trainable=False) for parameter in parameters)
    one = [tf.TensorSpec([None], tf.int32)] * len(tables)

    @tf.function(autograph=False, input_signature=[one, one])
    def forward(ids, splits):
        inputs = [
            tf.RaggedTensor.from_row_splits(values, place, validate=False)
            for values, place in zip(ids, splits, strict=True)
        ]
        lookups = embedding.serving_embedding_lookup(inputs, None, variables, configs)
        return tf.nn.relu(tf.concat(lookups, 1) @ hidden + bias) @ output

    return forward
