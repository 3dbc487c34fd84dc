"""How ids lie in the buffers of a rung: on the host, where they are written, and in the traced program."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxembed.inputs import RaggedTensor

from .features import ServedFeature
from .ladder import Ladder, Rung
from .packing import Packed, Packer, Request

if TYPE_CHECKING:
    from .buffers import Buffers


@dataclasses.dataclass(frozen=True)
class Layout:
    """Features share one buffer of ids (the native kernel) or have a region each (plain JAX).

    The native kernel reads what the splits say and no more, so a shared buffer may be far larger than the
    request: the rest of it is never touched. Plain JAX gathers every id there is room for, so there each
    feature has a region of the size of its share, and smaller rungs pay.

    Args:
      features: in the order of the feature configuration.
      shared: whether features share the buffer.
    """

    features: tuple[ServedFeature, ...]
    shared: bool

    @property
    def weighted(self) -> bool:
        """Whether requests may carry weights."""
        return any(feature.weighted for feature in self.features)

    def capacities(self, rung: Rung) -> list[int]:
        """Ids that each feature has room for."""
        return [rung.capacity(feature.max_ids) for feature in self.features]

    def size(self, rung: Rung) -> int:
        """Ids that there is room for in all."""
        return sum(self.capacities(rung))

    def check(self, ladder: Ladder) -> None:
        """Raises ValueError if a rung has room for more ids than an int32 can count."""
        largest = max(self.size(rung) for rung in ladder)
        if largest >= 2**31:
            raise ValueError(
                f"the largest rung must have room for fewer than 2**31 ids, got {largest}; lower max_batch_size "
                "or max_ids_per_row."
            )

    def inputs(self, rung: Rung, ids: Any, splits: Any, weights: Any) -> tuple[list[Any], list[Any]]:
        """The ids and the weights (None for features without) of every feature; for traced arrays."""
        ragged_ids, ragged_weights, start = [], [], 0
        for f, (feature, capacity) in enumerate(zip(self.features, self.capacities(rung), strict=True)):
            region = slice(None) if self.shared else slice(start, start + capacity)
            start += capacity
            ragged_ids.append(RaggedTensor(ids[region], splits[f]))
            ragged_weights.append(RaggedTensor(weights[region], splits[f]) if feature.weighted else None)
        return ragged_ids, ragged_weights

    def write(self, packer: Packer, request: Request, rung: Rung, buffers: "Buffers") -> None:
        """Writes a whole request to the buffers of `rung`."""
        if self.shared:
            buffers.splits[...] = packer.write(request, buffers.ids, buffers.weights, rung.batch).splits
        else:
            self.copy(pack_alone(packer, request), 0, request.rows, rung, buffers)

    def copy(self, packed: Packed, first: int, last: int, rung: Rung, buffers: "Buffers") -> None:
        """Copies rows [first, last) of a packed request to the buffers of `rung`."""
        if self.shared and first == 0 and last == packed.rows and _is_dense(packed):
            return _copy_whole(packed, buffers)
        part = packed.splits[:, first : last + 1]
        counts = part[:, -1] - part[:, 0]
        room = counts if self.shared else self.capacities(rung)
        starts = np.concatenate([[0], np.cumsum(room)]).astype(np.int32)[:-1]
        for source, target, count in zip(part[:, 0].tolist(), starts.tolist(), counts.tolist(), strict=True):
            buffers.ids[target : target + count] = packed.ids[source : source + count]
            if buffers.weights is not None and packed.weights is not None:
                buffers.weights[target : target + count] = packed.weights[source : source + count]
        begin = starts[:, None] if self.shared else 0
        buffers.splits[:, : last - first + 1] = part - part[:, :1] + begin
        buffers.splits[:, last - first + 1 :] = counts[:, None] + begin


def _is_dense(packed: Packed) -> bool:
    """Whether the features lie one after the other from the front on, with nothing between them."""
    splits = packed.splits
    return splits[0, 0] == 0 and np.array_equal(splits[1:, 0], splits[:-1, packed.rows])


def _copy_whole(packed: Packed, buffers: "Buffers") -> None:
    rows, total = packed.rows, packed.splits[-1, packed.rows]
    buffers.ids[:total] = packed.ids[:total]
    if buffers.weights is not None and packed.weights is not None:
        buffers.weights[:total] = packed.weights[:total]
    buffers.splits[:, : rows + 1] = packed.splits[:, : rows + 1]
    buffers.splits[:, rows + 1 :] = packed.splits[:, rows : rows + 1]


def pack_alone(packer: Packer, request: Request) -> Packed:
    """Packs a request into buffers of just its size."""
    total = int(request.lengths.sum(dtype=np.int64))
    if total >= 2**31:
        raise ValueError(f"a request must hold fewer than 2**31 ids, got {total}; send it in parts.")
    weights = np.empty(total, np.float32) if packer.weighted else None
    return packer.write(request, np.empty(total, np.int32), weights, request.rows)
