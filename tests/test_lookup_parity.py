"""TensorFlow itself as the oracle, on generated lookups."""

import hypothesis
import numpy as np
import pytest

import jaxembed as je
from jaxembed import kernel
from tests.generate import Generated, lookups
from tests.lazy import lazily

pytestmark = pytest.mark.parity
tf = lazily("tensorflow")


def with_tensorflow(case: Generated) -> np.ndarray:
    embedding = tf.tpu.experimental.embedding
    feature, config = case.feature, case.feature.table
    table = embedding.TableConfig(config.vocabulary_size, config.dim, combiner=config.combiner, name="table")
    theirs = embedding.FeatureConfig(
        table,
        max_sequence_length=feature.max_sequence_length,
        validate_weights_and_indices=feature.validate_weights_and_indices,
        output_shape=None if feature.output_shape is None else list(feature.output_shape),
    )
    ids, weights = _tensor(case.ids), None if case.weights is None else _tensor(case.weights)
    out = embedding.serving_embedding_lookup(ids, weights, {table: tf.Variable(case.table)}, theirs).numpy()
    if isinstance(case.ids, je.SparseTensor) and out.shape[0] < case.ids.num_rows:
        # Without validation TensorFlow drops trailing empty rows; a static shape cannot.
        out = np.pad(out, ((0, case.ids.num_rows - out.shape[0]), (0, 0)))
    return out


def _tensor(x):
    if isinstance(x, je.RaggedTensor):
        return tf.RaggedTensor.from_row_splits(x.values, x.row_splits)
    if isinstance(x, je.SparseTensor):
        return tf.SparseTensor(x.indices, x.values, x.dense_shape)
    return tf.constant(x)


@pytest.mark.parametrize("path", [pytest.param("xla", marks=pytest.mark.slow), "native"])
@hypothesis.settings(max_examples=40)
@hypothesis.given(case=lookups())
def test_equals_tensorflow(path, case):
    if path == "native" and not kernel.available():
        pytest.skip(f"no native kernel: {kernel.unavailable_reason()}")
    with je.use_backend(path):
        out = je.serving_embedding_lookup(case.ids, case.weights, {"table": case.table}, case.feature)
    np.testing.assert_allclose(out, with_tensorflow(case), rtol=1e-5, atol=1e-6)
