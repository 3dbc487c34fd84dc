"""export_model: the dense model as StableHLO, so that serving needs none of its code."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export  # not loaded by jax itself
import numpy as np

from jaxembed import structure

from .dense import DenseInputs
from .exported import ArraySpec, ExportedModel, describe, flat_params
from .features import DEFAULT_MAX_IDS, ServedFeature, served_features

PLATFORMS = ("cpu", "tpu")


def export_model(
    model: Callable[[Any, Any, dict[str, jax.Array]], Any],
    params: Any,
    feature_config: Any,
    *,
    dense_inputs: Mapping[str, int | Sequence[int]] | None = None,
    weighted: Iterable[str] = (),
    max_ids_per_row: int | Mapping[str, int] = DEFAULT_MAX_IDS,
    batch_sizes: Sequence[int] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """Exports a dense model and its signature as one artefact, for `convert_to_bundle(exported=...)`.

    Neither tables nor parameters are in it: both are arguments of the program, and lie in the bundle.

    Args:
      model: `model(params, activations, dense)`, as of `ServingFunction`.
      params: its parameters: a pytree of arrays, or of ShapeDtypeStructs.
      feature_config: a structure of FeatureConfig.
      dense_inputs: by name, the shape of one row; an int K for [K].
      weighted: paths of the features for which requests may carry weights.
      max_ids_per_row: the limit of ids of one row of one feature, or a dict of such limits by path.
      batch_sizes: None exports one program for batches of any size. For models that cannot be traced so,
        rising batch sizes, of which each gets a program of its own.
      platforms: that the program can be compiled for.

    Returns:
      The artefact; `ExportedModel.from_bytes` reads it.

    Raises:
      ValueError: if the model cannot be exported, or an argument does not fit the feature configuration.

    Examples:
      >>> import jaxembed as je
      >>> from jaxembed.serve.exported import ExportedModel
      >>> movie = je.TableConfig(vocabulary_size=4, dim=2, combiner="sum", name="movie")
      >>> def model(params, activations, dense):
      ...     return activations["watched"] @ params["w"]
      >>> params = {"w": np.ones(2, np.float32)}
      >>> artefact = export_model(model, params, {"watched": je.FeatureConfig(movie)})
      >>> [spec.name for spec in ExportedModel.from_bytes(artefact).params]
      ['w']
    """
    if batch_sizes is not None and not (
        len(batch_sizes) and all(isinstance(b, int) and not isinstance(b, bool) and b >= 1 for b in batch_sizes)
    ):
        raise ValueError(f"batch_sizes must be None or ints of at least 1, got {batch_sizes!r}.")
    features = served_features(feature_config, max_ids_per_row, weighted)
    dense = DenseInputs(dense_inputs or {})
    named, treedef = flat_params(params), jax.tree.structure(params)
    recipe: dict[str, Any] = {}

    def flat(params, activations, dense_arrays):
        packed = structure.pack(feature_config, iter(activations))
        named_dense = dict(
            sorted(zip(dense.shapes, dense_arrays, strict=True))
        )  # as a program's argument would be
        leaves: list[tuple[str, Any]] = []
        recipe["tree"] = describe(model(jax.tree.unflatten(treedef, params), packed, named_dense), leaves)
        recipe["leaves"] = leaves
        return [leaf for _, leaf in leaves]

    programs: dict[int | None, bytes] = {}
    outputs: list[ArraySpec] = []
    for size in [None] if batch_sizes is None else sorted(set(batch_sizes)):
        batch = jax.export.symbolic_shape("b")[0] if size is None else size
        exported = _export(flat, _arguments(features, named, dense, batch), size, platforms)
        outputs = [
            _output(name, aval, batch)
            for (name, _), aval in zip(recipe["leaves"], exported.out_avals, strict=True)
        ]
        programs[size] = bytes(exported.serialize())
    return ExportedModel(
        params=tuple(ArraySpec(name, *_form(leaf)) for name, leaf in named.items()),
        activations=tuple(activation_specs(features)),
        dense=tuple(ArraySpec(name, shape, "float32") for name, shape in dense.shapes.items()),
        outputs=(recipe["tree"], tuple(outputs)),
        limits={feature.path: feature.max_ids for feature in features},
        weighted=tuple(feature.path for feature in features if feature.weighted),
        programs=programs,
    ).to_bytes()


@contextlib.contextmanager
def without_locations() -> Iterator[None]:
    """Programs traced inside of it name no source files: one model gives the same bytes wherever it is exported."""
    before = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def activation_specs(features: Sequence[ServedFeature]) -> list[ArraySpec]:
    """The activation of every feature, without B."""
    specs = []
    for feature in features:
        table, length = feature.config.table, feature.config.max_sequence_length
        shape = (length, table.dim) if length else (table.dim,)
        specs.append(ArraySpec(feature.path, shape, table.dtype.name))
    return specs


def _export(
    function: Callable[..., Any], arguments: list[Any], size: int | None, platforms: Sequence[str]
) -> jax.export.Exported:
    try:
        with without_locations():
            return jax.export.export(jax.jit(function), platforms=list(platforms))(*arguments)
    except Exception as e:  # whatever the model raises
        wanted = "a batch of any size" if size is None else f"a batch of {size}"
        hint = "; if its shapes must be known, pass batch_sizes=[...]" if size is None else ""
        raise ValueError(
            f"model cannot be exported for {wanted}: {type(e).__name__}: {str(e)[:500]}{hint}."
        ) from e


def _arguments(
    features: Sequence[ServedFeature], params: Mapping[str, Any], dense: DenseInputs, batch: Any
) -> list[Any]:
    shape = jax.ShapeDtypeStruct
    return [
        [shape(*_form(leaf)) for leaf in params.values()],
        [shape((batch, *spec.shape), spec.dtype) for spec in activation_specs(features)],
        [shape((batch, *row), np.float32) for row in dense.shapes.values()],
    ]


def _output(name: str, aval: Any, batch: Any) -> ArraySpec:
    shape = tuple(aval.shape)
    if not shape or shape[0] != batch or not all(isinstance(size, int) for size in shape[1:]):
        raise ValueError(
            f"model must return arrays with leading dimension B alone, got shape {shape} for B = {batch} at "
            f"output {name!r}."
        )
    return ArraySpec(name, shape[1:], aval.dtype.name)


def _form(leaf: Any) -> tuple[tuple[int, ...], str]:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype).name
