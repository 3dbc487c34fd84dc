"""Tables in memory are those of the bundle, whatever they are stored as, and what is verified."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxembed import FeatureConfig, QuantizationConfig, TableConfig
from jaxembed.checkpoint import CheckpointError, convert_to_bundle, open_bundle
from jaxembed.optimizers import SGD
from jaxembed.serve import ServingModel
from jaxembed.serve.table_memory import copy_arrays, in_memory
from jaxembed.train import Checkpointer, ShardedEmbedding

CONFIG = {
    "wide": FeatureConfig(TableConfig(3000, 300, combiner="sum", name="wide")),  # several pieces
    "narrow": FeatureConfig(TableConfig(7, 3, combiner="mean", name="narrow")),
    "codes": FeatureConfig(
        TableConfig(60, 5, combiner="sum", name="codes", quantization_config=QuantizationConfig(16, -1.0, 1.0))
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    own = ShardedEmbedding(CONFIG, SGD(0.1), jax.make_mesh((1,), ("d",)))
    with Checkpointer(path, own, asynchronous=False) as checkpointer:
        checkpointer.save(own.init(jax.random.key(0)))
    return path


@pytest.mark.parametrize("quantize", [None, "bfloat16", "int8", "int4"])
def test_same_tables_and_answers(checkpoint, tmp_path, quantize):
    convert_to_bundle(checkpoint, tmp_path, quantize=quantize)
    mapped = open_bundle(tmp_path)
    copied = in_memory(mapped)
    copied.verify()
    assert copied.tables["codes"].kind == "codes4"
    assert jax.tree.structure(copied.tables) == jax.tree.structure(mapped.tables)
    for ours, theirs in zip(jax.tree.leaves(copied.tables), jax.tree.leaves(mapped.tables), strict=True):
        assert (ours.dtype, ours.flags.writeable) == (theirs.dtype, True)
        assert not np.shares_memory(ours, theirs)
        np.testing.assert_array_equal(ours, theirs)
    inputs = {"wide": [[0, 2999], [5]], "narrow": [[6], [0, 1]], "codes": [[59], []]}
    with ServingModel(tmp_path, max_batch_size=2) as model:
        expected = model(inputs)
    with ServingModel(tmp_path, max_batch_size=2, tables="memory") as model:
        jax.tree.map(np.testing.assert_array_equal, model(inputs), expected)


def test_what_is_in_memory_is_verified(checkpoint, tmp_path):
    convert_to_bundle(checkpoint, tmp_path)

    def damage(digest, arrays):
        copies = copy_arrays(digest, arrays)
        next(iter(copies.values()))[-1, 0] += 1
        return copies

    with pytest.raises(CheckpointError, match="is damaged: rows"):
        in_memory(open_bundle(tmp_path), damage).verify()


def test_tables_must_be_somewhere(checkpoint, tmp_path):
    convert_to_bundle(checkpoint, tmp_path)
    with pytest.raises(ValueError, match=r"tables must be one of .*'mapped', 'memory'.*, got 'disk'"):
        ServingModel(tmp_path, tables="disk")


@pytest.mark.parametrize("array", [np.zeros((0, 4), np.float32), np.ones((3,), ml_dtypes.bfloat16)])
def test_odd_arrays(array):
    (copy,) = copy_arrays("", {"rows": array}).values()
    assert (copy.shape, copy.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(copy, array)
