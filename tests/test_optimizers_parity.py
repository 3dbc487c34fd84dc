"""The optimizers against TensorFlow's own kernels, and their arguments against TensorFlow's classes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import optimizers
from jaxembed.optimizers import FTRL, Adagrad, AdagradMomentum, Adam, CustomOptimizer, sparse_update
from tests.lazy import lazily

tf = lazily("tensorflow")
pytestmark = pytest.mark.parity

V, D, R, STEPS = 11, 3, 24, 4


def _batches(seed: int):
    rng = np.random.default_rng(seed)
    table = rng.normal(0, 0.5, (V, D)).astype(np.float32)
    ids = rng.integers(0, V - 2, (STEPS, R)).astype(np.int32)
    return table, ids, rng.normal(0, 0.2, (STEPS, R, D)).astype(np.float32)


def _summed(ids: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, where = np.unique(ids, return_inverse=True)
    total = np.zeros((len(unique), D))
    np.add.at(total, where, gradients)
    return unique.astype(np.int32), total.astype(np.float32)


def _train(optimizer, apply, names, seed=0):
    """Runs ours, and `apply` on TensorFlow variables with the gradients that ours should apply; compares."""
    table, ids, gradients = _batches(seed)
    slots = optimizer.init_slots(table.shape)
    variables = [tf.Variable(table), *(tf.Variable(np.asarray(slots[name])) for name in names)]
    handles = [variable.handle for variable in variables]
    update = lambda *operands: sparse_update(optimizer, *operands)  # noqa: E731
    if not optimizer.use_gradient_accumulation:
        update = jax.jit(update)
    for step in range(STEPS):
        operands = ids[step], gradients[step]
        table, slots = update(table, slots, *operands, step)
        apply(handles, *(operands if not optimizer.use_gradient_accumulation else _summed(*operands)), step)
        ours = [table, *(slots[name] for name in names)]
        for name, a, b in zip(("table", *names), ours, variables, strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-6, atol=1e-6, err_msg=f"{name} at {step}")


@pytest.mark.parametrize("accumulate", [True, False])
def test_adagrad(accumulate):
    def apply(handles, ids, gradients, step):
        tf.raw_ops.ResourceSparseApplyAdagradV2(
            var=handles[0], accum=handles[1], lr=0.1, epsilon=0.0, grad=gradients, indices=ids
        )

    _train(Adagrad(0.1, use_gradient_accumulation=accumulate), apply, ["accumulators"])


@pytest.mark.parametrize(
    ("power", "multiply", "accumulate"),
    [
        (-0.5, False, True),
        (-0.5, True, True),
        (-0.5, False, False),
        (-0.8, False, True),
        (-0.8, True, False),
        (0.0, False, True),
    ],
)
def test_ftrl(power, multiply, accumulate):
    rate, beta = 0.2, 0.3
    optimizer = FTRL(
        rate, power, 0.02, 0.1, beta,
        multiply_linear_by_learning_rate=multiply, use_gradient_accumulation=accumulate,
    )  # fmt: skip

    def apply(handles, ids, gradients, step):
        tf.raw_ops.ResourceSparseApplyFtrlV2(
            var=handles[0], accum=handles[1], linear=handles[2], grad=gradients, indices=ids, lr=rate,
            l1=0.02, l2=0.1 + beta / (2 * rate), l2_shrinkage=0.0, lr_power=power, multiply_linear_by_lr=multiply,
        )  # fmt: skip

    _train(optimizer, apply, ["accumulators", "linears"])


def test_ftrl_dense():
    optimizer, (table, _, gradients) = FTRL(0.2, l1_regularization_strength=0.05), _batches(1)
    slots = optimizer.init_slots(table.shape)
    var, accum, linear = (tf.Variable(np.asarray(x)) for x in (table, slots["accumulators"], slots["linears"]))
    for step in range(STEPS):
        gradient = gradients[step, :V]
        table, slots = optimizer.update_rows(jnp.asarray(gradient), jnp.asarray(table), slots, 0.2, step)
        tf.raw_ops.ResourceApplyFtrlV2(
            var=var.handle, accum=accum.handle, linear=linear.handle, grad=gradient, lr=0.2, l1=0.05, l2=0.0,
            l2_shrinkage=0.0, lr_power=-0.5,
        )  # fmt: skip
        np.testing.assert_allclose(table, var.numpy(), rtol=1e-6, atol=1e-6)
    assert (np.asarray(table) == 0).any()  # l1 took some weights to 0


def test_adam_not_lazy():
    optimizer = Adam(0.01, 0.9, 0.99, 1e-3, lazy_adam=False, sum_inside_sqrt=False)

    def apply(handles, ids, gradients, step):
        dense = np.zeros((V, D), np.float32)
        dense[ids] = gradients
        tf.raw_ops.ResourceApplyAdam(
            var=handles[0], m=handles[1], v=handles[2], beta1_power=0.9 ** (step + 1),
            beta2_power=0.99 ** (step + 1), lr=0.01, beta1=0.9, beta2=0.99, epsilon=1e-3, grad=dense,
        )  # fmt: skip

    _train(optimizer, apply, ["momenta", "velocities"])


def test_adam_lazy_is_the_kernel_on_the_rows_looked_up():
    optimizer = Adam(0.01, 0.9, 0.99, 1e-3, sum_inside_sqrt=False)

    def apply(handles, ids, gradients, step):
        rows = [
            tf.Variable(tf.raw_ops.ResourceGather(resource=h, indices=ids, dtype=tf.float32)) for h in handles
        ]
        tf.raw_ops.ResourceApplyAdam(
            var=rows[0].handle, m=rows[1].handle, v=rows[2].handle, beta1_power=0.9 ** (step + 1),
            beta2_power=0.99 ** (step + 1), lr=0.01, beta1=0.9, beta2=0.99, epsilon=1e-3, grad=gradients,
        )  # fmt: skip
        for handle, row in zip(handles, rows, strict=True):
            tf.raw_ops.ResourceScatterUpdate(resource=handle, indices=ids, updates=row)

    _train(optimizer, apply, ["momenta", "velocities"])


@pytest.mark.parametrize("nesterov", [False, True])
def test_adagrad_momentum_is_keras_momentum_of_scaled_gradients(nesterov):
    """Keras keeps -lr m, the same for a constant learning rate."""
    optimizer = AdagradMomentum(0.1, 0.8, nesterov, epsilon=1e-2)
    table, ids, gradients = _batches(2)
    slots, accumulators = optimizer.init_slots(table.shape), np.zeros((V, D))
    var, accum = tf.Variable(table), tf.Variable(np.zeros((V, D), np.float32))
    for step in range(STEPS):
        table, slots = sparse_update(optimizer, table, slots, ids[step], gradients[step], step)
        unique, total = _summed(ids[step], gradients[step])
        accumulators[unique] += total.astype(np.float64) ** 2
        scaled = (total / np.sqrt(accumulators[unique] + 1e-2)).astype(np.float32)
        tf.raw_ops.ResourceSparseApplyKerasMomentum(
            var=var.handle, accum=accum.handle, lr=0.1, grad=scaled, indices=unique, momentum=0.8,
            use_nesterov=nesterov,
        )  # fmt: skip
        np.testing.assert_allclose(table, var.numpy(), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(-0.1 * slots["momenta"], accum.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "AdagradMomentum", "FTRL", "Adam", "CustomOptimizer"])
def test_arguments_and_defaults_are_those_of_tensorflow(name):
    theirs = inspect.signature(getattr(tf.tpu.experimental.embedding, name)).parameters
    ours = inspect.signature(getattr(optimizers, name)).parameters
    for argument, parameter in theirs.items():
        assert argument in ours
        if parameter.default is not inspect.Parameter.empty:
            assert ours[argument].default == parameter.default, argument
    positional = [k for k, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SGD", {"use_gradient_accumulation": False, "clipvalue": 1.0}),
        ("Adagrad", {"initial_accumulator_value": 0.0}),
        ("Adagrad", {"slot_variable_creation_fn": 3}),
        ("AdagradMomentum", {"epsilon": 0.0}),
        ("AdagradMomentum", {"exponent": 0.0}),
        ("FTRL", {"initial_accumulator_value": 0.0}),
        ("Adam", {"beta_1": 1.0}),
        ("Adam", {"beta_2": -0.1}),
        ("Adam", {"epsilon": 0.0}),
        ("Adam", {"use_gradient_accumulation": False, "lazy_adam": False}),
        ("CustomOptimizer", {"custom_computation": max, "slot_names": ["a"]}),
        (
            "CustomOptimizer",
            {"custom_computation": max, "slot_names": ["a"], "slot_initializers": [0.0], "slot_dims": [3]},
        ),
    ],
)
def test_what_tensorflow_refuses_is_refused(name, arguments):
    for cls in (getattr(tf.tpu.experimental.embedding, name), getattr(optimizers, name)):
        with pytest.raises(ValueError):
            cls(**arguments)


def test_slot_names_are_those_of_tensorflow():
    for name in ("SGD", "Adagrad", "AdagradMomentum", "FTRL", "Adam"):
        theirs = getattr(tf.tpu.experimental.embedding, name)()
        ours = getattr(optimizers, name)()
        assert list(ours.slot_names) == theirs._slot_names()
        values = [float(initializer([])) for initializer in theirs._slot_initializers()]
        np.testing.assert_allclose(list(ours.slot_initial_values.values()), values, rtol=1e-7)
    assert CustomOptimizer(max, 0.1, ["a"], [0.0]).slot_names == ("a",)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("PolynomialDecay", (0.3, 10)),
        ("PolynomialDecay", (0.3, 10, 0.1, 0.5)),
        ("PolynomialDecay", (0.3, 10, 0.01, 2.0, True)),
        ("CosineDecay", (0.3, 10)),
        ("CosineDecay", (0.3, 10, 0.2, {"warmup_target": 0.7, "warmup_steps": 6})),
        ("CosineDecay", (0.3, 10, {"warmup_steps": 6})),
        ("CosineDecay", (0.3, 10, {"warmup_target": 0.7})),
        ("ExponentialDecay", (0.3, 10, 0.9)),
        ("ExponentialDecay", (0.3, 10, 0.9, True)),
        # Multiples of these, divided in a compiled function, are no whole numbers.
        ("PolynomialDecay", (0.3, 41, 0.1, 0.5)),
        ("PolynomialDecay", (1.0, 1000, 0.0, 1.0, True)),
        ("CosineDecay", (0.3, 41)),
        ("ExponentialDecay", (1.0, 41, 0.5, True)),
        ("ExponentialDecay", (1.0, 1000, 0.5, True)),
    ],
)
def test_schedules_are_those_of_tensorflow(name, arguments):
    classes = getattr(tf.keras.optimizers.schedules, name), getattr(optimizers, name)
    positional = [value for value in arguments if not isinstance(value, dict)]
    theirs, ours = (cls(*positional, **dict(*arguments[len(positional) :])) for cls in classes)
    multiples = ours.decay_steps * np.arange(1, 10)
    steps = np.unique(np.concatenate([np.arange(45), multiples - 1, multiples, multiples + 1]))
    expected = [float(theirs(step)) for step in steps]
    np.testing.assert_allclose(ours(steps), expected, rtol=1e-6, atol=1e-7)
    compiled = jax.jit(ours)
    np.testing.assert_allclose([compiled(step) for step in steps], expected, rtol=1e-6, atol=1e-7)
    own = inspect.signature(classes[1]).parameters
    for argument, parameter in inspect.signature(classes[0]).parameters.items():
        assert argument == "name" or own[argument].default == parameter.default, argument
