"""ServingModel: a bundle, ready to answer requests, without any of the code that trained it."""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxembed.checkpoint import Bundle, open_bundle
from jaxembed.checkpoint.vocabularies import load_vocabularies
from jaxembed.shapes import ActivationTree, AnyDenseFeatures, Inputs, Weights

from .compile_cache import compile_cache
from .embedding import EmbeddingForServing
from .exported import ExportedModel
from .exporting import PLATFORMS, activation_specs
from .exporting_whole import export_whole
from .features import DEFAULT_MAX_IDS, ServedFeature, served_features
from .function import ServingFunction
from .progress import Progress, part_of, reporter
from .signature import Signature, make_signature
from .table_memory import TABLES, in_memory

_Part = TypeVar("_Part")


class ServingModel:
    """Opens a bundle and serves it, on CPU, without ever compiling once warmed up.

        model = ServingModel("bundles").warm_up()
        scores = model({"user": [7, 9], "history": [[1, 2], []]}, dense={"dense": dense})

    The dense model is the one that `export_model` put into the bundle; of a bundle without one, the
    result is the activations. Tables are mapped, not read, and shared between processes, unless `tables` says
    otherwise. Shapes, padding and large batches are those of `ServingFunction`. Thread-safe.

    Args:
      path: of a bundle's version, or of the folder of its versions; or a Bundle that was opened.
      version: default: the latest.
      tables: "mapped", which opens at once; or "memory": copied into the process, on huge pages where the system
        has them: faster to look up in where files are cached on small pages.
      max_batch_size: rows that run at once; larger requests are split by rows.
      verify: compare the whole bundle with its digests first, which reads all of it.
      compile_cache: folder to keep compiled programs in, so that the next start is fast; whoever can write it
        decides what is run. None keeps to what JAX is configured to do.
      weighted: paths of the features for which requests may carry weights; None takes what was exported.
      max_ids_per_row: limit of ids of one row of one feature, or a dict of limits by path; None takes what
        was exported.

    Raises:
      FileNotFoundError: if there is no such version.
      CheckpointError: if the bundle is damaged.
      ValueError: if the exported model does not fit the bundle, or an argument is not of the form above.

    Examples:
      Of the checkpoint that the example of `jaxembed.train.Checkpointer` saves:

      >>> from jaxembed.checkpoint import convert_to_bundle
      >>> _ = convert_to_bundle("checkpoints", "bundles")
      >>> with ServingModel("bundles", max_batch_size=2).warm_up() as model:
      ...     model({"watched": [[0, 1], []]})["watched"].shape
      (2, 2)

    References:
      `tf.saved_model.load` and its `signatures["serving_default"]`.
    """

    def __init__(
        self,
        path: str | pathlib.Path | Bundle,
        *,
        version: int | None = None,
        tables: str = "mapped",
        max_batch_size: int = 1024,
        verify: bool = True,
        compile_cache: str | pathlib.Path | None = None,
        weighted: Iterable[str] | None = None,
        max_ids_per_row: int | Mapping[str, int] | None = None,
    ):
        bundle = path if isinstance(path, Bundle) else open_bundle(path, version)
        if tables not in TABLES:
            raise ValueError(f"tables must be one of {TABLES}, got {tables!r}.")
        if tables == "memory":
            bundle = in_memory(bundle)
        if verify:
            bundle.verify()
        load_vocabularies(bundle.feature_config)
        self._directory, self._step, self._metadata = bundle.directory, bundle.step, bundle.metadata
        self._compile_cache = compile_cache
        self._exported = exported = (
            None if bundle.exported is None else ExportedModel.from_bytes(bundle.exported)
        )
        weighted, limits = _limits(exported, weighted, max_ids_per_row)
        self._features = features = served_features(bundle.feature_config, limits, weighted)
        types = {name: np.dtype(table.dtype).name for name, table in bundle.tables.items()}
        self._signature = make_signature(features, exported, types)
        self._embedding: EmbeddingForServing = EmbeddingForServing(
            bundle.feature_config, bundle.tables, bundle.combiner_weights
        )
        options: dict[str, Any] = {"weighted": weighted, "max_ids_per_row": limits}
        options["batch_sizes"] = _batch_sizes(exported, max_batch_size)
        self._lookup: ServingFunction = ServingFunction(
            self._embedding, max_batch_size=max_batch_size, **options
        )
        self._function: ServingFunction = self._lookup
        if exported is not None:
            self._function = ServingFunction(
                self._embedding,
                exported,
                _params(bundle, exported, features),
                dense_inputs={spec.name: spec.shape for spec in exported.dense},
                max_batch_size=max_batch_size,
                **options,
            )
        self._is_closed = False

    @property
    def version(self) -> int:
        """The number of the version: the name of its folder, or else its step."""
        return int(self._directory.name) if self._directory.name.isdecimal() else self._step

    @property
    def step(self) -> int:
        """Number of training steps taken."""
        return self._step

    @property
    def metadata(self) -> dict[str, Any]:
        """What the trainer put in."""
        return dict(self._metadata)

    @property
    def signature(self) -> Signature:
        """Features, dense inputs and outputs."""
        return self._signature

    @property
    def embedding(self) -> EmbeddingForServing:
        """The tables and their feature configuration."""
        return self._open(self._embedding)

    @property
    def function(self) -> ServingFunction:
        """What runs the requests, for servers that put several together."""
        return self._open(self._function)

    @property
    def ready(self) -> bool:
        """Whether every shape is compiled, and the model is not closed."""
        functions = self._functions()
        return not self._is_closed and None not in functions and all(f.ready for f in functions)

    @property
    def compile_count(self) -> int:
        """Programs compiled so far; it does not change once `ready`."""
        return sum(self._open(function).compile_count for function in self._functions())

    @property
    def jit_function(self) -> Callable[..., Any]:
        """`f(tables, params, inputs, weights=None, dense=None)`, jitted, to embed into a jit of your own.

        Inputs are as those of `serving_embedding_lookup`: rows of the tables, of all features. Raw ids go through
        `jaxembed.preprocess(inputs, model.embedding.feature_config)` first, outside of the jit. Tables are
        `model.embedding.embedding_tables`, and params `model.params`. Both are arguments: a program that closed over
        them would hold a copy.
        """
        return self._open(self._function).jit_function

    @property
    def params(self) -> list[jax.Array] | None:
        """Parameters of the exported model, as `jit_function` takes them; None without one."""
        return self._open(self._function).params

    def warm_up(self, progress: bool | Progress = False) -> "ServingModel":
        """Compiles every shape and runs it once; with a compile cache, what it lacks.

        Args:
          progress: show a bar on stderr, or call this with the number of shapes done and of all.
        """
        report = reporter(progress)
        functions = [self._open(function) for function in self._functions()]
        done, total = 0, sum(len(function.rungs) for function in functions)
        with compile_cache(self._compile_cache):
            for function in functions:
                function.warm_up(part_of(report, done, total) if report else False)
                done += len(function.rungs)
        return self

    def __call__(
        self, inputs: Inputs, weights: Weights = None, dense: Mapping[str, AnyDenseFeatures] | None = None
    ) -> Any:
        """Serves one request of B rows; arguments and errors are those of `ServingFunction`.

        Returns:
          The outputs as numpy arrays [B, ...], structured as the model returned them.
        """
        return self._open(self._function)(inputs, weights, dense)

    def lookup(self, inputs: Inputs, weights: Weights = None) -> ActivationTree:
        """The activations alone, structured as the feature configuration: [B, D], or [B, L, D] for sequences."""
        return self._open(self._lookup)(inputs, weights)

    def export(self, batch_size: int | None = None, platforms: Sequence[str] = PLATFORMS) -> bytes:
        """Lookup and model as one StableHLO program, for processes that have JAX but not jaxembed.

            f = jax.jit(jax.export.deserialize(bytearray(artefact)).call)
            outputs = f(tables, params, inputs, weights, dense)

        All arguments are dicts: `tables` by name, [V, D] arrays, or dicts of arrays by name for quantized
        tables, as the bundle's safetensors files hold them; `params` by name, likewise; `inputs` by path of
        the feature, {"values": int32 [N] rows of its table, "row_splits": int32 [B + 1]}, N at least 1
        (what is beyond the last split is padding) and B at least 1; `weights` by path of
        the features that are weighted, float32 [N]; `dense` by name, float32 [B, ...]. Ids are not preprocessed, and
        one outside [0, V) gives zeros.

        Args:
          batch_size: None exports plain JAX for any B, which compiles once per shape. Else B, on CPU, with a call of
            the native kernel, which the process must have registered: `jax.ffi.register_ffi_target(
            "jaxembed_embedding_bags", jax.ffi.pycapsule(library.JaxembedEmbeddingBags), platform="cpu")`.
          platforms: that it can be compiled for; only "cpu" with the kernel.

        Returns:
          A serialized `jax.export.Exported`.

        Raises:
          ValueError: if the kernel is not available, or the model was exported for other batch sizes.
        """
        function, exported = self._open(self._function), self._exported
        if exported is not None and exported.batch_sizes is not None and batch_size not in exported.batch_sizes:
            raise ValueError(
                f"the model was exported for batch sizes {exported.batch_sizes}; pass one of them as batch_size, got "
                f"{batch_size}."
            )
        names = [] if exported is None else [spec.name for spec in exported.params]
        return export_whole(
            self._embedding,
            self._features,
            exported,
            dict(zip(names, function.params or (), strict=True)),
            {} if exported is None else {spec.name: spec.shape for spec in exported.dense},
            batch_size,
            platforms if batch_size is None else ("cpu",),
        )

    def close(self) -> None:
        """Releases tables and programs, once the calls under way have returned; later ones are errors."""
        self._is_closed = True
        self._function = self._lookup = self._embedding = None  # type: ignore[assignment]

    def __enter__(self) -> "ServingModel":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _functions(self) -> list[ServingFunction]:
        lookup, function = self._lookup, self._function
        return [lookup] if function is lookup else [lookup, function]

    def _open(self, part: _Part | None) -> _Part:
        if part is None:
            raise ValueError(f"the ServingModel of {self._directory} is closed; open it again.")
        return part


