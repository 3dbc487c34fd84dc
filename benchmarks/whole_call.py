"""The whole ranking call: 26 features and a two-layer MLP, numpy in, numpy out."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from cells import Batch, Cell, Ids, make_sets, make_table
from timing import Timing, interleave

OURS = "jaxembed"
Call = Callable[[list[Batch]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class WholeCall:
    """F tables of [V, D], one feature each with `valency` ids a row in the mean, MLP F D -> hidden -> 1."""

    features: int = 26
    vocabulary: int = 100_000
    dim: int = 64
    valency: int = 8
    hidden: int = 128
    batches: tuple[int, ...] = (1, 16, 128, 1024)
    seconds: float = 8.0
    requests: int = 256


@dataclasses.dataclass(frozen=True)
class WholeCallResult:
    """Seconds by (batch size, contender), what is left out and why, and outputs that disagree."""

    spec: WholeCall
    timings: dict[tuple[int, str], Timing]
    left_out: dict[str, str]
    wrong: list[str]


class Model:
    """Tables and parameters that all contenders share."""

    def __init__(self, spec: WholeCall, seed: int = 3):
        rng = np.random.default_rng(seed)
        self.tables = [make_table("float32", spec.vocabulary, spec.dim, seed + i) for i in range(spec.features)]
        width = spec.features * spec.dim
        self.hidden = rng.normal(0, width**-0.5, (width, spec.hidden)).astype(np.float32)
        self.hidden_bias = rng.normal(0, 0.1, spec.hidden).astype(np.float32)
        self.output = rng.normal(0, spec.hidden**-0.5, (spec.hidden, 1)).astype(np.float32)

    @property
    def parameters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights [F D, hidden], bias [hidden] and weights [hidden, 1]."""
        return self.hidden, self.hidden_bias, self.output


