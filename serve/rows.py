"""Rows: requests that were read and checked, to be run together with others."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .packing import Packed


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

    All features of all parts are moved in one gather, so the cost does not grow with their number.
    """
    if len(parts) == 1:
        return parts[0]
    splits = [part.packed.splits[:, : len(part) + 1] for part in parts]
    rows = sum(map(len, parts))
    merged = np.zeros((splits[0].shape[0], rows + 1), np.int32)
    merged[:, 1:] = np.concatenate([split[:, 1:] - split[:, :-1] for split in splits], axis=1)
    flat = merged.reshape(-1)
    np.add.accumulate(flat, out=flat)
    # Where each (feature, part) lies in the ids of all parts put end to end.
    sizes = np.array([len(part.packed.ids) for part in parts])
    starts = np.stack([split[:, 0] for split in splits], axis=1) + (np.cumsum(sizes) - sizes)
    counts = np.stack([split[:, -1] - split[:, 0] for split in splits], axis=1).ravel()
    ends = np.cumsum(counts)
    where = np.repeat(starts.ravel() - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
    ids = np.concatenate([part.packed.ids for part in parts])[where]
    weights = None
    if parts[0].packed.weights is not None:
        weights = np.concatenate([part.packed.weights for part in parts if part.packed.weights is not None])[
            where
        ]
    dense = [np.concatenate(arrays) for arrays in zip(*(part.dense for part in parts), strict=True)]
    return Rows(Packed(rows, ids, merged, weights), dense)