def _limits(
    exported: ExportedModel | None, weighted: Iterable[str] | None, limits: int | Mapping[str, int] | None
) -> tuple[list[str], int | Mapping[str, int]]:
    if isinstance(weighted, str):
        raise ValueError(f"weighted must be a list of paths of features, got {weighted!r}.")
    if weighted is None:
        weighted = () if exported is None else exported.weighted
    if exported is not None and (limits is None or isinstance(limits, Mapping)):
        limits = {**exported.limits, **(limits or {})}
    return list(weighted), DEFAULT_MAX_IDS if limits is None else limits


def _batch_sizes(exported: ExportedModel | None, largest: int) -> list[int] | None:
    if exported is None or exported.batch_sizes is None:
        return None
    sizes = [size for size in exported.batch_sizes if size <= largest]
    if not sizes:
        raise ValueError(
            f"max_batch_size must be at least {exported.batch_sizes[0]}, the smallest batch that the model was "
            f"exported for, got {largest}."
        )
    return sizes


def _params(bundle: Bundle, exported: ExportedModel, features: tuple[ServedFeature, ...]) -> list[Any]:
    """The model's parameters, once the model is known to fit the bundle."""
    expected = activation_specs(features)
    if list(exported.activations) != expected:
        wrong = [
            spec
            for spec in (*exported.activations, *expected)
            if (spec in expected) != (spec in exported.activations)
        ]
        raise ValueError(
            f"the exported model of {bundle.directory} is of another feature configuration: they differ in "
            f"{wrong[:4]}; export it with the one that the checkpoint holds."
        )
    return exported.arrange(bundle.model)
