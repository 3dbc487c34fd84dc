"""Metrics against scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.train.metrics import StreamingMetrics, auc, log_loss


def draw(count, seed, levels):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    labels[:2] = 0, 1
    logits = np.round(rng.normal(size=count) + labels, levels)
    return labels, logits, rng.integers(0, 3, count) + (np.arange(count) < 2)


@given(st.integers(2, 200), st.integers(0, 10_000), st.sampled_from([0, 1, 9]))
def test_metrics_equal_scikit_learn(count, seed, levels):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    labels, logits, weights = draw(count, seed, levels)
    probabilities = 1 / (1 + np.exp(-logits))
    for w in (None, weights):
        expected = sklearn_metrics.roc_auc_score(labels, logits, sample_weight=w)
        np.testing.assert_allclose(auc(labels, logits, w), expected, atol=1e-12)
        expected = sklearn_metrics.log_loss(labels, probabilities, sample_weight=w)
        np.testing.assert_allclose(log_loss(labels, logits, w), expected, rtol=1e-12)


def test_streaming_metrics_equal_the_exact_ones_however_the_examples_are_cut():
    labels, logits, weights = draw(5000, 0, 9)
    hosts = [StreamingMetrics(), StreamingMetrics()]
    for at in range(0, 5000, 300):
        part = slice(at, at + 300)
        hosts[at % 2].update(labels[part], logits[part], weights[part])
    found = (hosts[0] + hosts[1]).result()
    assert found["examples"] == weights.sum()
    np.testing.assert_allclose(found["auc"], auc(labels, logits, weights), atol=1e-4)
    np.testing.assert_allclose(found["log_loss"], log_loss(labels, logits, weights), rtol=1e-12)
    calibration = np.average(1 / (1 + np.exp(-logits)), weights=weights) / np.average(labels, weights=weights)
    np.testing.assert_allclose(found["calibration"], calibration, rtol=1e-12)


def test_extreme_logits_stay_finite():
    assert log_loss([1, 0], [800.0, -800.0]) == 0
    assert log_loss([0, 1], [800.0, -800.0]) == 800
    metrics = StreamingMetrics()
    metrics.update([1, 0], [800.0, -800.0])
    assert metrics.result()["auc"] == 1


def test_padding_does_not_count_whatever_it_holds():
    assert auc([0, 1, 0], [0.0, 1.0, np.nan], [1, 1, 0]) == 1
    assert log_loss([0, 1, 0], [0.0, 0.0, np.inf], [1, 1, 0]) == pytest.approx(np.log(2))


def test_errors():
    with pytest.raises(ValueError, match=r"positive and negative labels, got weights 2\.0 and 0\.0"):
        auc([1, 1], [0.0, 1.0])
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        auc([0, 5], [0.0, 1.0])
    with pytest.raises(ValueError, match="scores must be finite"):
        log_loss([0, 1], [0.0, np.nan])
    with pytest.raises(ValueError, match="one shape"):
        auc([0, 1], [[0.0, 1.0]])
    with pytest.raises(ValueError, match="equal num_buckets and limit"):
        StreamingMetrics(4) + StreamingMetrics(8)
    with pytest.raises(ValueError, match="num_buckets must be at least 2"):
        StreamingMetrics(1)
