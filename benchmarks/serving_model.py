"""Times a ServingModel opened from a bundle: against a ServingFunction with the model's own code, and its start.

    python benchmarks/serving_model.py

26 tables of [10,000, 64], about 8 ids each, MLP to 128 to 1; numpy in, numpy out. The ServingFunction runs the same
tables and parameters. A start is that of a new process: opening (with all digests compared) and compiling every
shape up to a batch of 1,024, first with an empty compile cache and then with what that left behind.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleave

from jaxembed import FeatureConfig, RaggedTensor, TableConfig
from jaxembed.checkpoint import convert_to_bundle, is_bundle
from jaxembed.optimizers import SGD
from jaxembed.serve import EmbeddingForServing, ServingFunction, ServingModel, export_model
from jaxembed.train import Checkpointer, ShardedEmbedding

FEATURES, VOCABULARY, DIM, VALENCY, HIDDEN = 26, 10_000, 64, 8, 128
BATCHES = (1, 16, 128)
NAMES = [f"feature{i:02}" for i in range(FEATURES)]
CONFIG = {n: FeatureConfig(TableConfig(VOCABULARY, DIM, combiner="sum", name=n)) for n in NAMES}
LIMIT = 4 * VALENCY

_START = """
import time
begin = time.perf_counter()
from jaxembed.serve import ServingModel
imported = time.perf_counter()
model = ServingModel({bundle!r}, compile_cache={cache!r})
opened = time.perf_counter()
model.warm_up()
print(imported - begin, opened - imported, time.perf_counter() - opened, model.compile_count)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each batch size")
    parser.add_argument("--bundle", type=pathlib.Path, help="folder to make the bundle in, or to take it from")
    parser.add_argument("--only-make", action="store_true", help="make the bundle and time nothing")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.bundle or pathlib.Path(scratch) / "bundle"
        if not is_bundle(folder):
            make_bundle(pathlib.Path(scratch) / "checkpoint", folder)
        if options.only_make:
            return 0
        starts = [start(folder, pathlib.Path(scratch) / "cache") for _ in range(2)]
        print("start of a new process, seconds    import    open and verify    compile    programs")
        for name, (imported, opened, compiled, count) in zip(("first", "second"), starts, strict=True):
            print(f"  {name:<31} {imported:>8.2f} {opened:>18.2f} {compiled:>10.2f} {count:>11.0f}", flush=True)
        calls(folder, options.seconds)
    return 0


def forward(params: Any, activations: Any, dense: Any) -> jax.Array:
    """The dense model."""
    wide = jnp.concatenate([activations[name] for name in NAMES], axis=1)
    return jax.nn.relu(wide @ params["hidden"] + params["bias"]) @ params["output"]


def make_params() -> dict[str, np.ndarray]:
    """Its parameters."""
    rng, width = np.random.default_rng(0), FEATURES * DIM
    return {
        "hidden": rng.normal(0, width**-0.5, (width, HIDDEN)).astype(np.float32),
        "bias": rng.normal(0, 0.1, HIDDEN).astype(np.float32),
        "output": rng.normal(0, HIDDEN**-0.5, (HIDDEN, 1)).astype(np.float32),
    }


def make_bundle(checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """Converts a checkpoint of fresh tables."""
    embedding = ShardedEmbedding(CONFIG, SGD(0.1), jax.make_mesh((1,), ("d",)))
    params = make_params()
    with Checkpointer(checkpoint, embedding, asynchronous=False) as checkpointer:
        checkpointer.save(embedding.init(jax.random.key(0)), model=params)
    convert_to_bundle(checkpoint, folder, exported=export_model(forward, params, CONFIG, max_ids_per_row=LIMIT))


def start(bundle: pathlib.Path, cache: pathlib.Path) -> list[float]:
    """Seconds of importing, opening and compiling in a new process, and the number of programs."""
    program = _START.format(bundle=str(bundle), cache=str(cache))
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    return [float(word) for word in done.stdout.split()]


def calls(bundle: pathlib.Path, seconds: float) -> None:
    """Times whole calls, in turns."""
    model = ServingModel(bundle, max_batch_size=max(BATCHES)).warm_up()
    function = ServingFunction(
        EmbeddingForServing.restore(bundle),
        forward,
        make_params(),
        max_batch_size=max(BATCHES),
        max_ids_per_row=LIMIT,
    ).warm_up()
    print("whole call, microseconds           function    model    ratio    lookup alone")
    for batch in BATCHES:
        requests = [_request(batch, seed) for seed in range(max(4, 32 // batch))]
        if not np.allclose(model(requests[0]), function(requests[0]), rtol=1e-5, atol=1e-6):
            raise AssertionError(f"model and function disagree at a batch of {batch}")
        contenders: dict[str, Callable[..., Any]] = {
            "function": function,
            "model": model,
            "lookup": model.lookup,
        }
        programs = {
            name: lambda i, call=call, requests=requests: call(requests[i]) for name, call in contenders.items()
        }
        times = interleave(programs, len(requests), seconds, seed=batch)
        ours, theirs, alone = (times[name].median * 1e6 for name in ("model", "function", "lookup"))
        print(f"  batch {batch:<25} {theirs:>11.0f} {ours:>8.0f} {ours / theirs:>8.2f} {alone:>15.0f}")


def _request(batch: int, seed: int) -> dict[str, RaggedTensor]:
    rng = np.random.default_rng(seed)
    request = {}
    for name in NAMES:
        lengths = rng.integers(0, 2 * VALENCY + 1, batch)
        values = rng.integers(0, VOCABULARY, lengths.sum(), dtype=np.int32)
        request[name] = RaggedTensor.from_row_lengths(values, lengths)
    return request


if __name__ == "__main__":
    sys.exit(main())
