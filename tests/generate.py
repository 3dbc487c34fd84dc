"""Random valid lookups for hypothesis: a feature, its table, its ids and its weights."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from jaxembed import FeatureConfig, RaggedTensor, SparseTensor, TableConfig


class Generated(NamedTuple):
    """One lookup of one feature."""

    feature: FeatureConfig
    table: np.ndarray
    ids: Any
    weights: Any


@st.composite
def lookups(draw) -> Generated:
    """Dense, ragged (in output shapes) and sparse ids (of rank 3, at equal coordinates); every combiner; pruned ids.

    Weights are positive and any, or on a grid with zeros and negatives whose sums are exact, and often zero.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocabulary, dim = draw(st.integers(1, 30)), draw(st.sampled_from([1, 3, 8, 17]))
    combiner = draw(st.sampled_from(["sum", "mean", "sqrtn"]))
    kind = draw(st.sampled_from(["dense", "ragged", "sparse"]))
    validate = draw(st.booleans())
    length = 0 if kind == "dense" else draw(st.sampled_from([0, 0, 1, 3]))
    config = TableConfig(vocabulary, dim, combiner=combiner, name="table")
    feature = FeatureConfig(config, length, validate)
    table = rng.standard_normal((vocabulary, dim)).astype(np.float32)
    weighted = kind != "dense" and not length and draw(st.booleans())
    if kind == "dense":
        shape = draw(st.sampled_from([(), (0,), (5,), (2, 3)]))
        return Generated(feature, table, rng.integers(0, vocabulary, shape, dtype=np.int64), None)
    batch = draw(st.integers(1, 6))
    leading = (batch, 2) if kind == "sparse" and draw(st.booleans()) else (batch,)
    bags = math.prod(leading)
    lengths = rng.integers(0, 5, bags) * (rng.random(bags) < 0.7)
    size = int(lengths.sum())
    values = rng.integers(0, vocabulary, size, dtype=np.int64)
    weights = rng.uniform(0.1, 2, size).astype(np.float32)
    if weighted and draw(st.booleans()):
        weights, table = rng.integers(-2, 3, size).astype(np.float32) / 2, np.round(table * 8) / 8
    if kind == "ragged":
        shape = draw(st.sampled_from([None, None, (batch,), (1, batch), (2 * batch,), (batch, 3)]))
        feature = dataclasses.replace(feature, output_shape=shape)
        ids = RaggedTensor.from_row_lengths(values, lengths)
        return Generated(feature, table, ids, RaggedTensor(weights, ids.row_splits) if weighted else None)
    rows = np.unravel_index(np.repeat(np.arange(bags), lengths), leading)
    columns = (rng.integers(0, 7, n) if draw(st.booleans()) else rng.permutation(7)[:n] for n in lengths)
    indices = np.stack([*rows, np.concatenate([np.sort(places) for places in columns])], axis=1)
    if len(leading) > 1 or (validate and not length):
        values = np.where(rng.random(size) < 0.2, -1 - values, values)
        weights = np.where(rng.random(size) < 0.2, -weights, weights)
    ids = SparseTensor(indices, values, (*leading, 7))
    return Generated(feature, table, ids, SparseTensor(indices, weights, ids.dense_shape) if weighted else None)