def measure_whole_call(
    spec: WholeCall, only: list[str] | None = None, synchronous: bool = True
) -> WholeCallResult:
    """Checks that all contenders agree and times them in turn at each batch size.

    Run it in a process of its own, where jax has done nothing yet.

    Args:
      only: of "torch", "FBGEMM" and "TensorFlow", those that are wanted; default: all.
      synchronous: compute in the calling thread, as `jaxembed serve` does, instead of JAX's default.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", not synchronous)
    model = Model(spec)
    contenders, left_out = _contenders(spec, model, only)
    timings, wrong = {}, []
    for batch in spec.batches:
        requests = _requests(spec, batch)
        programs = {}
        expected = _reference(model, requests[0])
        for name, call in contenders.items():
            got = call(requests[0])
            if got.shape != (batch, 1) or not np.allclose(got, expected, rtol=1e-4, atol=1e-4):
                wrong.append(f"{name}, whole call at B={batch}")
                continue
            programs[name] = lambda i, call=call, requests=requests: call(requests[i])
        if programs:
            # Long turns: torch's second thread uses 2 to 4.5 ms of a core after a call, waiting for the next one.
            times = interleave(
                programs, len(requests), spec.seconds, seed=batch, rounds=30, turn=0.05, warm=0.025
            )
            timings |= {(batch, name): timing for name, timing in times.items()}
    return WholeCallResult(spec, timings, left_out, wrong)


def _requests(spec: WholeCall, batch: int) -> list[list[Batch]]:
    """As many different requests as `spec.requests`, each a batch for every feature."""
    cell = Cell("float32", spec.vocabulary, spec.dim, batch, spec.valency, False, "uniform")
    return make_sets(cell, Ids(spec.vocabulary, "uniform"), max(4, spec.requests // batch), spec.features)


def _reference(model: Model, request: list[Batch]) -> np.ndarray:
    from peers import numpy_lookup

    lookups = [numpy_lookup(table, batch) for table, batch in zip(model.tables, request, strict=True)]
    hidden = np.concatenate(lookups, axis=1) @ model.hidden + model.hidden_bias
    return np.maximum(hidden, 0) @ model.output


def _contenders(
    spec: WholeCall, model: Model, only: list[str] | None
) -> tuple[dict[str, Call], dict[str, str]]:
    builders: dict[str, tuple[str, list[str], Callable[[WholeCall, Model], Call]]] = {
        OURS: (OURS, [], _ours),
        "torch, eager": ("torch", ["torch"], _torch_eager),
        "torch, TorchScript": ("torch", ["torch"], _torch_scripted),
        "torch, FBGEMM": ("FBGEMM", ["torch", "fbgemm_gpu"], _torch_grouped),
        "TensorFlow": ("TensorFlow", ["tensorflow"], _tensorflow),
    }
    contenders, left_out = {}, {}
    for name, (peer, modules, build) in builders.items():
        if only is not None and peer not in (OURS, *only):
            continue
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            left_out[name] = f"{' and '.join(missing)} not installed"
        else:
            contenders[name] = build(spec, model)
    return contenders, left_out


def _ours(spec: WholeCall, model: Model) -> Call:
    import jax
    import jax.numpy as jnp

    from jaxembed import FeatureConfig, RaggedTensor, TableConfig
    from jaxembed.serve import EmbeddingForServing, ServingFunction

    names = [f"feature{i:02}" for i in range(spec.features)]
    configs = {
        name: FeatureConfig(TableConfig(spec.vocabulary, spec.dim, combiner="sum", name=name)) for name in names
    }
    tables = {name: table.rows for name, table in zip(names, model.tables, strict=True)}

    def forward(parameters, activations, dense):
        hidden, bias, output = parameters
        wide = jnp.concatenate([activations[name] for name in names], axis=1)
        return jax.nn.relu(wide @ hidden + bias) @ output

    embedding = EmbeddingForServing(configs, tables)
    serve = ServingFunction(
        embedding, forward, model.parameters, max_batch_size=max(spec.batches), max_ids_per_row=4 * spec.valency
    ).warm_up()

    def call(request):
        return serve({name: RaggedTensor(b.ids, b.splits) for name, b in zip(names, request, strict=True)})

    return call


def _torch_parameters(model: Model) -> tuple[list, list]:
    import torch
    from peers_torch import to_torch

    torch.set_num_threads(os.cpu_count() or 1)
    hidden, bias, output = model.parameters
    # As nn.Linear keeps them: [out, in].
    parameters = [to_torch(hidden.T.copy()), to_torch(bias), to_torch(output.T.copy())]
    return [to_torch(table.rows) for table in model.tables], parameters


def _torch_eager(spec: WholeCall, model: Model) -> Call:
    import torch
    import torch.nn.functional as F

    tables, (hidden, bias, output) = _torch_parameters(model)

    def call(request):
        with torch.inference_mode():
            lookups = [
                F.embedding_bag(
                    torch.from_numpy(b.ids),
                    table,
                    torch.from_numpy(b.splits),
                    mode="sum",
                    include_last_offset=True,
                )
                for b, table in zip(request, tables, strict=True)
            ]
            return F.linear(F.relu(F.linear(torch.cat(lookups, 1), hidden, bias)), output).numpy()

    return call


def _torch_scripted(spec: WholeCall, model: Model) -> Call:
    import torch
    from peers_torch import scripted_model

    forward = scripted_model(*_torch_parameters(model))

    def call(request):
        with torch.inference_mode():
            ids = [torch.from_numpy(batch.ids) for batch in request]
            return forward(ids, [torch.from_numpy(batch.splits) for batch in request]).numpy()

    return call


def _torch_grouped(spec: WholeCall, model: Model) -> Call:
    """All tables in one FBGEMM table-batched call, as TorchRec serves them."""
    import torch
    from peers_torch import scripted_grouped_model

    _, parameters = _torch_parameters(model)
    forward = scripted_grouped_model(model.tables, parameters)

    def call(request):
        ids = np.concatenate([batch.ids for batch in request])
        splits = np.zeros(len(request) * (request[0].splits.size - 1) + 1, np.int32)
        np.cumsum(np.concatenate([np.diff(batch.splits) for batch in request]), out=splits[1:])
        with torch.inference_mode():
            return forward(torch.from_numpy(ids), torch.from_numpy(splits)).numpy()

    return call


def _tensorflow(spec: WholeCall, model: Model) -> Call:
    from peers_tensorflow import model_function

    forward = model_function([table.rows for table in model.tables], model.parameters)

    def call(request: list[Batch]) -> Any:
        return forward([batch.ids for batch in request], [batch.splits for batch in request]).numpy()

    return call
