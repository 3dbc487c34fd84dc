"""Compiles the programs of a ServingFunction, one for each rung."""

from functools import partial
from typing import Any

from jaxembed.bag_native import MERGED_SCOPE

from .computation import Computation
from .ladder import Rung
from .program import Program, compile_program


class Compiler:
    """Compiles rungs; finds out with the first one how the model takes the activations.

    A model that concatenates them in order gets them side by side from the kernel, and the compiler drops the
    concatenation, which may take as long as the lookup. Any other model would only copy them once more.
    """

    def __init__(self, computation: Computation):
        self._computation = computation
        may_merge = computation.layout.shared and computation.model is not None
        self._merges: bool | None = None if may_merge else False

    def compile(self, rung: Rung, constants: Any) -> Program:
        """The program of a rung, for `constants` as those of `Computation.arguments`."""
        if self._merges is None:
            program = self._compile(rung, True, constants)
            self._merges = MERGED_SCOPE not in program.compiled.as_text()
            if self._merges:
                return program
        return self._compile(rung, self._merges, constants)

    def _compile(self, rung: Rung, merged: bool, constants: Any) -> Program:
        function = partial(self._computation.packed, rung, merged)
        return compile_program(function, self._computation.arguments(rung, constants), rung.batch)
