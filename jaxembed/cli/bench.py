"""Times one lookup on this machine's CPU: the native kernel, plain JAX, and torch and TensorFlow where installed.

jaxembed bench --vocabulary 100000 --dim 64

A quick look, of ragged sums of float32 rows; benchmarks/lookup.py in the source tree has the full grid.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxembed as je
from jaxembed import kernel

_NUM_BATCHES = 8
_SETTLE = 10e-3  # seconds; OpenMP's threads spin for 2 to 10 ms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed bench`."""
    parser.add_argument("--vocabulary", type=int, default=1_000_000, help="rows of the table (1,000,000)")
    parser.add_argument("--dim", type=int, default=64, help="values of a row (64)")
    parser.add_argument("--batch", type=int, default=1024, help="bags (1,024)")
    parser.add_argument("--valency", type=int, default=16, help="ids of a bag (16)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each contender (30)")


def run(options: argparse.Namespace) -> int:
    """Prints a line a contender; 1 if one of them gave other rows than numpy."""
    for name in ("vocabulary", "dim", "batch", "valency", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    rng = np.random.default_rng(0)
    # Small integers, whose sums in float32 are exact in any order.
    table = rng.integers(-8, 9, (options.vocabulary, options.dim), dtype=np.int8).astype(np.float32)
    shape = (_NUM_BATCHES, options.batch * options.valency)
    batches = list(rng.integers(0, options.vocabulary, shape, dtype=np.int32))
    splits = np.arange(options.batch + 1, dtype=np.int32) * options.valency
    wrong, contenders = [], {}
    expected = table[batches[0].reshape(options.batch, options.valency)].sum(axis=1)
    for name, make in _makers().items():
        program = make(table, batches, splits)
        if np.array_equal(program(0), expected):
            contenders[name] = program
        else:
            wrong.append(name)
    medians = _interleaved(contenders, options.rounds)
    print(f"{options.batch} bags of {options.valency} ids, table [{options.vocabulary}, {options.dim}] float32")
    first = next(iter(medians), "")
    for name, seconds in medians.items():
        print(f"{name:12} {1e6 * seconds:10.1f} us   {seconds / medians[first]:6.2f} x {first}")
    for name in wrong:
        print(f"{name}: WRONG, other rows than numpy")
    return 1 if wrong else 0


def _makers() -> dict[str, Callable[..., Callable[[int], Any]]]:
    makers: dict[str, Callable[..., Callable[[int], Any]]] = {}
    if kernel.available():
        makers["native"] = lambda *arrays: _jaxembed("native", *arrays)
    makers["plain JAX"] = lambda *arrays: _jaxembed("xla", *arrays)
    if importlib.util.find_spec("torch"):
        makers["torch"] = _torch
    if importlib.util.find_spec("tensorflow"):
        makers["TensorFlow"] = _tensorflow
    return makers


def _interleaved(programs: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of a call; contenders take turns in an order shuffled anew, so that a slow moment hits them all."""
    order = np.random.default_rng(0)
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name in order.permutation(list(programs)):
            program = programs[name]
            time.sleep(_SETTLE)  # the threads of the contender before spin for its next call
            warm = time.perf_counter() + _SETTLE
            while time.perf_counter() < warm:
                program(0)
            start = time.perf_counter()
            for i in range(_NUM_BATCHES):
                program(i)
            samples[name].append((time.perf_counter() - start) / _NUM_BATCHES)
    return {name: statistics.median(times) for name, times in samples.items()}


def _jaxembed(path: str, table: np.ndarray, batches: list[np.ndarray], splits: np.ndarray) -> Any:
    config = je.TableConfig(*table.shape, combiner="sum", name="bench")
    features = {"x": je.FeatureConfig(table=config)}
    # As its contenders are on the CPU, whatever accelerators are about.
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except (RuntimeError, AssertionError) as e:  # the latter where JAX looks for GPUs alone and finds none
        raise ValueError(
            "`jaxembed bench` runs on the CPU, which JAX does not have with "
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}{f' ({e})' if str(e) else ''}; set JAX_PLATFORMS=cpu, or cuda,cpu."
        ) from e
    rows = jax.device_put(table, cpu)
    inputs = [jax.device_put({"x": je.RaggedTensor(ids, splits)}, cpu) for ids in batches]

    @jax.jit
    def lookup(ids, rows):
        with je.use_backend(path):
            return je.serving_embedding_lookup(ids, None, {config: rows}, features)["x"]

    return lambda i: np.asarray(lookup(inputs[i], rows))


def _torch(table: np.ndarray, batches: list[np.ndarray], splits: np.ndarray) -> Any:
    import torch

    rows, offsets = torch.from_numpy(table), torch.from_numpy(splits)
    inputs = [torch.from_numpy(ids) for ids in batches]

    def lookup(i):
        with torch.no_grad():
            bags = torch.nn.functional.embedding_bag(
                inputs[i], rows, offsets, mode="sum", include_last_offset=True
            )
        return bags.numpy()

    return lookup


def _tensorflow(table: np.ndarray, batches: list[np.ndarray], splits: np.ndarray) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow

    tf: Any = tensorflow
    embedding = tf.tpu.experimental.embedding
    config = embedding.TableConfig(*table.shape, combiner="sum", name="bench")
    features = {"x": embedding.FeatureConfig(table=config)}
    rows = tf.Variable(table, trainable=False)
    inputs = [tf.constant(ids) for ids in batches]

    @tf.function(autograph=False)
    def lookup(ids):
        ragged = tf.RaggedTensor.from_row_splits(ids, splits, validate=False)
        return embedding.serving_embedding_lookup({"x": ragged}, None, {config: rows}, features)["x"]

    return lambda i: lookup(inputs[i]).numpy()
