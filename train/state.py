"""What training of a ShardedEmbedding changes."""

import dataclasses

import jax

from jaxembed.shapes import CombinerWeights, Scalar, Stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EmbeddingState:
    """Tables and slots in the layout of one mesh; `ShardedEmbedding.to_canonical` gives them by table.

    Attributes:
      tables: stack name to array.
      slots: stack name to slot name to float32 array.
      step: int32 scalar, number of updates taken.
      combiner_weights: table name to the float32 [num_weights] of its CustomCombiner, whole on every device.

    Examples:
      >>> import jaxembed as je
      >>> from jaxembed.optimizers import Adagrad
      >>> from jaxembed.train import ShardedEmbedding
      >>> movie = je.TableConfig(vocabulary_size=8, dim=2, combiner="sum", name="movie")
      >>> features = {"watched": je.FeatureConfig(movie)}
      >>> mesh = jax.make_mesh((jax.device_count(),), ("devices",))
      >>> state = ShardedEmbedding(features, Adagrad(0.1), mesh).init(jax.random.key(0))
      >>> state.step.item(), [list(slots) for slots in state.slots.values()]
      (0, [['accumulators']])
    """

    tables: dict[str, Stacked]
    slots: dict[str, dict[str, Stacked]]
    step: Scalar
    combiner_weights: dict[str, CombinerWeights] = dataclasses.field(default_factory=dict[str, jax.Array])
