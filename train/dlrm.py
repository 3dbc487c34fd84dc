"""DLRM: dense features and embeddings meet in pairwise dot products."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxembed.shapes import Activations, DenseFeatures, PerExample


class DLRM(nnx.Module):
    """Deep learning recommendation model on embeddings that were looked up before.

        x0 = bottom(dense)                                        [B, D]
        z = (x0, <x_i, x_j> for i < j, x = (x0, embeddings))
        logit = top(z)

    It holds no tables.

    Args:
      num_dense: K; 0 leaves the bottom MLP out.
      num_embeddings: F.
      dim: D, of every embedding.
      bottom: widths of the bottom MLP's hidden layers.
      top: widths of the top MLP's hidden layers.
      concat_embeddings: give the top MLP the embeddings themselves, too, and not only their products.
      dropout: the fraction of the hidden layers' outputs that training leaves out.
      batch_norm: normalize what the hidden layers' linear parts give, by `nnx.BatchNorm`.
      rngs: streams for the initial parameters and for dropout.

    Raises:
      ValueError: if a size is not positive, `dropout` not in [0, 1), or there is nothing to interact.

    References:
      Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation
      Systems" (2019), arXiv:1906.00091.
    """

    def __init__(
        self,
        num_dense: int,
        num_embeddings: int,
        dim: int,
        *,
        bottom: Sequence[int] = (64,),
        top: Sequence[int] = (64, 32),
        concat_embeddings: bool = False,
        dropout: float = 0.0,
        batch_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        if num_dense < 0 or num_embeddings < 1 or dim < 1:
            raise ValueError(
                "DLRM needs num_dense of at least 0, num_embeddings and dim of at least 1, got "
                f"{num_dense}, {num_embeddings} and {dim}."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"DLRM needs dropout in [0, 1), got {dropout}.")
        vectors = num_embeddings + (num_dense > 0)
        if vectors < 2 and not concat_embeddings:
            raise ValueError("DLRM needs two vectors to interact, got one embedding and no dense features.")
        self.num_dense: int = num_dense
        self.num_embeddings: int = num_embeddings
        self.dim: int = dim
        self.concat_embeddings: bool = concat_embeddings
        width = vectors * (vectors - 1) // 2
        width += dim * vectors if concat_embeddings else dim * (num_dense > 0)
        options: dict[str, Any] = {"dropout": dropout, "batch_norm": batch_norm, "rngs": rngs}
        self.bottom: MLP | None = MLP((num_dense, *bottom, dim), **options) if num_dense else None
        self.top: MLP = MLP((width, *top, 1), **options)

    def __call__(
        self,
        dense: DenseFeatures,
        embeddings: Mapping[str, Activations] | Sequence[Activations],
        mask: jax.Array | None = None,
    ) -> PerExample:
        """The logits.

        Args:
          dense: [B, K] floating point.
          embeddings: F activations [B, D]; those of a mapping are taken in the order of its sorted keys.
          mask: bool [B], False for rows that `batch_norm` is not to count; None counts all.

        Returns:
          [B] float32 logits; `jax.nn.sigmoid` makes them probabilities.

        Raises:
          ValueError: if shapes are not those of the constructor.
        """
        if isinstance(embeddings, Mapping):
            embeddings = [embeddings[name] for name in sorted(embeddings)]
        self._check(dense, embeddings)
        vectors = [jnp.asarray(x, jnp.float32) for x in embeddings]
        if self.bottom is not None:
            vectors = [jax.nn.relu(self.bottom(jnp.asarray(dense, jnp.float32), mask)), *vectors]
        stacked = jnp.stack(vectors, axis=1)
        products = jnp.einsum("bid,bjd->bij", stacked, stacked)
        rows, columns = np.triu_indices(len(vectors), k=1)
        parts = [products[:, rows, columns]]
        if self.concat_embeddings:
            parts = [*vectors, *parts]
        elif self.bottom is not None:
            parts = [vectors[0], *parts]
        return self.top(jnp.concatenate(parts, axis=1), mask)[:, 0]

    def _check(self, dense, embeddings):
        shapes = [tuple(x.shape) for x in embeddings]
        batch = dense.shape[0]
        if shapes != [(batch, self.dim)] * self.num_embeddings:
            raise ValueError(
                f"DLRM: embeddings must be {self.num_embeddings} arrays of shape ({batch}, {self.dim}), got "
                f"{shapes}; combine sequence features first."
            )
        if tuple(dense.shape) != (batch, self.num_dense):
            raise ValueError(f"DLRM: dense must be [B, {self.num_dense}], got shape {tuple(dense.shape)}.")


class MLP(nnx.Module):
    """Linear layers; between them, in this order, batch normalization where asked for, ReLU, and dropout.

    Args:
      widths: of the input, the hidden layers and the output.
      dropout: the fraction that training leaves out.
      batch_norm: whether to normalize.
      rngs: streams for the initial parameters and for dropout.
    """

    def __init__(
        self, widths: Sequence[int], *, dropout: float = 0.0, batch_norm: bool = False, rngs: nnx.Rngs
    ):
        layers = [
            nnx.Linear(fan_in, fan_out, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
            for fan_in, fan_out in pairwise(widths)
        ]
        self.layers: nnx.List[nnx.Linear] = nnx.List(layers)
        norms = [nnx.BatchNorm(width, rngs=rngs) for width in widths[1:-1] if batch_norm]
        self.norms: nnx.List[nnx.BatchNorm] = nnx.List(norms)
        self.dropout: nnx.Dropout | None = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, widths[0]] to [B, widths[-1]]; rows that `mask`, bool [B], says False of are not counted."""
        for i, layer in enumerate(self.layers[:-1]):
            x = layer(x)
            if self.norms:
                x = self.norms[i](x, mask=None if mask is None else mask[:, None])
            x = jax.nn.relu(x)
            if self.dropout is not None:
                x = self.dropout(x)
        return self.layers[-1](x)
