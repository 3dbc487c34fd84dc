"""Rows: requests that were read and checked, to be run together with others."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .packing import Packed

# Ids from which on a copy of its own costs less than as many entries of a gather.
_LONG = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one request, or of several.

    Attributes:
      packed: ids, splits and weights of every feature.
      dense: [B, ...] float32 arrays, in the order of the dense inputs.
    """

    packed: Packed
    dense: list[np.ndarray]

    def __len__(self) -> int:
        return self.packed.rows

    @property
    def num_ids(self) -> int:
        """Ids of all features."""
        return int(self.packed.counts().sum(dtype=np.int64))


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part after the other.

    What a feature has in a part is copied by itself where that is long, and moved in one gather where it is short.
    """
    if len(parts) == 1:
        return parts[0]
    splits = [part.packed.splits[:, : len(part) + 1] for part in parts]
    rows = sum(map(len, parts))
    merged = np.zeros((splits[0].shape[0], rows + 1), np.int32)
    merged[:, 1:] = np.concatenate([split[:, 1:] - split[:, :-1] for split in splits], axis=1)
    flat = merged.reshape(-1)
    np.add.accumulate(flat, out=flat)
    move = _move_pieces if flat[-1] > _LONG * len(merged) * len(parts) else _gather
    ids = move([part.packed.ids for part in parts], splits)
    weights = [part.packed.weights for part in parts if part.packed.weights is not None]
    dense = [np.concatenate(arrays) for arrays in zip(*(part.dense for part in parts), strict=True)]
    return Rows(Packed(rows, ids, merged, move(weights, splits) if weights else None), dense)


def _move_pieces(arrays: Sequence[np.ndarray], splits: Sequence[np.ndarray]) -> np.ndarray:
    """What each feature has in each part, feature by feature: a copy of each."""
    pieces = [
        (array, split[:, 0].tolist(), split[:, -1].tolist())
        for array, split in zip(arrays, splits, strict=True)
    ]
    return np.concatenate(
        [array[starts[f] : ends[f]] for f in range(len(splits[0])) for array, starts, ends in pieces]
    )


def _gather(arrays: Sequence[np.ndarray], splits: Sequence[np.ndarray]) -> np.ndarray:
    """The same in one gather, whose cost does not grow with the number of pieces."""
    # Where each (feature, part) lies in the arrays of all parts put end to end.
    sizes = np.array([len(array) for array in arrays])
    starts = np.stack([split[:, 0] for split in splits], axis=1) + (np.cumsum(sizes) - sizes)
    counts = np.stack([split[:, -1] - split[:, 0] for split in splits], axis=1).ravel()
    ends = np.cumsum(counts)
    where = np.repeat(starts.ravel() - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
    return np.concatenate(arrays)[where]
