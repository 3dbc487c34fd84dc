"""Metrics of a binary classifier: AUC and log loss, exact, or with calibration accumulated over batches."""

import numpy as np


def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, ties half.

    Args:
      labels: [N] 0 or 1.
      scores: [N] in any increasing scale: logits and probabilities give the same.
      weights: [N] at least 0, such as a batch's mask; None for 1.

    Raises:
      ValueError: if there are no positives or no negatives.
    """
    labels, scores, weights = _flat(labels, scores, weights)
    _, bucket = np.unique(scores, return_inverse=True)
    positive = np.bincount(bucket, weights * labels)
    negative = np.bincount(bucket, weights * (1 - labels))
    return _auc_of_histograms(positive, negative)


def log_loss(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean of -y log p - (1 - y) log(1 - p) with p = sigmoid(logit), computed without overflow.

    Args:
      labels: [N] 0 or 1.
      logits: [N].
      weights: [N] at least 0; None for 1.
    """
    labels, logits, weights = _flat(labels, logits, weights)
    return float(np.sum(weights * _losses(labels, logits)) / np.sum(weights))


class StreamingMetrics:
    """AUC, log loss and calibration of any number of examples in constant memory.

    Log loss and calibration are exact; AUC counts logits that fall into one of `num_buckets` even steps
    of [-limit, limit] as ties. Two of them add up with `+`, so hosts can evaluate apart.

    Args:
      num_buckets: steps of the histogram.
      limit: logits beyond it share the outermost steps.
    """

    def __init__(self, num_buckets: int = 1 << 16, limit: float = 16.0):
        if num_buckets < 2 or not limit > 0:
            raise ValueError(
                f"num_buckets must be at least 2 and limit positive, got {num_buckets} and {limit}."
            )
        self._limit = float(limit)
        self._histograms = np.zeros((2, num_buckets))
        self._sums = np.zeros(4)  # weights, positives, losses, probabilities

    def update(self, labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Adds a batch: [N] labels, [N] logits and [N] weights (a batch's mask), None for 1."""
        labels, logits, weights = _flat(labels, logits, weights)
        count = self._histograms.shape[1]
        steps = (np.clip(logits / self._limit, -1, 1) + 1) * (count / 2)
        bucket = np.minimum(steps.astype(np.int64), count - 1)
        self._histograms[0] += np.bincount(bucket, weights * labels, count)
        self._histograms[1] += np.bincount(bucket, weights * (1 - labels), count)
        losses, probabilities = _losses(labels, logits), _sigmoid(logits)
        self._sums += [np.sum(weights * x) for x in (1.0, labels, losses, probabilities)]

    def __add__(self, other: "StreamingMetrics") -> "StreamingMetrics":
        if self._limit != other._limit or self._histograms.shape != other._histograms.shape:
            raise ValueError("StreamingMetrics can be added only with equal num_buckets and limit.")
        total = StreamingMetrics(self._histograms.shape[1], self._limit)
        total._histograms = self._histograms + other._histograms
        total._sums = self._sums + other._sums
        return total

    def result(self) -> dict[str, float]:
        """`{"auc", "log_loss", "calibration", "examples"}` of all that was added.

        Raises:
          ValueError: if there were no positives or no negatives.
        """
        weight, positives, losses, probabilities = self._sums.tolist()
        return {
            "auc": _auc_of_histograms(*self._histograms),
            "log_loss": losses / weight,
            "calibration": probabilities / positives,
            "examples": weight,
        }


def _auc_of_histograms(positive: np.ndarray, negative: np.ndarray) -> float:
    """From the weights of positives and negatives at each score, in increasing order of score."""
    total = positive.sum() * negative.sum()
    if total == 0:
        raise ValueError(
            f"auc needs positive and negative labels, got weights {positive.sum()} and {negative.sum()}."
        )
    below = np.cumsum(negative) - negative
    return float(np.sum(positive * (below + 0.5 * negative)) / total)


def _flat(labels, scores, weights):
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    weights = np.ones(labels.shape) if weights is None else np.asarray(weights, np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape or labels.shape != weights.shape:
        raise ValueError(
            f"labels, scores and weights must be of one shape [N], got {labels.shape}, {scores.shape} and "
            f"{weights.shape}."
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1; threshold ratings or clicks first.")
    if not np.isfinite(scores[weights > 0]).all():
        raise ValueError("scores must be finite, got NaN or infinity; the model has diverged.")
    return labels, np.where(weights > 0, scores, 0.0), weights


def _losses(labels, logits):
    return np.logaddexp(0.0, logits) - labels * logits


def _sigmoid(logits):
    return 0.5 * (1.0 + np.tanh(0.5 * logits))
