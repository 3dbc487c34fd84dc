"""A Flax NNX model as pure functions of its parameters and its other state, for training and for evaluation."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed.shapes import ActivationTree, DenseFeatures, PerExample

from .module import EmbeddingVariable

#: Of a model's variables, those that a step keeps although no gradient is taken of them.
_STATE = nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate))


class PureModel:
    """A model without its state, which is passed to it as nested dicts of arrays by the names of its attributes.

    Args:
      model: called as `model(dense, activations)`, or in training, where its call takes a `mask`, as
        `model(dense, activations, mask=mask)`. It is left as it is.

    Attributes:
      params: the initial values of its `nnx.Param`.
      state: those of its other variables: running averages of `nnx.BatchNorm`; counts of `nnx.Rngs`, and their keys as
        uint32, so that they can be saved.

    Raises:
      ValueError: if it is no NNX module, or holds embedding tables.
    """

    def __init__(self, model: nnx.Module):
        if not isinstance(model, nnx.Module):
            raise ValueError(
                f"model must be a flax.nnx.Module, got {type(model).__name__}; wrap a module of Linen: "
                "flax.nnx.bridge.ToNNX(module, rngs=flax.nnx.Rngs(0)).lazy_init(dense, activations)."
            )
        own = nnx.clone(model)
        nnx.pop(own, nnx.Intermediate)
        own.train()
        self._training = nnx.graphdef(own)
        own.eval()
        self._evaluation, params, state = nnx.split(own, nnx.Param, ...)
        _check_tables(state)
        self._params, self._state = dict(nnx.to_flat_state(params)), dict(nnx.to_flat_state(state))
        self._takes_mask = "mask" in inspect.signature(model.__call__).parameters  # type: ignore[operator]
        self.params: dict[str, Any] = _nested(self._params)
        self.state: dict[str, Any] = _nested(self._state)

    def train(
        self, params: Any, state: Any, dense: DenseFeatures, activations: ActivationTree, mask: Any
    ) -> tuple[PerExample, Any]:
        """The logits in training mode (`model.train()`), and the state after it.

        Raises:
          ValueError: if the call changes what state there is, or its shapes or types.
        """
        values = _restored(self._params, params) + _restored(self._state, state)
        model: Any = nnx.merge(self._training, nnx.from_flat_state(values))
        logits = model(dense, activations, **({"mask": mask} if self._takes_mask else {}))
        after = _nested(dict(nnx.to_flat_state(nnx.state(model, _STATE))))
        _check_kept(state, after)
        return logits, after

    def evaluate(self, variables: Any, dense: DenseFeatures, activations: ActivationTree) -> PerExample:
        """The logits in evaluation mode (`model.eval()`); what the call changes is dropped.

        Args:
          variables: of `variables`.
          dense: [B, K].
          activations: as the model takes them.
        """
        values = _restored(self._params, variables)
        values += [
            (path, variable.copy()) if _is_random(variable) else _restored({path: variable}, variables)[0]
            for path, variable in self._state.items()
        ]
        return nnx.merge(self._evaluation, nnx.from_flat_state(values))(dense, activations)  # type: ignore[operator]

    def variables(self, params: Any, state: Any) -> dict[str, Any]:
        """What `evaluate` takes: parameters and other state in one nested dict, without random keys and counts."""
        found = {path: _at(params, path) for path in self._params}
        found |= {path: _at(state, path) for path, v in self._state.items() if not _is_random(v)}
        return _nest(found)


def _check_tables(state: Any) -> None:
    found = [
        ".".join(map(str, path)) for path, v in nnx.to_flat_state(state) if isinstance(v, EmbeddingVariable)
    ]
    if found:
        raise ValueError(
            "Trainer trains the tables of its own ShardedEmbedding, got a model that holds others at "
            f"{', '.join(found)}. Look them up by the Trainer's embedding, or write the step yourself, as the "
            "docstring of jaxembed.train.Embedding shows."
        )


def _check_kept(before: Any, after: Any) -> None:
    forms = [
        {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (before, after)
    ]
    if forms[0] != forms[1]:
        changed = sorted(forms[0].items() ^ forms[1].items())
        raise ValueError(
            "a call of the model must keep names, shapes and types of its state, since all steps are one program; "
            f"these are only before or only after it: {', '.join(f'{name} {form}' for name, form in changed)}. Make "
            "all variables in the model's constructor."
        )


def _is_random(variable: Any) -> bool:
    return isinstance(variable, nnx.RngState)


def _nested(flat: dict[Any, Any]) -> dict[str, Any]:
    """The values of variables by their paths."""
    return _nest({path: jax.tree.map(_as_array, _value(v)) for path, v in flat.items()})


def _nest(flat: dict[Any, Any]) -> dict[str, Any]:
    nested: dict[Any, Any] = {}
    for (*path, last), value in flat.items():
        inner = nested
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return nested


def _value(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _as_array(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return jnp.asarray(leaf, jnp.result_type(leaf))  # of no weak type, as a step returns it


def _restored(flat: dict[Any, Any], nested: Any) -> list[tuple[Any, Any]]:
    """Variables like `flat` with the values of `nested`."""

    def as_before(value, leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        return value

    found = []
    for path, variable in flat.items():
        leaves, treedef = jax.tree.flatten(_value(variable))
        values = map(as_before, jax.tree.leaves(_at(nested, path)), leaves)
        value = jax.tree.unflatten(treedef, values)
        found.append((path, variable.replace(value) if isinstance(variable, nnx.Variable) else value))
    return found


def _at(nested: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        # Numbers of a list's entries come back from files as texts.
        nested = nested[key if key in nested else str(key)]
    return nested
