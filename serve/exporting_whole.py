"""The whole of a served model, lookup included, as one StableHLO program that needs nothing but JAX to run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export  # not loaded by jax itself
import numpy as np

from jaxembed import kernel, structure
from jaxembed.backends import use_backend
from jaxembed.features import feature_tables
from jaxembed.inputs import RaggedTensor
from jaxembed.lookup import serving_embedding_lookup
from jaxembed.quantized_table import QuantizedTable

from .embedding import EmbeddingForServing
from .exporting import without_locations
from .features import ServedFeature


def export_whole(
    embedding: EmbeddingForServing,
    features: Sequence[ServedFeature],
    model: Any,
    params: Mapping[str, Any],
    dense: Mapping[str, tuple[int, ...]],
    batch_size: int | None,
    platforms: Sequence[str],
) -> bytes:
    """A serialized `jax.export.Exported`; `ServingModel.export` says what it takes.

    Args:
      embedding: tables and feature configuration.
      features: in the order of the configuration.
      model: `model(params, activations, dense)` with a list of parameters; None gives the activations.
      params: by name, in the order in which the model takes them.
      dense: by name, the shape of one row.
      batch_size: B, and the native kernel is called; None exports plain JAX for any B.
      platforms: that it can be compiled for.

    Raises:
      ValueError: if the kernel is asked for, but is not available.
    """
    names = list(params)
    config, weights_of_combiners = embedding.feature_config, embedding.combiner_weights
    tables = {table.name: array for table, array in embedding.embedding_tables.items()}
    if batch_size is not None and not kernel.available():
        raise ValueError(
            f"batch_size={batch_size} exports a call of the native kernel, which is not available: "
            f"{kernel.unavailable_reason()}; export without batch_size."
        )

    def whole(tables, params, inputs, weights, dense):
        restored = {name: _as_table(c, tables[name], kinds[name]) for name, c in feature_tables(config).items()}
        ids = [RaggedTensor(**inputs[f.path]) for f in features]
        parallel = [
            RaggedTensor(weights[f.path], inputs[f.path]["row_splits"]) if f.weighted else None
            for f in features
        ]
        with use_backend("xla" if batch_size is None else "native"):
            activations = serving_embedding_lookup(
                structure.pack(config, iter(ids)),
                structure.pack(config, iter(parallel)),
                restored,
                config,
                combiner_weights=weights_of_combiners,
            )
        # In a program dicts come in the order of their keys, which need not be the model's.
        return activations if model is None else model([params[name] for name in names], activations, dense)

    kinds = {name: t.kind if isinstance(t, QuantizedTable) else None for name, t in tables.items()}
    arrays = {name: t.arrays if isinstance(t, QuantizedTable) else t for name, t in tables.items()}
    sizes = [f"n{i}" for i in range(len(features))]
    symbols = jax.export.symbolic_shape(", ".join([*sizes, "b"] if batch_size is None else sizes))
    batch = symbols[len(features)] if batch_size is None else batch_size
    shape = jax.ShapeDtypeStruct
    arguments = (
        jax.tree.map(lambda a: shape(a.shape, a.dtype), arrays),
        {name: shape(a.shape, a.dtype) for name, a in params.items()},
        {
            f.path: {"values": shape((n,), np.int32), "row_splits": shape((batch + 1,), np.int32)}
            for f, n in zip(features, symbols, strict=False)
        },
        {f.path: shape((n,), np.float32) for f, n in zip(features, symbols, strict=False) if f.weighted},
        {name: shape((batch, *row), np.float32) for name, row in dense.items()},
    )
    checks = [jax.export.DisabledSafetyCheck.custom_call(kernel.TARGET)]
    with without_locations():
        exported = jax.export.export(
            jax.jit(whole), platforms=list(platforms), disabled_checks=[] if batch_size is None else checks
        )(*arguments)
    return bytes(exported.serialize())


def _as_table(config: Any, arrays: Any, kind: str | None) -> Any:
    if kind is None:
        return arrays
    return QuantizedTable(kind, config.dim, **arrays, dtype=config.dtype)
