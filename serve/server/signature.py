"""Signature: what a request to a served model holds, and what it is answered with."""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from jaxembed.serve.features import ServedFeature

from .errors import OptionError
from .request import ROW_SPLITS, WEIGHTS
from .strings import takes_strings


def check_names(features: Iterable[str], dense: Iterable[str]) -> None:
    """Refuses inputs that a request could not tell apart.

    Args:
      features: their paths.
      dense: names of dense inputs.

    Raises:
      OptionError: if two tensors of a request would have one name.
    """
    parts = {"": "ids", ROW_SPLITS: "row splits", WEIGHTS: "weights"}
    inputs = [
        (path + end, f"the {what} of feature {path!r}") for path in features for end, what in parts.items()
    ]
    inputs += [(name, f"dense input {name!r}") for name in dense]
    taken: dict[str, str] = {}
    for name, what in inputs:
        if name in taken:
            raise OptionError(
                f"input {name!r} of a request would be both {taken[name]} and {what}; rename one of them."
            )
        taken[name] = what


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
    def strings(self) -> frozenset[str]:
        """Paths of the features whose ids are strings."""
        return frozenset(path for path, feature in self.features.items() if takes_strings(feature))

    @functools.cached_property
    def output_names(self) -> list[str]:
        """The names of the outputs."""
        return [output.name for output in self.outputs]
