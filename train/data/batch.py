"""Batch: what one training step reads, as a pytree of fixed shapes."""

import dataclasses

import jax

from jaxembed.shapes import AnyDenseFeatures, AnyPerExample, Inputs, Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """B examples. Every batch of one pipeline has the same shapes, so a jitted step compiles once.

    Attributes:
      features: feature name to ids: [B] int32 for one id an example, a RaggedTensor of B bags for any
        number; of a wider type where their column is, which a `jax.jit` of your own takes through `jaxembed.as_input`.
        This is the `inputs` of a lookup, or what a trainer laid out of it.
      weights: feature name to a RaggedTensor parallel to the ids, or None where ids have no weights.
      dense: [B, K] float32 dense features; K may be 0.
      labels: [B] float32.
      mask: [B] float32, 1 for an example and 0 for the padding that fills up a last batch, of which a Trainer looks
        nothing up, in features whose activations are [B, ...]: ids [B] or [B, k], B bags, or bags with an `output_shape`
        of (B, ...). Others are of the batch as a whole and keep their rows. In place of the activations of such a row the
        model gets numbers that are neither zeros nor all alike, without a gradient.
    """

    features: Inputs
    weights: Weights
    dense: AnyDenseFeatures
    labels: AnyPerExample
    mask: AnyPerExample
