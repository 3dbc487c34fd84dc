"""The order of a shard's samples on its SparseCores: each has an equal share of the rows of every feature.

The segments of a shard follow each other by feature. SparseCore c of C has the c-th part of each feature's,
one part after the other: these are its samples, so that no SparseCore has all of the ids of a long feature.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .batch import FeatureLayout


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """Between segments [S] and samples [C, S / C].

    Args:
      features: of the stack; C divides the segments of each.
      cores: C.
    """

    features: tuple[FeatureLayout, ...]
    cores: int

    @property
    def num_samples(self) -> int:
        """S / C, on one SparseCore."""
        return sum(f.num_segments for f in self.features) // self.cores

    def to_segments(self, samples: jax.Array) -> jax.Array:
        """[S, ...] in the order of segments, from that of samples."""
        by_core = samples.reshape(self.cores, self.num_samples, *samples.shape[1:])
        parts = [
            by_core[:, start : start + size].reshape(-1, *samples.shape[1:]) for start, size in self._parts()
        ]
        return jnp.concatenate(parts)

    def to_samples(self, segments: jax.Array) -> jax.Array:
        """The inverse."""
        parts, trailing = [], segments.shape[1:]
        for start, size in self._parts():
            part = segments[start * self.cores : (start + size) * self.cores]
            parts.append(part.reshape(self.cores, size, *trailing))
        return jnp.concatenate(parts, axis=1).reshape(segments.shape)

    def segments_of(self, samples: Any) -> Any:
        """The segment of each sample [C, ...] of SparseCore c; any number where there is no such sample."""
        segments = self.to_segments_numpy()
        return jnp.stack(
            [
                jnp.asarray(of_core).at[ids].get(mode="clip")
                for of_core, ids in zip(segments, samples, strict=True)
            ]
        )

    def to_segments_numpy(self) -> np.ndarray:
        """int32 [C, S / C]: the segment of every sample."""
        parts = [
            np.arange(start * self.cores, (start + size) * self.cores, dtype=np.int32).reshape(self.cores, size)
            for start, size in self._parts()
        ]
        return np.concatenate(parts, axis=1)

    def _parts(self) -> list[tuple[int, int]]:
        """Where the samples of each feature start, and how many one SparseCore has."""
        return [(f.first_segment // self.cores, f.num_segments // self.cores) for f in self.features]
