"""Signature: what a request to a served model holds, and what it is answered with."""

import dataclasses
import functools

import numpy as np

from jaxembed.serve.features import ServedFeature

from .request import ROW_SPLITS


@dataclasses.dataclass(frozen=True)
class Output:
    """A named output.

    Attributes:
      name: path in the model's result; "output" where it is one array.
      shape: of one row.
      dtype: of numpy.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a request holds and what it is answered with.

    Attributes:
      features: by path.
      dense: by name, the shape of one row.
      outputs: in the order in which they are answered.
      max_rows: of a request.
      takes_flat: whether features may come as Flat.
    """

    features: dict[str, ServedFeature]
    dense: dict[str, tuple[int, ...]]
    outputs: tuple[Output, ...]
    max_rows: int
    takes_flat: bool = False

    @functools.cached_property
    def tensor_names(self) -> tuple[list[str], list[str]]:
        """The names of the tensors of ids, and of their row splits."""
        return list(self.features), [path + ROW_SPLITS for path in self.features]

    @functools.cached_property
    def max_inputs(self) -> int:
        """The most tensors that a request can hold: ids, row splits and weights of every feature, and dense inputs."""
        return 3 * len(self.features) + len(self.dense)

    @functools.cached_property
    def output_names(self) -> list[str]:
        """The names of the outputs."""
        return [output.name for output in self.outputs]
