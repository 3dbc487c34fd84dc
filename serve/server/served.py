"""ServedModel: what the server needs of a model, and the one it makes of a version of a bundle."""

import dataclasses
import importlib
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxembed import structure
from jaxembed.checkpoint import Bundle, open_bundle
from jaxembed.names import UnregisteredError
from jaxembed.quantized_table import QuantizedTable
from jaxembed.serve.compile_cache import compile_cache
from jaxembed.serve.exported import ExportedModel
from jaxembed.serve.features import DEFAULT_MAX_IDS, served_features
from jaxembed.serve.function import ServingFunction
from jaxembed.serve.model import ServingModel
from jaxembed.serve.rows import Rows
from jaxembed.serve.table_memory import copy_arrays, in_memory

from .config import ServerConfig
from .errors import OptionError
from .native_reader import NativeReader, make_reader
from .request import Flat
from .request_packer import RequestPacker
from .shared_tables import shared_tables
from .signature import Output, Signature, check_names
from .tensors import DATATYPES


@dataclasses.dataclass(frozen=True)
class TableInfo:
    """A table, for people: its name, shape, type as stored and size."""

    name: str
    shape: tuple[int, int]
    dtype: str
    num_bytes: int


class ServedModel(Protocol):
    """One version of a model, ready to run."""

    version: int
    digest: str
    signature: Signature
    tables: tuple[TableInfo, ...]
    loaded_seconds: float
    #: Reads the usual requests fast; None leaves all of them to Python.
    reader: "NativeReader | None"

    def pack(
        self, inputs: Mapping[str, Any] | Flat, weights: Mapping[str, Any], dense: Mapping[str, Any]
    ) -> Rows:
        """Reads and checks a request; by path of the feature. Raises RequestError."""
        ...

    def run(self, parts: Sequence[Rows]) -> tuple[list[np.ndarray], int]:
        """The outputs for the rows of all parts, in the order of the signature, and the rows computed."""
        ...


class BundleModel:
    """A version of a bundle, its tables mapped or in memory, compiled.

    Args:
      config: of the server.
      version: of the bundle.
      previous: a version that serves; its compiled programs are used again where they fit.

    Raises:
      ValueError: if the version is damaged, or the model cannot be made.
      OptionError: if the options of the server do not fit it, requests could not tell its inputs apart, or an output
        is of a type that cannot be answered.
      FileNotFoundError: if it is not there.
    """

    def __init__(self, config: ServerConfig, version: int, previous: "ServedModel | None" = None):
        begin = time.monotonic()
        bundle = _open(config, version)
        _check_options(config, bundle)
        if config.verify:
            # Beside a version that serves on this thread alone, whose pace is set by who called.
            bundle.verify(rest=None if previous is None else 0.0)
        opened = ServingModel(
            bundle,
            max_batch_size=config.max_batch_rows,
            verify=False,
            weighted=_weighted(config, bundle),
            max_ids_per_row=config.max_ids_per_row,
        )
        self._function = opened.function if config.model is None else _with_model(config, opened, bundle)
        check_names([feature.path for feature in self._function.features], self._function.dense_shapes)
        if isinstance(previous, BundleModel):
            self._function.share_programs(previous._function)
        with compile_cache(config.compiled):
            self._function.warm_up()
        self._feature_config = bundle.feature_config
        self.version: int = version
        self.digest: str = bundle.digest
        features, dense = {f.path: f for f in self._function.features}, self._function.dense_shapes
        self.signature: Signature = Signature(
            features, dense, self._outputs(dense), config.max_queue_rows, self._function.takes_flat
        )
        self._packer = RequestPacker(self.signature)
        self.reader: NativeReader | None = make_reader(self.signature)
        self.tables: tuple[TableInfo, ...] = tuple(
            _table_info(name, table) for name, table in bundle.tables.items()
        )
        self.loaded_seconds: float = time.monotonic() - begin

    @property
    def compile_count(self) -> int:
        """Programs compiled; those of the previous version are not."""
        return self._function.compile_count

    def pack(
        self, inputs: Mapping[str, Any] | Flat, weights: Mapping[str, Any], dense: Mapping[str, Any]
    ) -> Rows:
        """What `RequestPacker.pack` of the signature gives."""
        return self._packer.pack(inputs, weights, dense)

    def run(self, parts: Sequence[Rows]) -> tuple[list[np.ndarray], int]:
        """Runs the rows of all parts at once.

        Returns:
          The outputs, in the order of the signature, and the number of rows computed, padding included.
        """
        rows = sum([part.packed.rows for part in parts])
        return jax.tree.leaves(self._function.run(*parts)), self._function.padded_size(rows)

    def _outputs(self, dense: Mapping[str, tuple[int, ...]]) -> tuple[Output, ...]:
        nothing = structure.pack(self._feature_config, iter([[[]]] * len(self._function.features)))
        zeros = {name: np.zeros((1, *shape), np.float32) for name, shape in dense.items()}
        leaves = jax.tree.leaves_with_path(self._function(nothing, None, zeros))
        outputs = tuple(
            Output(_join(path) or "output", leaf.shape[1:], np.dtype(leaf.dtype)) for path, leaf in leaves
        )
        for output in outputs:
            if output.dtype not in DATATYPES.values():
                raise OptionError(
                    f"output {output.name!r} of the model must be of one of {list(DATATYPES)}, got {output.dtype}; "
                    "cast it in the model."
                )
        return outputs


def _open(config: ServerConfig, version: int) -> Bundle:
    try:
        bundle = open_bundle(config.directory, version)
    except UnregisteredError as e:
        raise OptionError(str(e)) from e
    if config.tables == "mapped":
        return bundle
    shared = None if config.state is None else shared_tables(pathlib.Path(config.state).absolute())
    return in_memory(bundle, copy_arrays if shared is None else shared.copy)


def _check_options(config: ServerConfig, bundle: Bundle) -> None:
    limit = DEFAULT_MAX_IDS if config.max_ids_per_row is None else config.max_ids_per_row
    try:
        served_features(bundle.feature_config, limit, config.weighted)
    except ValueError as e:
        raise OptionError(f"the options do not fit this version: {e}") from e


def _weighted(config: ServerConfig, bundle: Bundle) -> set[str] | None:
    """What was exported so, and what the command line adds; None where it adds nothing."""
    if not config.weighted or bundle.exported is None:
        return set(config.weighted) or None
    return {*config.weighted, *ExportedModel.from_bytes(bundle.exported).weighted}


def _with_model(config: ServerConfig, opened: ServingModel, bundle: Bundle) -> ServingFunction:
    """The bundle's parameters under a model that the command line names."""
    assert config.model is not None
    return ServingFunction(
        opened.embedding,
        find_model(config.model),
        bundle.model,
        dense_inputs=config.dense_inputs,
        weighted=config.weighted,
        max_batch_size=config.max_batch_rows,
        max_ids_per_row=DEFAULT_MAX_IDS if config.max_ids_per_row is None else config.max_ids_per_row,
    )


def find_model(name: str) -> Callable[..., Any]:
    """The function "MODULE:NAME".

    Raises:
      ValueError: if there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"model {name!r} cannot be imported: {e}.") from e
    if not callable(found):
        raise ValueError(f"model {name!r} must be callable, got {type(found).__name__}.")
    return found


def _join(path: Sequence[Any]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _table_info(name: str, table: Any) -> TableInfo:
    if isinstance(table, QuantizedTable):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(table))
        return TableInfo(name, (table.codes.shape[0], table.dim), table.kind, size)
    return TableInfo(name, tuple(table.shape), table.dtype.name, table.nbytes)
