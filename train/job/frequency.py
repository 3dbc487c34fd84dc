"""How often ids are looked up, by table: a few numbers that stand for the whole law."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.config import FeatureConfig
from jaxembed.inputs import RaggedTensor

from ..data import Batch

#: Counters a table has at most; ids of larger tables share them, so that memory stays bounded.
MAX_COUNTERS = 1 << 22


class IdFrequency:
    """Counts the ids of batches; safe to call from several threads.

    Args:
      feature_config: feature name to FeatureConfig.
    """

    def __init__(self, feature_config: Mapping[str, FeatureConfig]):
        self._tables = {name: feature.table for name, feature in feature_config.items()}
        self._counts = {
            table.name: np.zeros(min(table.vocabulary_size, MAX_COUNTERS), np.int64)
            for table in self._tables.values()
        }
        self._lock = threading.Lock()

    def update(self, batch: Batch) -> None:
        """Adds the ids of a host batch; those of padding and those outside [0, V) are left out."""
        for name, table in self._tables.items():
            ids = batch.features[name]
            if isinstance(ids, RaggedTensor):
                splits = np.asarray(ids.row_splits)
                ids = np.asarray(ids.values)[splits[0] : splits[-1]]
            else:
                ids = np.asarray(ids)[np.asarray(batch.mask) > 0]
            ids = ids[(ids >= 0) & (ids < table.vocabulary_size)]
            with self._lock:
                counts = self._counts[table.name]
                np.add.at(counts, ids % counts.size, 1)

    def summary(self, since_step: int = 0, num_hosts: int = 1) -> dict[str, dict[str, Any]]:
        """JSON-able, by table.

        Args:
          since_step: of the job, when counting began.
          num_hosts: among which the rows of a batch are divided; those of this one are counted.

        Returns:
          What was passed;
          `lookups`, how many ids; `distinct`, how many different ones; `ranks` 1, 2, 4, ... and the last;
          `counts`, how often the id of that rank was looked up; `shares`, what share of all lookups the ids
          up to that rank have; `counters`, how many there are, fewer than V where ids share them.
        """
        with self._lock:
            copies = {name: counts.copy() for name, counts in self._counts.items()}
        origin = {"since_step": since_step, "num_hosts": num_hosts}
        return {name: origin | _summary(counts) for name, counts in copies.items()}


def _summary(counts: np.ndarray) -> dict[str, Any]:
    found = np.sort(counts[counts > 0])[::-1]
    ranks = [1 << i for i in range(found.size.bit_length()) if 1 << i < found.size]
    ranks += [found.size] if found.size else []
    at = np.asarray(ranks, np.int64) - 1
    total = int(found.sum())
    return {
        "lookups": total,
        "distinct": int(found.size),
        "counters": int(counts.size),
        "ranks": ranks,
        "counts": found[at].tolist(),
        "shares": (np.cumsum(found)[at] / max(total, 1)).round(6).tolist(),
    }
