"""The rows of a table that are most similar to some of its rows, found in one pass over its blocks."""

from typing import NamedTuple

import numpy as np

from jaxembed.checkpoint.stored import StoredArray

NUM_NEIGHBOURS = 5


class Neighbour(NamedTuple):
    """A row and its cosine similarity."""

    row: int
    similarity: float


def sample_rows(array: StoredArray, count: int, seed: int = 0) -> dict[int, np.ndarray]:
    """Up to `count` rows of finite values that are not all zeros, drawn at random, by id.

    Raises:
      CheckpointError: if they are damaged.
    """
    rng, num_rows, found = np.random.default_rng(seed), array.shape[0], {}
    tries = (
        rng.choice(num_rows, min(4 * count, num_rows), replace=False)
        if num_rows < 1 << 20
        else (rng.integers(0, num_rows, 4 * count))
    )
    for row in map(int, tries):
        if len(found) == count:
            break
        values = array.read_rows(row, row + 1)[0].astype(np.float32)
        if np.isfinite(values).all() and values.any():
            found[row] = values
    return dict(sorted(found.items()))


class NearestRows:
    """Collects, of each sampled row, the rows of greatest cosine similarity.

    Args:
      samples: rows [D] by id.
    """

    def __init__(self, samples: dict[int, np.ndarray]):
        self._ids = np.asarray(list(samples), np.int64)
        vectors = np.stack(list(samples.values())) if samples else np.zeros((0, 0), np.float32)
        self._vectors = _unit(vectors)
        self._rows = np.zeros((len(samples), 0), np.int64)
        self._similarities = np.zeros((len(samples), 0), np.float32)

    def add(self, start: int, values: np.ndarray, usable: np.ndarray) -> None:
        """Looks at rows [N, D] from id `start` on, at those alone that are `usable`."""
        if not self._ids.size:
            return
        rows = np.flatnonzero(usable)
        similarities = self._vectors @ _unit(values[rows]).T
        rows = rows + start
        similarities[self._ids[:, None] == rows] = -np.inf
        both = np.concatenate([self._similarities, similarities], axis=1)
        ids = np.concatenate([self._rows, np.broadcast_to(rows, similarities.shape)], axis=1)
        best = (
            np.argsort(-both, axis=1, kind="stable")[:, :NUM_NEIGHBOURS]
            if both.shape[1] <= NUM_NEIGHBOURS
            else (np.argpartition(-both, NUM_NEIGHBOURS - 1, axis=1)[:, :NUM_NEIGHBOURS])
        )
        self._similarities = np.take_along_axis(both, best, axis=1)
        self._rows = np.take_along_axis(ids, best, axis=1)

    def found(self) -> dict[int, list[Neighbour]]:
        """By sampled row, the most similar first."""
        result = {}
        for i, row in enumerate(self._ids.tolist()):
            pairs = zip(self._rows[i].tolist(), self._similarities[i].tolist(), strict=True)
            ordered = sorted(
                (pair for pair in pairs if pair[1] > -np.inf), key=lambda pair: (-pair[1], pair[0])
            )
            result[row] = [Neighbour(*pair) for pair in ordered]
        return result


def _unit(vectors: np.ndarray) -> np.ndarray:
    # First by the largest value, so that the squares of no float32 overflow or vanish.
    vectors = vectors / np.maximum(
        np.abs(vectors).max(axis=1, keepdims=True, initial=0), np.finfo(np.float32).tiny
    )
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
