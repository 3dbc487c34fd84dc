"""Fuzzed bundles and checkpoints: an error within a second, or the very values that were written; never a crash.

With `-m slow -s` it prints how many were refused, how many loaded, and how long the slowest took.
"""

import collections
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxembed import FeatureConfig, QuantizationConfig, TableConfig
from jaxembed.checkpoint import convert_to_bundle, open_bundle, read_checkpoint
from jaxembed.features import feature_tables
from jaxembed.id_mapping import VocabularyFile
from jaxembed.optimizers import Adagrad
from jaxembed.quantized_table import QuantizedTable
from jaxembed.train import Checkpointer, ShardedEmbedding

from .mutations import MUTATIONS, RESEALED, Files

VARIANTS = ("plain", "int8", "chain")
SECONDS, BUSY_SECONDS = 1.0, 30.0


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "words.txt"
    vocabulary.write_text("".join(f"word{i}\n" for i in range(18)))
    b = TableConfig(20, 3, name="b", dtype=jnp.bfloat16)
    return {
        "x": FeatureConfig(TableConfig(300, 4, name="a")),
        "y": [FeatureConfig(b, preprocessing=VocabularyFile(str(vocabulary), num_oov_buckets=2))],
        "z": FeatureConfig(TableConfig(40, 5, name="c", quantization_config=QuantizationConfig(16, -1, 1))),
    }


@pytest.fixture(scope="module")
def checkpoint(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    own = ShardedEmbedding(config, Adagrad(0.1), jax.make_mesh((1,), ("d",)))
    tables, slots, _ = own.to_canonical(own.init(jax.random.key(0)))
    model = {"w": jnp.arange(6.0).reshape(2, 3), "l": [jnp.ones(2), jnp.zeros(())]}
    with Checkpointer(directory, own) as checkpointer:
        for step in range(3):
            checkpointer.save(own.from_canonical(tables, slots, step), model=model, metadata={"auc": 0.5})
            tables = {**tables, "a": tables["a"].at[jnp.array([3, 299 - step])].add(1.0)}
    return directory


@pytest.fixture(scope="module", params=VARIANTS)
def bundles(request, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles")
    if request.param == "chain":
        for step in range(3):
            convert_to_bundle(checkpoint, out, step=step, delta_from=step - 1 if step else None)
    else:
        quantize = None if request.param == "plain" else request.param
        convert_to_bundle(checkpoint, out, step=2, quantize=quantize, exported=b"model")
    return out


def load(path):
    """Everything that can be read of it, verified."""
    bundle = open_bundle(path)
    bundle.verify()
    values = {name: stored.read() for name, stored in bundle.stored().items()}
    arrays = {
        f"{name}.{part}": array
        for name, table in bundle.tables.items()
        for part, array in (table.arrays if isinstance(table, QuantizedTable) else {"rows": table}).items()
    }
    return bundle, {name: array.copy() for name, array in {**values, **arrays}.items()}


class Timed:
    """Calls what reads a folder; a hang is what takes over a second of the processor, or many, for the machine may be busy."""

    def __init__(self, read):
        self._read, self.slowest = read, 0.0

    def __call__(self, path):
        """What it gave, or None for an error that it is documented to raise."""
        for _ in range(3):
            since, used = time.perf_counter(), time.process_time()
            try:
                result = self._read(path)
            except (ValueError, FileNotFoundError):
                result = None
            seconds, whole = time.process_time() - used, time.perf_counter() - since
            if seconds < SECONDS and whole < BUSY_SECONDS:
                self.slowest = max(self.slowest, seconds)
                return result
        raise AssertionError(f"took {whole:.3g} s, {seconds:.3g} s of the processor; too long three times")


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_bundles(bundles, tmp_path, count):
    copy = shutil.copytree(bundles, tmp_path / "out")
    files, (expected, arrays) = Files(copy), load(bundles)
    outcomes, timed = collections.Counter(), Timed(load)

    @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def mutate(data):
        mutation = data.draw(st.sampled_from(MUTATIONS))
        try:
            mutation(data.draw, files)
            result = timed(copy)
        finally:
            files.restore()
        outcomes[mutation.__name__, "refused" if result is None else "loaded"] += 1
        if result is None:
            return
        found, values = result
        if mutation in RESEALED or found.directory.name != expected.directory.name:
            for name, config in feature_tables(found.feature_config).items():
                assert values[name].shape == (config.vocabulary_size, config.dim)
            return
        assert found.feature_config == expected.feature_config
        assert (found.step, found.metadata, found.exported) == (
            expected.step,
            expected.metadata,
            expected.exported,
        )
        assert values.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (values[name].dtype, values[name].tobytes()) == (array.dtype, array.tobytes())
        jax.tree.map(np.testing.assert_array_equal, found.model, expected.model)

    mutate()
    print(
        f"\n{outcomes.total()} mutated bundles, slowest {timed.slowest:.2f} s:", dict(sorted(outcomes.items()))
    )
    refused = {kind for kind, how in outcomes if how == "refused"}
    # A hundred examples need not have one of each.
    assert refused == {m.__name__ for m in MUTATIONS} if count > 1000 else refused


# Orbax's futures of reads that failed come back to event loops that are closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("count", [15, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_checkpoints(config, checkpoint, tmp_path, count):
    """The same of one step of a training checkpoint, tables, slots and model."""
    copy = shutil.copytree(checkpoint / "2", tmp_path / "2")
    files, timed = Files(copy), Timed(lambda path: read_checkpoint(path, slots=True))
    expected = timed(checkpoint / "2")
    kinds = [m for m in MUTATIONS if m.__name__ in ("change_bytes", "change_files")]
    outcomes = collections.Counter()

    @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def mutate(data):
        mutation = data.draw(st.sampled_from(kinds))
        try:
            mutation(data.draw, files)
            read = timed(copy)
        finally:
            files.restore()
        outcomes["refused" if read is None else "loaded"] += 1
        if read is None:
            return
        assert (read.step, read.metadata, read.feature_config) == (expected.step, expected.metadata, config)
        jax.tree.map(
            np.testing.assert_array_equal,
            (read.tables, read.slots, read.model),
            (expected.tables, expected.slots, expected.model),
        )

    mutate()
    print(f"\n{outcomes.total()} mutated checkpoints, slowest {timed.slowest:.2f} s:", dict(outcomes))
    assert outcomes["refused"]
