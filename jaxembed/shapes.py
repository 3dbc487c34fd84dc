"""Types of arrays with their shapes, as jaxtyping writes them.

B examples or bags, F features, N ids, V rows of a table, D its width, L the length of a sequence, K dense features.
To a type checker they are the array's type alone, and nothing needs jaxtyping; where it is installed, they are its
types at run time, too. Names with `Any` take arrays of numpy, JAX or the like.
"""

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from jax import Array

if TYPE_CHECKING:
    from typing import Annotated as Float
    from typing import Annotated as Integer
    from typing import Annotated as Shaped
else:
    try:
        from jaxtyping import Float, Integer, Shaped
    except ModuleNotFoundError:

        class Shaped:
            """The array's type alone."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Float = Integer = Shaped

Scalar = Shaped[Array, ""]
AnyShape = Float[Array, "..."]
PerExample = Float[Array, "B"]
DenseFeatures = Float[Array, "B K"]
#: What a feature's bags were combined to.
Activations = Float[Array, "B D"]
Table = Float[Array, "V D"]
#: Rows of a table, or their gradients, one for each of N ids.
Rows = Float[Array, "N D"]
Ids = Integer[Array, "N"]
#: What a custom combiner takes: the number of ids of each bag, their rows, its own weights.
Valencies = Integer[Array, "B"]
Sequences = Float[Array, "B L D"]
CombinerWeights = Float[Array, "weights"]
#: Tables or slots as an engine keeps them.
Stacked = Shaped[Array, "lines width"]

AnyValues = Shaped[Any, "N"]
AnyIds = Integer[Any, "N"]
AnyRowSplits = Integer[Any, "B+1"]
AnyRowLengths = Integer[Any, "B"]
AnyIndices = Integer[Any, "N rank"]
AnyPadded = Shaped[Any, "B *L"]
AnyTable = Shaped[Any, "V D"]
AnyPerExample = Float[Any, "B"]
AnyDenseFeatures = Float[Any, "B *K"]
AnyCombinerWeights = Float[Any, "weights"]
#: Of a QuantizedTable; one code a byte, or two.
AnyCodes = Integer[Any, "V bytes"]
AnyTableCodes = Integer[Any, "V D"]
AnyPerRow = Float[Any, "V"]
AnyCodebook = Float[Any, "codes"]

HostRows = Float[np.ndarray, "N D"]
HostCodes = Integer[np.ndarray, "V bytes"]
HostCodebook = Float[np.ndarray, "codes"]
HostIds = Integer[np.ndarray, "N"]
HostLengths = Integer[np.ndarray, "F B"]

#: Structures of F leaves, as the feature configuration.
Inputs = Annotated[Any, 'PyTree[RaggedTensor | SparseTensor | Integer[Array, "B"], "F"]']
Weights = Annotated[Any, 'None | PyTree[RaggedTensor | SparseTensor | None, "F"]']
ActivationTree = Annotated[Any, 'PyTree[Float[Array, "B *L D"], "F"]']
