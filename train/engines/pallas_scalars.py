"""Splits a rule on rows into its scalars, computed once outside of a kernel, and the rest, computed on each block.

Mosaic has no `expm1`, which a bias correction takes, and a scalar need not be computed for every block anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal


class SplitRule(NamedTuple):
    """A function of rows and scalars in two parts.

    Attributes:
      scalars: what the second part needs of the first, of shape [] each.
      on_rows: from the rows and these scalars to what the function returns, flat.
    """

    scalars: list[jax.Array]
    on_rows: Callable[[Sequence[jax.Array], Sequence[jax.Array]], list[jax.Array]]


def split_rule(function: Callable[..., Any], rows: Sequence[jax.ShapeDtypeStruct], scalars: Any) -> SplitRule:
    """Traces `function(*rows, *scalars)` and does all that depends on no row.

    Args:
      function: of arrays; it may close over traced scalars.
      rows: shapes of the first arguments.
      scalars: the other ones.
    """
    closed = jax.make_jaxpr(function)(*rows, *scalars)
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars[len(rows) :], scalars, strict=True))
    later = []
    for eqn in jaxpr.eqns:
        is_known = all(isinstance(v, Literal) or v in known for v in eqn.invars)
        if is_known and all(v.aval.shape == () for v in eqn.outvars):
            _run(eqn, known)
        else:
            later.append(eqn)
    read = {v for eqn in later for v in eqn.invars if not isinstance(v, Literal)}
    read |= {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    border = [v for v in known if v in read]

    def on_rows(rows, values):
        inside = dict(zip(jaxpr.invars, rows, strict=False)) | dict(zip(border, values, strict=True))
        for eqn in later:
            _run(eqn, inside)
        return [_value(v, inside) for v in jaxpr.outvars]

    return SplitRule([known[v] for v in border], on_rows)


def _run(eqn: Any, values: dict[Any, Any]) -> None:
    found = eqn.primitive.bind(*(_value(v, values) for v in eqn.invars), **eqn.params)
    values.update(zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True))


def _value(variable: Any, values: dict[Any, Any]) -> Any:
    return variable.val if isinstance(variable, Literal) else values[variable]
