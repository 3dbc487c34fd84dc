"""Types of arrays with their shapes: B examples or bags, K dense features, V rows of a table, D its width, R some rows.

Type checkers show them where jaxtyping is installed; nothing needs it at run time.
"""

from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Shaped

    Scalar = Shaped[Array, ""]
    PerExample = Float[Array, "B"]
    DenseFeatures = Float[Array, "B K"]
    #: What a feature's bags were combined to.
    Activations = Float[Array, "B D"]
    Table = Float[Array, "V D"]
    #: Some rows of a table, or their gradients.
    Rows = Float[Array, "R D"]
else:
    Scalar = PerExample = DenseFeatures = Activations = Table = Rows = jax.Array
