"""ServingFunction: requests of any size through a bounded set of compiled shapes."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxembed.shapes import HostIds, HostLengths, Inputs, Weights

from .arrays import own
from .buffers import Buffers, Pool
from .compiling import Compiler
from .computation import make_computation
from .dense import DenseInputs
from .embedding import EmbeddingForServing
from .features import DEFAULT_MAX_IDS, ServedFeature, served_features
from .ladder import Rung, make_ladder
from .layout import pack_alone
from .native_packing import NativePacker, merge
from .packing import Packer, Request
from .program import Program
from .progress import Progress, reporter
from .rows import Rows, concatenate
from .structures import Reader


class ServingFunction:
    """Looks a request up and runs a model on it, on CPU, without ever compiling once warmed up.

        serve = ServingFunction(embedding, model, params, dense_inputs={"dense": 13})
        serve.warm_up()
        scores = serve({"user": [7, 9], "history": [[1, 2], []]}, dense={"dense": dense})

    A request is padded to a rung of a ladder of shapes: batch sizes 1, 2, 3, 4, 6, 8, 12, ... in steps of
    at most 1.5. With the native kernel, padding of ids costs nothing, and there is one rung for each batch size.
    The plain JAX path (and custom combiners) look padding up as well and are slower to compile: batch sizes
    there come in steps of 4, each at two row lengths. Batches above the largest are split by rows.
    Thread-safe.

    A process that does nothing but serve should call `jax.config.update("jax_cpu_enable_async_dispatch", False)` before
    anything else of JAX, as `jaxembed serve` does: calls then compute in the calling thread, and a batch of few rows takes
    up to a quarter less time.

    The results are those of `serving_embedding_lookup` for the same ids, where a list of lists is a
    RaggedTensor. The model sees padded rows, too (zeros), so its rows must not depend on each other.

    Args:
      embedding: the tables and their feature configuration.
      model: `model(params, activations, dense)` to a pytree of arrays with leading dimension B, where
        activations are structured as the feature configuration, [B, D] ([B, L, D] for sequences), and
        `dense` is a dict of [B, ...] float32 arrays. None returns the activations.
      params: the model's parameters, a pytree of arrays.
      dense_inputs: by name, the shape of one row; an int K for [K].
      weighted: paths of the features for which requests may carry weights, such as "user/history".
      max_batch_size: rows that run at once.
      max_ids_per_row: the limit of ids of one row of one feature, or a dict of such limits by path (128
        for paths that it lacks). Sequences are cut to their max_sequence_length instead.
      batch_sizes: rising batch sizes, instead of the ladder up to `max_batch_size`.
      row_lengths: rising numbers of ids per row that there is room for on average, instead of the ones
        above; the limits are added.

    Raises:
      ValueError: if an argument does not fit the feature configuration or the others, or a feature has
        an output_shape (of a fixed batch size, while requests are of any).

    Examples:
      >>> import jaxembed as je
      >>> movie = je.TableConfig(vocabulary_size=4, dim=2, combiner="sum", name="movie")
      >>> features = {"watched": je.FeatureConfig(movie)}
      >>> rows = np.arange(8, dtype=np.float32).reshape(4, 2)
      >>> embedding = EmbeddingForServing(features, {"movie": rows})
      >>> def model(params, activations, dense):
      ...     return activations["watched"] @ params + dense["bias"][:, 0]
      >>> serve = ServingFunction(embedding, model, np.ones(2, np.float32), dense_inputs={"bias": 1}, max_batch_size=2)
      >>> serve.warm_up()({"watched": [[0, 1], []]}, dense={"bias": [[0.5], [0.5]]}).tolist()
      [6.5, 0.5]
    """

    def __init__(
        self,
        embedding: EmbeddingForServing,
        model: Callable[[Any, Any, dict[str, jax.Array]], Any] | None = None,
        params: Any = None,
        *,
        dense_inputs: Mapping[str, int | Sequence[int]] | None = None,
        weighted: Iterable[str] = (),
        max_batch_size: int = 1024,
        max_ids_per_row: int | Mapping[str, int] = DEFAULT_MAX_IDS,
        batch_sizes: Sequence[int] | None = None,
        row_lengths: Sequence[int] | None = None,
    ):
        self._dense = DenseInputs(dense_inputs or {})
        if self._dense.shapes and model is None:
            raise ValueError(f"dense_inputs {list(self._dense.shapes)} need a model, got model=None.")
        features = served_features(embedding.feature_config, max_ids_per_row, weighted)
        self._packer, self._native = Packer(features), NativePacker(features)
        self._reader = Reader(embedding.feature_config)
        self._computation = make_computation(embedding, features, model, self._dense.shapes)
        self._constants = self._computation.constants(embedding, params)
        self._compiler, self._layout = Compiler(self._computation), self._computation.layout
        self._limits = [feature.max_ids for feature in features]
        self._ladder = make_ladder(
            max(self._limits), max_batch_size, batch_sizes, row_lengths, self._layout.shared
        )
        self._layout.check(self._ladder)
        self._programs: dict[Rung, Program] = {}
        self._pool = Pool(self._layout, self._ladder, self._dense.shapes.values())
        self._lock = threading.Lock()
        self._compile_count = 0
        self._jit_function = jax.jit(self._computation.structured)

    @property
    def features(self) -> tuple[ServedFeature, ...]:
        """The features with their limits, in the order of the feature configuration."""
        return self._packer.features

    @property
    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """By name, the shape of one row of the dense inputs."""
        return dict(self._dense.shapes)

    @property
    def rungs(self) -> list[Rung]:
        """The shapes that are compiled."""
        return list(self._ladder)

    @property
    def compile_count(self) -> int:
        """Programs compiled so far; it stays at `len(rungs)` after `warm_up`."""
        return self._compile_count

    @property
    def ready(self) -> bool:
        """Whether every rung is compiled."""
        return len(self._programs) == len(self._ladder)

    @property
    def params(self) -> Any:
        """The model's parameters, on CPU."""
        return self._constants[2]

    @property
    def jit_function(self) -> Callable[..., Any]:
        """`f(tables, params, inputs, weights=None, dense=None, combiner_weights=None)`, jitted.

        To embed into a jit of your own. Inputs are as those of `serving_embedding_lookup`: rows of the tables, of
        all features that the model takes; raw ids go through `jaxembed.preprocess` first, outside of the jit. `tables`
        are by TableConfig or by name.
        """
        return self._jit_function

    def warm_up(self, progress: bool | Progress = False) -> "ServingFunction":
        """Compiles every rung and runs it once; what another function compiled and ran is done.

        Args:
          progress: show a bar on stderr, or call this with the number of rungs done and of all.
        """
        report = reporter(progress)
        for done, rung in enumerate(self._ladder):
            if report:
                report(done, len(self._ladder))
            if rung in self._programs:
                continue
            buffers = self._pool.take(rung)
            for array in (buffers.splits, *buffers.dense):
                array[...] = 0
            self._run(rung, rung.batch, buffers)
        if report:
            report(len(self._ladder), len(self._ladder))
        return self

    def __call__(self, inputs: Inputs, weights: Weights = None, dense: Mapping[str, Any] | None = None) -> Any:
        """Serves one request of B rows.

        Args:
          inputs: structured as the feature configuration; at each leaf B bags of ids: a list of lists of
            ints, a RaggedTensor, a SparseTensor of rank 2, or what `jaxembed.as_input` makes one of; or
            one id a row: a list of ints or an integer array [B], which of a sequence feature are sequences of one.
          weights: None, or structured as `inputs`, with weights for some features of the kind of their
            ids (lists of lists of numbers for lists), None or nothing for others.
          dense: by name, [B, ...] arrays or lists of numbers.

        Returns:
          The model's result as numpy arrays, which are read-only; without a model, the activations.

        Raises:
          ValueError: naming the feature, row, position, id and limit, if the request is not of the form
            above, an id lies outside [0, V), or a number is not finite.
        """
        leaves = self._reader.inputs(inputs)
        if weights is None and self._layout.shared:
            rows = self._native.rows(leaves)
            if rows is not None and rows <= self._ladder.batch_sizes[-1]:
                rung = self._ladder.rung(rows, (), ())
                buffers = self._pool.take(rung)
                if self._native.write(leaves, rows, buffers):
                    buffers.write_dense(self._dense.read(dense, rows), rows)
                    return self._run(rung, rows, buffers)
                self._pool.give(rung, buffers)
        request, arrays = self._measure(leaves, weights, dense)
        rows = request.rows
        if rows > self._ladder.batch_sizes[-1]:
            return self.run(Rows(pack_alone(self._packer, request), arrays))
        rung = self._rung(rows, request)
        buffers = self._pool.take(rung)
        self._layout.write(self._packer, request, rung, buffers)
        buffers.write_dense(arrays, rows)
        return self._run(rung, rows, buffers)

    def pack(self, inputs: Any, weights: Any = None, dense: Mapping[str, Any] | None = None) -> Rows:
        """Reads and checks one request, to be `run` alone or with others; arrays that it came in may change by then.

        Args and Raises are those of a call.
        """
        request, arrays = self._measure(self._reader.inputs(inputs), weights, dense, keep=True)
        return Rows(pack_alone(self._packer, request), arrays)

    @property
    def takes_flat(self) -> bool:
        """Whether `pack_flat` may be used: no feature is a sequence or takes raw ids."""
        return self._packer.takes_flat

    def pack_flat(self, ids: HostIds, lengths: HostLengths, dense: Mapping[str, Any] | None = None) -> Rows:
        """`pack` for features that lie one after the other, which costs the same for any number of them.

        Args:
          ids: [N] int32 or int64, feature by feature in the order of `jaxembed.structure.flatten`.
          lengths: [F, B], of every bag; they add up to N.
          dense: as in a call.

        Raises:
          ValueError: if ids and lengths do not fit each other or the features, a row is too long, an id not in [0, V),
            or a number not finite.
        """
        packed = self._packer.pack_flat(own(ids), lengths)
        return Rows(packed, self._dense.read(dense, packed.rows, keep=True))

    def run(self, first_part: Rows, *further: Rows) -> Any:
        """Serves rows that were packed by this function, one part after the other; what a call returns for them."""
        parts = (first_part, *further)
        total, largest = sum([part.packed.rows for part in parts]), self._ladder.batch_sizes[-1]
        if self._layout.shared and total <= largest:
            rung = self._ladder.rung(total, (), ())
            buffers = self._pool.take(rung)
            if merge(parts, buffers):
                return self._run(rung, total, buffers)
            self._pool.give(rung, buffers)
        rows = concatenate(parts)
        packed, results = rows.packed, []
        for first in range(0, max(total, 1), largest):
            last = min(first + largest, total)
            counts = packed.splits[:, last] - packed.splits[:, first]
            rung = self._ladder.rung(last - first, counts.tolist(), self._limits)
            buffers = self._pool.take(rung)
            self._layout.copy(packed, first, last, rung, buffers)
            buffers.write_dense([array[first:last] for array in rows.dense], last - first)
            results.append(self._run(rung, last - first, buffers))
        return results[0] if len(results) == 1 else jax.tree.map(_concatenated, *results)

    def padded_size(self, rows: int) -> int:
        """The rows that are computed for a batch of `rows`: those of its rungs."""
        return self._ladder.padded_size(rows)

    def share_programs(self, other: "ServingFunction") -> bool:
        """Takes the programs that `other` compiled, if this function would compile the same ones.

        They are the same if only values of tables and parameters differ, as between versions of one model.

        Returns:
          Whether they are the same.
        """
        mine, theirs = (
            (f._computation, f._computation.order, f._ladder, _shapes_of(f._constants)) for f in (self, other)
        )
        if mine != theirs:
            return False
        with self._lock:
            self._compiler, self._programs = other._compiler, {**other._programs, **self._programs}
        return True

    def _measure(
        self, leaves: Any, weights: Any, dense: Any, keep: bool = False
    ) -> tuple[Request, list[np.ndarray]]:
        request = self._packer.measure(leaves, None if weights is None else self._reader.weights(weights))
        return request, self._dense.read(dense, request.rows, keep=keep)

    def _rung(self, rows: int, request: Request) -> Rung:
        if len(self._ladder.row_lengths) == 1:
            return self._ladder.rung(rows, (), ())
        counts = np.zeros(len(self._limits), np.int64)
        counts[request.order] = request.lengths.sum(axis=1)
        return self._ladder.rung(rows, counts.tolist(), self._limits)

    def _run(self, rung: Rung, rows: int, buffers: Buffers) -> Any:
        program = self._programs.get(rung) or self._program(rung)
        result = program(rows, self._constants, *buffers.operands)
        # Nothing reads the buffers any more, now that the outputs are there.
        self._pool.give(rung, buffers)
        return result

    def _program(self, rung: Rung) -> Program:
        with self._lock:
            if rung not in self._programs:
                self._programs[rung] = self._compiler.compile(rung, self._constants)
                self._compile_count += 1
            return self._programs[rung]


def _concatenated(*parts: np.ndarray) -> np.ndarray:
    whole = np.concatenate(parts)
    whole.flags.writeable = False  # as the results of one program are
    return whole


def _shapes_of(constants: Any) -> Any:
    leaves, treedef = jax.tree.flatten(constants)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]
