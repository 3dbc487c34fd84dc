"""Optimizers of embedding tables: TensorFlow's rules and arguments, as pure functions of rows."""

from jaxembed.optimizers.base import Optimizer
from jaxembed.optimizers.custom import CustomOptimizer
from jaxembed.optimizers.optax_view import OptaxState, as_optax
from jaxembed.optimizers.registry import (
    optimizer_class,
    optimizer_from_dict,
    register_function,
    register_optimizer,
    register_schedule,
)
from jaxembed.optimizers.rules import FTRL, SGD, Adagrad, AdagradMomentum, Adam
from jaxembed.optimizers.schedules import CosineDecay, ExponentialDecay, PolynomialDecay, Schedule
from jaxembed.optimizers.sparse import dedupe, dedupe_ids, sparse_update, update_unique

__all__ = [
    "FTRL",
    "SGD",
    "Adagrad",
    "AdagradMomentum",
    "Adam",
    "CosineDecay",
    "CustomOptimizer",
    "ExponentialDecay",
    "OptaxState",
    "Optimizer",
    "PolynomialDecay",
    "Schedule",
    "as_optax",
    "dedupe",
    "dedupe_ids",
    "optimizer_class",
    "optimizer_from_dict",
    "register_function",
    "register_optimizer",
    "register_schedule",
    "sparse_update",
    "update_unique",
]
