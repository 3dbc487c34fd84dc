"""What the devices get of a batch: for each stack, positions to look up and where their rows go.

On each of the n shards, a feature of B rows has B' = ceil(B / n) of them (a multiple of the SparseCores of a
shard, where these look it up) and S_f = B' * inner segments, inner being the number of output rows a batch row
gives: 1 where bags are combined, L in a sequence, the product of the inner dimensions otherwise. The segments of
a stack's features follow each other. An entry says that the row at a position, times its weight, is added to a
segment:

    out[segments[i]] += weights[i] stack[positions[i]]

Entries lie in the order of their segments, then padding: position and segment are one beyond the last.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxembed import structure
from jaxembed.bag import Bag
from jaxembed.config import FeatureConfig

from .placement import TablePlace


@dataclasses.dataclass(frozen=True)
class FeatureLayout:
    """One feature of a batch; all static.

    Attributes:
      path: of the feature.
      feature: its configuration.
      bag: how it is combined.
      num_rows: B, over all shards.
      inner: output rows a batch row gives.
      output_shape: of what is looked up, the activation unless a custom combiner makes it.
      stack: name of the stack of its table.
      first_segment: where its segments start.
      num_segments: S_f.
      combined_shape: of the activation, where a custom combiner makes it of what is looked up.
    """

    path: str
    feature: FeatureConfig
    bag: Bag
    num_rows: int
    inner: int
    output_shape: tuple[int, ...]
    stack: str
    first_segment: int
    num_segments: int
    combined_shape: tuple[int, ...] | None = None

    @property
    def is_combined(self) -> bool:
        """Whether bags are divided by the sum of their weights, or such."""
        return self.bag.layout != "dense" and not self.bag.sequence_length


class Skeleton:
    """A structure of features as a hashable value, to be filled with activations."""

    def __init__(self, tree: Any):
        self._tree = structure.map_leaves(lambda path, leaf: structure.join(path), tree)
        self._paths = tuple(structure.join(path) for path, _ in structure.flatten(tree))

    def pack(self, leaves: Any) -> Any:
        """The structure with these leaves."""
        return structure.pack(self._tree, iter(leaves))

    def flatten(self, tree: Any, what: str) -> list[Any]:
        """The leaves of a structure like this one.

        Raises:
          ValueError: if it is not like this one.
        """
        pairs = [(structure.join(path), leaf) for path, leaf in structure.flatten(tree)]
        if tuple(path for path, _ in pairs) != self._paths:
            raise ValueError(
                f"{what} must have the structure of the batch: got {[path for path, _ in pairs]} for "
                f"{list(self._paths)}."
            )
        return [leaf for _, leaf in pairs]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and (self._paths, self._tree) == (other._paths, other._tree)

    def __hash__(self) -> int:
        return hash(self._paths)


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """The static half of a ShardedBatch.

    Attributes:
      skeleton: the structure of the features.
      features: one a feature.
      places: where the tables lie that the positions are of.
    """

    skeleton: Skeleton
    features: tuple[FeatureLayout, ...]
    places: tuple[TablePlace, ...]

    def of_stack(self, stack: str) -> tuple[FeatureLayout, ...]:
        """The features that look up that stack, in the order of their segments."""
        return tuple(f for f in self.features if f.stack == stack)

    def num_segments(self, stack: str) -> int:
        """S of a stack, on one shard."""
        return sum(f.num_segments for f in self.of_stack(stack))

    def check_places(self, places: tuple[TablePlace, ...]) -> None:
        """Raises ValueError if the stacks that this batch looks up are not those of an embedding."""
        if self.places == places:
            return
        used = {feature.stack for feature in self.features}
        there, here = ({place for place in these if place.stack in used} for these in (self.places, places))
        if there == here:
            return
        theirs, ours = there - here, here - there
        raise ValueError(
            "this ShardedBatch was laid out by a ShardedEmbedding whose tables lie elsewhere: there "
            f"{min(theirs, default=None)}, here {min(ours, default=None)}; call shard_batch of the embedding that looks "
            "it up."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ShardedBatch:
    """The features of a batch, laid out over the shards by `ShardedEmbedding.shard_batch`.

    Attributes:
      positions: int32 [n, N] by stack.
      segments: int32 [n, N] by stack, ascending.
      sparsecore: by stack, of those that SparseCores look up; these have no positions and segments.
      bad_ids: int32 [n, F], ids outside [0, V) by feature; they have no entry.
      layout: static.
      valencies: int32 [n, bags a shard] by feature, of those with a custom combiner.
      is_weighted: whether it was laid out with weights, so that it is looked up with them; static.
    """

    positions: dict[str, Any]
    segments: dict[str, Any]
    sparsecore: dict[str, Any]
    bad_ids: Any
    layout: BatchLayout = dataclasses.field(metadata={"static": True})
    valencies: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_weighted: bool = dataclasses.field(default=False, metadata={"static": True})

    def checked_weights(self, weights: Any) -> dict[str, Any] | None:
        """The values of ShardedWeights, or None where the batch has none.

        Raises:
          ValueError: if they are not those that the batch was laid out with.
        """
        if weights is None and not self.is_weighted:
            return None
        if weights is None:
            raise ValueError(
                "this ShardedBatch was laid out with weights, got None: pass the weights that shard_batch returned "
                "with it to lookup and apply_gradients, too."
            )
        if not isinstance(weights, ShardedWeights):
            raise ValueError(
                "weights of a ShardedBatch must be what shard_batch returned with it, got "
                f"{type(weights).__name__}."
            )
        if not self.is_weighted:
            raise ValueError(
                "this ShardedBatch was laid out without weights, got ShardedWeights: pass weights to shard_batch, "
                "too."
            )
        segments = {
            name: ids[1] if isinstance(ids, tuple) else ids.segments for name, ids in self.entries.items()
        }
        shapes = {name: x.shape for name, x in segments.items()}
        found = {name: jnp.shape(x) for name, x in weights.values.items()}
        if found != shapes:
            raise ValueError(
                "weights of a ShardedBatch must be what shard_batch returned with it: entries by stack are "
                f"{shapes}, got weights {found}."
            )
        return weights.values

    @property
    def entries(self) -> dict[str, Any]:
        """What each stack's engine reads: positions and segments, or `sparsecore.SparseCoreIds`."""
        return {name: (self.positions[name], self.segments[name]) for name in self.positions} | self.sparsecore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ShardedWeights:
    """The weights of a batch, laid out as its entries; its gradient has the same form.

    Attributes:
      values: float32 [n, N] by stack; 1 for the entries of features without weights, 0 for padding.
    """

    values: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """This host's part of a ShardedBatch, as numpy arrays of its own shards.

    Attributes:
      batch: [n', N] arrays, n' being the host's shards.
      weights: float32 [n', N] by stack, or None.
    """

    batch: ShardedBatch
    weights: dict[str, Any] | None

    @property
    def room(self) -> dict[str, int]:
        """N of each stack that has entries in the batch."""
        on_sparsecores = {name: ids.segments for name, ids in self.batch.sparsecore.items()}
        segments = self.batch.segments | on_sparsecores
        return {name: x.shape[1] for name, x in segments.items() if x is not None}


def inner_size(bag: Bag, ids: Any) -> int:
    """Output rows that one batch row of this input gives."""
    if bag.layout == "dense":
        return math.prod(ids.shape[1:])
    if bag.sequence_length:
        return bag.sequence_length
    return math.prod(ids.shape[1:-1]) if bag.layout == "sparse" else 1
