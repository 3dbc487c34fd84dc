"""What a ServingFunction computes, as functions to be traced: the lookup of packed ids, and the model on top."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxembed import bag_native, structure
from jaxembed.backends import lookup_path, use_backend
from jaxembed.combiners import CustomCombiner
from jaxembed.config import TableConfig
from jaxembed.features import FeatureInput
from jaxembed.inputs import RaggedTensor
from jaxembed.lookup import Lookup, plan_lookup, serving_embedding_lookup
from jaxembed.resident_table import ResidentTable, TableForm
from jaxembed.splits import SplitsRow

from .embedding import EmbeddingForServing, cpu_device
from .features import ServedFeature
from .ladder import Rung
from .layout import Layout


@dataclasses.dataclass(frozen=True)
class Computation:
    """Lookup and model; equal ones compile to the same programs at equal shapes.

    Attributes:
      feature_config: a structure of FeatureConfig.
      tables: the tables, in the order of the packed arguments.
      model: `model(params, activations, dense)`, or None for the activations.
      dense: by name, the shape of one row of the dense inputs.
      layout: of ids and weights in a rung's buffers.
      path: of the lookup: "native", "xla" or "auto".
      resident: forms of the tables, where the programs take their addresses in place of them; or None.
    """

    feature_config: Any
    tables: tuple[TableConfig, ...]
    model: Callable[..., Any] | None
    dense: Mapping[str, tuple[int, ...]]
    layout: Layout
    path: str
    resident: tuple[TableForm, ...] | None

    @property
    def order(self) -> list[str]:
        """Of dense inputs, which dicts that are equal may have in another one: programs keep to it."""
        return list(self.dense)

    def constants(self, embedding: EmbeddingForServing, params: Any) -> tuple[Any, Any, Any]:
        """The arguments of `packed` that are the same in every call, as few levels deep as can be."""
        tables: Any = tuple(embedding.embedding_tables.values())
        if self.resident is not None:
            tables = embedding.addresses
        return tables, embedding.combiner_weights, jax.device_put(params, cpu_device())

    def structured(
        self,
        tables: Any,
        params: Any,
        inputs: Any,
        weights: Any = None,
        dense: Any = None,
        combiner_weights: Any = None,
    ) -> Any:
        """Of inputs, weights and dense inputs as `serving_embedding_lookup` and the model take them."""
        activations = serving_embedding_lookup(
            inputs, weights, tables, self.feature_config, combiner_weights=combiner_weights
        )
        return self._apply(params, activations, dense or {})

    def packed(
        self, rung: Rung, merged: bool, constants: Any, ids: Any, splits: Any, weights: Any, dense: Any
    ) -> Any:
        """Of the buffers of a rung; the other arguments are those of `arguments`.

        Args:
          merged: whether the native kernel writes the activations side by side.
        """
        tables, combiner_weights, params = constants
        if self.resident is not None:
            tables = [ResidentTable(tables, row, form) for row, form in enumerate(self.resident)]
        tables = dict(zip(self.tables, tables, strict=True))
        named = dict(sorted(zip(self.dense, dense, strict=True)))  # as a program's argument would be
        ragged, parallel = self.layout.inputs(rung, ids, splits, weights)
        if self.layout.shared:
            lookups = _plan(self.layout.features, ragged, parallel, tables)
            operands = [item.operands._replace(bags=SplitsRow(splits, f)) for f, item in enumerate(lookups)]
            # This is CPU: the portable program need not be traced beside the kernel's.
            lookup = bag_native.merged_embedding_bags if merged else bag_native.embedding_bags
            outputs, _ = lookup([item.bag for item in lookups], operands)
            outputs = [out.reshape(item.output_shape) for out, item in zip(outputs, lookups, strict=True)]
            return self._apply(params, structure.pack(self.feature_config, iter(outputs)), named)
        inputs, weights = (structure.pack(self.feature_config, iter(leaves)) for leaves in (ragged, parallel))
        with use_backend(self.path):
            return self.structured(tables, params, inputs, weights, named, combiner_weights)

    def arguments(self, rung: Rung, constants: Any) -> list[Any]:
        """Those of `packed` beside the rung: `constants` (tables, weights of combiners, params), and shapes."""
        sharding = jax.sharding.SingleDeviceSharding(cpu_device())

        def shape(dims, dtype):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

        size = (self.layout.size(rung),)
        splits = shape((len(self.layout.features), rung.batch + 1), np.int32)
        weights = shape(size, np.float32) if self.layout.weighted else None
        dense = [shape((rung.batch, *row), np.float32) for row in self.dense.values()]
        return [constants, shape(size, np.int32), splits, weights, dense]

    def _apply(self, params, activations, dense):
        return activations if self.model is None else self.model(params, activations, dense)


def make_computation(
    embedding: EmbeddingForServing,
    features: tuple[ServedFeature, ...],
    model: Callable[..., Any] | None,
    dense: Mapping[str, tuple[int, ...]],
) -> Computation:
    """The computation that is fastest here: the native kernel's where there is one and it has all the features.

    Args:
      embedding: tables and feature configuration.
      features: in the order of the configuration.
      model: as of `Computation`.
      dense: by name, the shape of one row.
    """
    tables, path = embedding.embedding_tables, lookup_path()
    layout = Layout(features, shared=path != "xla" and _native_supports(features, tables))
    resident = None
    if layout.shared and embedding.addresses is not None:
        resident = tuple(map(TableForm.of, tables.values()))
    return Computation(embedding.feature_config, tuple(tables), model, dense, layout, path, resident)


def _plan(
    features: Sequence[ServedFeature], ids: Sequence[Any], weights: Sequence[Any], tables: Mapping[Any, Any]
) -> list[Lookup]:
    """The lookup of every feature."""
    return [
        plan_lookup(FeatureInput(f.path, f.config, i, w), tables[f.config.table])
        for f, i, w in zip(features, ids, weights, strict=True)
    ]


def _native_supports(features: Sequence[ServedFeature], tables: Mapping[Any, Any]) -> bool:
    if any(isinstance(feature.config.table.combiner, CustomCombiner) for feature in features):
        return False
    splits = jax.ShapeDtypeStruct((2,), np.int32)
    ids, weights = (RaggedTensor(jax.ShapeDtypeStruct((1,), d), splits) for d in (np.int32, np.float32))
    given = [weights if feature.weighted else None for feature in features]
    lookups = _plan(features, [ids] * len(features), given, tables)
    return bag_native.supports([item.bag for item in lookups], [item.operands for item in lookups])
