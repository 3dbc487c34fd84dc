"""Configuration of optimizers: errors, learning rates, storage by name, slots, and the view as optax."""

import dataclasses
import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxembed.initializers import Constant, RandomNormal
from jaxembed.names import UnregisteredError
from jaxembed.optimizers import (
    FTRL,
    SGD,
    Adagrad,
    AdagradMomentum,
    Adam,
    CosineDecay,
    CustomOptimizer,
    ExponentialDecay,
    Optimizer,
    PolynomialDecay,
    as_optax,
    optimizer_class,
    optimizer_from_dict,
    register_function,
    register_optimizer,
    register_schedule,
    sparse_update,
)
from jaxembed.unregistered import UnregisteredOptimizer


@register_function("tests.momentum_computation")
def momentum_computation(gradient, embedding_table, slot_variables, learning_rate, hyperparameters):
    momenta = hyperparameters[0] * slot_variables[0] + gradient
    return embedding_table - learning_rate * momenta, momenta


@register_function("tests.halving")
def halving(step):
    return 0.5**step


BUILTIN = [SGD(), Adagrad(), AdagradMomentum(), FTRL(), Adam(), CustomOptimizer(momentum_computation)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD("fast"), "learning_rate, if not a callable, must be a finite number, got 'fast'"),
        (lambda: SGD(float("nan")), "learning_rate, if not a callable, must be a finite number, got nan"),
        (lambda: SGD(lambda a, b: a), "learning_rate must take no argument or the step alone"),
        (lambda: SGD(lambda *, rate: rate), "learning_rate must take no argument or the step alone"),
        (lambda: SGD(lambda rate=0.1: rate), "all arguments of .* are optional; write `lambda: ...`"),
        (lambda: SGD(clip_weight_min="low"), "clip_weight_min must be a finite number, got 'low'"),
        (lambda: SGD(clip_weight_min=1.0, clip_weight_max=0.0), "clip_weight_min must not be above"),
        (lambda: SGD(weight_decay_factor=float("inf")), "weight_decay_factor must be a finite number"),
        (lambda: SGD(clipvalue=-1.0), "clipvalue must be positive or a tuple"),
        (lambda: SGD(clipvalue=(1.0, -1.0)), r"clipvalue must have min <= max, got \(1.0, -1.0\)"),
        (lambda: SGD(clipvalue=(1.0,)), r"clipvalue must be a number or a tuple \(min, max\)"),
        (lambda: Adagrad(slot_variable_creation_fn=3), "must be either None or a callable, got 3"),
        (
            lambda: Adagrad(use_gradient_accumulation=False, clipvalue=1.0),
            "When use_gradient_accumulation is False, gradient clipping cannot be used .* got 1.0",
        ),
        (lambda: Adagrad(0.1, 0.0), "initial_accumulator_value must be a positive float, got 0.0"),
        (lambda: FTRL(initial_accumulator_value=0.0), "a positive float, got 0.0; 0 needs allow_zero"),
        (
            lambda: FTRL(initial_accumulator_value=-1.0, allow_zero_accumulator=True),
            "initial_accumulator_value must be a positive float, got -1.0",
        ),
        (lambda: FTRL(0.1, 0.5), "learning_rate_power must be at most 0, got 0.5"),
        (lambda: FTRL(0.1, -0.5, -1.0), "l1_regularization_strength must be at least 0, got -1.0"),
        (lambda: AdagradMomentum(epsilon=0.0), "Adagrad momentum: epsilon must be positive, got 0.0"),
        (lambda: AdagradMomentum(exponent=0), "Adagrad momentum: exponent must be positive, got 0"),
        (lambda: AdagradMomentum(beta2=1.5), "beta2 must be >= 0 and <= 1, got 1.5"),
        (lambda: Adam(0.1, 1.0), "beta_1 must be >= 0 and < 1, got 1.0"),
        (lambda: Adam(beta_2=-0.1), "beta_2 must be >= 0 and < 1, got -0.1"),
        (lambda: Adam(epsilon=0), "epsilon must be positive, got 0.0"),
        (
            lambda: Adam(lazy_adam=False, use_gradient_accumulation=False),
            "lazy_adam=False needs gradient accumulation",
        ),
        (lambda: CustomOptimizer(None), "custom_computation must be a callable, got None"),
        (
            lambda: CustomOptimizer(momentum_computation, slot_names=["m"]),
            r"The number of slot_names \(1\) must match the number of slot_initializers \(0\)",
        ),
        (
            lambda: CustomOptimizer(momentum_computation, 0.1, ["m"], [0.0], slot_dims=[2, 2]),
            r"The number of slot_dims \(2\) must match the number of slot_names \(1\)",
        ),
        (
            lambda: CustomOptimizer(momentum_computation, 0.1, ["m"], [0.0], slot_dims=[3]),
            "Unsupported slot dim 3 for slot 'm'. Only 1D and 2D are supported",
        ),
        (
            lambda: CustomOptimizer(momentum_computation, 0.1, ["m", "m"], [0.0, 0.0]),
            r"slot_names must be different names, got \('m', 'm'\)",
        ),
        (
            lambda: CustomOptimizer(momentum_computation, 0.1, ["m"], [RandomNormal()]),
            "slot 'm' must start from a constant, got RandomNormal",
        ),
        (
            lambda: CustomOptimizer(momentum_computation, hyperparameters=["x"]),
            "a hyperparameter, if not a callable, must be a finite number, got 'x'",
        ),
        (lambda: SGD(True), "learning_rate, if not a callable, must be a finite number, got True"),
        (lambda: SGD("0.1"), "learning_rate, if not a callable, must be a finite number, got '0.1'"),
        (
            lambda: SGD(use_gradient_accumulation="no"),
            "use_gradient_accumulation must be True or False, got 'no'",
        ),
        (
            lambda: SGD(use_gradient_accumulation=None),
            "use_gradient_accumulation must be True or False, got None",
        ),
        (
            lambda: SGD(multiply_weight_decay_factor_by_learning_rate="no"),
            "multiply_weight_decay_factor_by_learning_rate must be True or False, got 'no'",
        ),
        (lambda: Adam(lazy_adam="false"), "lazy_adam must be True or False, got 'false'"),
        (lambda: FTRL(allow_zero_accumulator=1), "allow_zero_accumulator must be True or False, got 1"),
        (lambda: AdagradMomentum(use_nesterov=[]), r"use_nesterov must be True or False, got \[\]"),
        (
            lambda: CustomOptimizer(momentum_computation, use_gradient_accumulation="no"),
            "use_gradient_accumulation must be True or False, got 'no'",
        ),
        (
            lambda: SGD(lambda step: jnp.ones(2)).learning_rate_at(0),
            r"learning_rate must be a scalar, got an array of shape \[2\] from",
        ),
        (
            lambda: SGD(lambda: [1.0]).learning_rate_at(0),
            r"learning_rate must be a scalar, got an array of shape \[1\] from",
        ),
        (lambda: PolynomialDecay(0.1, 0), "decay_steps must be at least 1, got 0"),
        (lambda: PolynomialDecay(0.1, 1, warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
        (lambda: ExponentialDecay(0.1, 0, 0.5), "decay_steps must be at least 1, got 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("optimizer", BUILTIN, ids=lambda o: o.name)
def test_frozen_hashable_and_equal_by_value(optimizer):
    assert optimizer == dataclasses.replace(optimizer)
    assert hash(optimizer) == hash(dataclasses.replace(optimizer))
    assert optimizer != dataclasses.replace(optimizer, clip_weight_min=0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        optimizer.learning_rate = 0.5


def test_slots_have_the_names_shapes_and_values_of_tensorflow():
    custom = CustomOptimizer(momentum_computation, 0.1, ["a", "b"], [Constant(0.2), 0], slot_dims=[1, 2])
    expected = {
        SGD(): {},
        Adagrad(0.1, 0.25): {"accumulators": 0.25},
        AdagradMomentum(): {"accumulators": 0.0, "momenta": 0.0},
        FTRL(): {"accumulators": 0.1, "linears": 0.0},
        Adam(): {"momenta": 0.0, "velocities": 0.0},
        custom: {"a": 0.2, "b": 0.0},
    }
    for optimizer, values in expected.items():
        assert optimizer.slot_initial_values == values
        assert optimizer.slot_names == tuple(values)
        slots = optimizer.init_slots((4, 3))
        assert tuple(slots) == tuple(values)
        for name, slot in slots.items():
            assert slot.shape == ((4,) if (optimizer, name) == (custom, "a") else (4, 3))
            assert slot.dtype == jnp.float32
            assert (slot == jnp.float32(values[name])).all()


def test_slot_variable_creation_fn_makes_the_slots():
    def create(shape, names, values):
        return {name: np.full(shape, value + 1) for name, value in zip(names, values, strict=True)}

    slots = FTRL(slot_variable_creation_fn=create).init_slots((2, 3))
    assert slots["accumulators"].dtype == jnp.float32
    assert (slots["accumulators"] == jnp.float32(1.1)).all()
    assert (slots["linears"] == 1.0).all()
    broken = Adagrad(slot_variable_creation_fn=lambda shape, names, values: {"a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"must return slots of shapes \{'accumulators': \(2, 3\)\}, got"):
        broken.init_slots((2, 3))


def test_learning_rates():
    rates = iter([0.5, 0.25])
    dynamic = SGD(lambda: next(rates))
    assert [float(dynamic.learning_rate_at(0)) for _ in range(2)] == [0.5, 0.25]
    schedule = optax.exponential_decay(0.8, 2, 0.25)
    partial = functools.partial(lambda step, scale: scale * step, scale=2.0)
    for optimizer, expected in [
        (SGD(0.5), [0.5, 0.5]),
        (SGD(np.float32(0.5)), [0.5, 0.5]),
        (Adam(schedule), [0.8, 0.2]),
        (Adam(jax.jit(schedule)), [0.8, 0.2]),
        (SGD(partial), [0.0, 4.0]),
        (SGD(halving), [1.0, 0.25]),
    ]:
        for at in (optimizer.learning_rate_at, jax.jit(optimizer.learning_rate_at)):
            values = [at(step) for step in (0, 2)]
            np.testing.assert_allclose(values, expected, rtol=1e-6)
            assert all(value.dtype == jnp.float32 and value.shape == () for value in values)
    with pytest.raises(ValueError, match="callable without arguments, which a compiled function would call"):
        jax.jit(SGD(lambda: 0.5).learning_rate_at)(0)
    # A traced number that the callable refers to is fine.
    assert jax.jit(lambda rate, step: SGD(lambda: rate).learning_rate_at(step))(0.5, 0) == 0.5


def test_schedules_equal_those_of_optax():
    cosine = optax.warmup_cosine_decay_schedule(0.25, 0.5, 4, 14, 0.1)
    stairs = optax.exponential_decay(0.5, 4, 0.8, staircase=True)
    power = optax.polynomial_schedule(0.5, 0.1, 2.0, 10)
    linear = optax.join_schedules([optax.linear_schedule(0.0, 0.5, 4), power], [4])
    steps = jnp.arange(20.0)
    for ours, theirs in (
        (CosineDecay(0.25, 10, 0.2, warmup_target=0.5, warmup_steps=4), cosine),
        (PolynomialDecay(0.5, 10, 0.1, warmup_steps=4, power=2.0), linear),
        (PolynomialDecay(0.5, 10, 0.1, power=2.0), power),
        (ExponentialDecay(0.5, 4, 0.8, staircase=True), stairs),
    ):
        np.testing.assert_allclose(ours(steps), theirs(steps), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "rate"),
    [
        (PolynomialDecay(0.5, 4 * 10**9, 0.0, warmup_steps=3 * 10**9), 0.25),
        (PolynomialDecay(0.5, 3 * 10**9, 0.0, cycle=True), 0.25),
        (CosineDecay(0.0, 10**10, warmup_target=1.0, warmup_steps=3 * 10**9), 0.5),
        (CosineDecay(0.5, 3 * 10**9), 0.25),
        (ExponentialDecay(1.0, 3 * 10**9, 0.25), 0.5),
        (ExponentialDecay(1.0, 3 * 10**9, 0.25, staircase=True), 1.0),
    ],
)
def test_schedules_over_more_steps_than_an_int32_holds(schedule, rate):
    for at in (schedule, jax.jit(schedule)):
        np.testing.assert_allclose(at(np.float32(1.5e9)), rate, rtol=1e-6)


finite = st.floats(-1e3, 1e3)
positive = st.floats(1e-6, 1e3)
rate = st.one_of(
    positive,
    st.builds(
        PolynomialDecay,
        *(positive, st.integers(1, 9), finite, positive, st.booleans()),
        warmup_steps=st.integers(0, 9),
    ),
    st.builds(CosineDecay, positive, st.integers(1, 9), warmup_target=st.none() | positive),
    st.builds(ExponentialDecay, positive, st.integers(1, 9), positive, st.booleans()),
    st.just(halving),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": rate,
        "clip_weight_min": st.floats(-1e3, 0.0),
        "clip_weight_max": st.floats(0.0, 1e3),
        "weight_decay_factor": finite,
        "multiply_weight_decay_factor_by_learning_rate": st.booleans(),
        "clipvalue": st.one_of(positive, st.tuples(st.floats(-1e3, 0.0), st.none())),
        "low_dimensional_packing_status": st.booleans(),
    },
)
own = st.one_of(
    st.just((SGD, {})),
    st.fixed_dictionaries({"initial_accumulator_value": positive}).map(lambda a: (Adagrad, a)),
    st.fixed_dictionaries({"exponent": positive, "use_nesterov": st.booleans()}).map(
        lambda a: (AdagradMomentum, a)
    ),
    st.fixed_dictionaries({"beta": positive, "multiply_linear_by_learning_rate": st.booleans()}).map(
        lambda a: (FTRL, a)
    ),
    st.fixed_dictionaries({"epsilon": positive, "bias_correction": st.booleans()}).map(lambda a: (Adam, a)),
    st.fixed_dictionaries(
        {"hyperparameters": st.lists(rate, max_size=2), "slot_initializers": st.tuples(finite)}
    ).map(
        lambda a: (
            CustomOptimizer,
            {"custom_computation": momentum_computation, "slot_names": ["m"], "slot_dims": [1], **a},
        )
    ),
)


@hypothesis.given(own, options)
def test_json_round_trip(own, options):
    cls, arguments = own
    optimizer = cls(**arguments, **options)
    again = optimizer_from_dict(json.loads(json.dumps(optimizer.to_dict(), allow_nan=False)))
    assert again == optimizer
    assert hash(again) == hash(optimizer)
    assert repr(again) == repr(optimizer)


def test_what_has_no_name_cannot_be_stored():
    for optimizer in (
        SGD(lambda: 0.1),
        SGD(optax.constant_schedule(0.1)),
        CustomOptimizer(lambda *operands: operands[1]),
        Adagrad(slot_variable_creation_fn=lambda *operands: {}),
    ):
        message = r"cannot be stored: .* has no registered name; pass a float, a schedule"
        with pytest.raises(ValueError, match=message):
            optimizer.to_dict()

    @dataclasses.dataclass(frozen=True)
    class Unregistered(SGD):
        pass

    with pytest.raises(ValueError, match="Unregistered cannot be stored: it has no registered name"):
        Unregistered().to_dict()
    for data, message in [
        ({"name": "sdg", "arguments": {}}, "unknown optimizer 'sdg'; known: .*'sgd'.*register_optimizer"),
        ({"name": "sgd", "arguments": {"learning_rate": {"function": "gone"}}}, "unknown function 'gone'"),
        (
            {"name": "sgd", "arguments": {"learning_rate": {"schedule": "gone", "arguments": {}}}},
            "unknown schedule 'gone'; known: .*cosine_decay.*register_schedule",
        ),
        ({"name": "sgd", "arguments": {"learning_rate": {"a": 1}}}, "its field 'learning_rate' is stored as"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer_from_dict(data)


def test_another_rule_inherits_no_promises():
    """Rows of its own would be left out of it, where the parent's rule only adds to them."""

    @dataclasses.dataclass(frozen=True)
    class L2(SGD):
        def rule(self, gradient, rows, slots, learning_rate, step):
            return rows - learning_rate * (gradient + 0.5 * rows), {}

    assert (SGD.is_additive, SGD.is_elementwise) == (True, True)
    assert (L2.is_additive, L2.is_elementwise) == (False, False)
    table, _ = sparse_update(L2(0.1), jnp.full((3, 1), 10.0), {}, np.array([2]), jnp.ones((1, 1)), 0)
    np.testing.assert_allclose(table[:, 0], [10.0, 10.0, 9.4], rtol=1e-6)

    class Decayed:
        def rule(self, gradient, rows, slots, learning_rate, step):
            return super().rule(gradient + 0.5 * rows, rows, slots, learning_rate, step)

    class Mixed(Decayed, SGD):
        pass

    assert (Mixed.is_additive, Mixed.is_elementwise) == (False, False)
    table, _ = sparse_update(Mixed(0.1), jnp.full((3, 1), 10.0), {}, np.array([2]), jnp.ones((1, 1)), 0)
    np.testing.assert_allclose(table[:, 0], [10.0, 10.0, 9.4], rtol=1e-6)

    class Stating(Decayed):
        is_elementwise = True

    class MixedStating(Stating, SGD):
        pass

    assert (MixedStating.is_additive, MixedStating.is_elementwise) == (False, True)

    @dataclasses.dataclass(frozen=True)
    class Renamed(SGD):
        name = "renamed"

    assert Renamed.is_additive


def test_registering_classes():
    @register_optimizer
    @dataclasses.dataclass(frozen=True)
    class SignSGD(Optimizer):
        name = "tests.sign_sgd"

        def rule(self, gradient, rows, slots, learning_rate, step):
            return rows - learning_rate * jnp.sign(gradient), {}

    @register_schedule
    @dataclasses.dataclass(frozen=True)
    class Inverse:
        name = "tests.inverse"
        scale: float

        def __call__(self, step):
            return self.scale / (1.0 + step)

    @register_optimizer
    @dataclasses.dataclass(frozen=True)
    class Doubled(SGD):
        name = "tests.doubled"
        twice: float = dataclasses.field(init=False)

        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "twice", 2 * self.learning_rate)

    optimizer = SignSGD(Inverse(0.5), clip_weight_max=1.0)
    for stored in (optimizer, Doubled(0.5)):
        assert optimizer_from_dict(stored.to_dict()) == stored
    assert optimizer_class("tests.sign_sgd") is SignSGD
    table, _ = sparse_update(optimizer, jnp.zeros((3, 1)), {}, np.array([2]), jnp.full((1, 1), -7.0), 1)
    assert table[:, 0].tolist() == [0.0, 0.0, 0.25]

    other = dataclasses.make_dataclass("Other", [], bases=(SGD,), namespace={"name": "sgd"}, frozen=True)
    with pytest.raises(ValueError, match="optimizer name 'sgd' is taken by"):
        register_optimizer(other)
    with pytest.raises(ValueError, match="must be a frozen dataclass with a class attribute `name` of its own"):
        register_optimizer(type("Nameless", (SGD,), {}))
    with pytest.raises(ValueError, match="must be a subclass of"):
        register_optimizer(Inverse)
    with pytest.raises(ValueError, match=r"function name 'tests.halving' is taken by"):
        register_function("tests.halving")(lambda step: step)


def test_custom_optimizer_gets_one_row_at_a_time():
    shapes = []

    def computation(gradient, embedding_table, slot_variables, learning_rate, hyperparameters):
        shapes.append([x.shape for x in (gradient, embedding_table, *slot_variables, learning_rate)])
        return embedding_table - learning_rate * gradient / jnp.linalg.norm(gradient), slot_variables[0] + 1

    optimizer = CustomOptimizer(computation, 1.0, ["counts"], [0.0], slot_dims=[1])
    gradients = jnp.array([[3.0, 4.0], [0.0, 2.0]])
    table, slots = sparse_update(
        optimizer, jnp.zeros((3, 2)), optimizer.init_slots((3, 2)), np.array([2, 0]), gradients, 0
    )
    assert shapes[0] == [(1, 2), (1, 2), (1, 1), ()]
    np.testing.assert_allclose(table, [[0.0, -1.0], [0.0, 0.0], [-0.6, -0.8]], rtol=1e-6)
    assert slots["counts"].tolist() == [1.0, 0.0, 1.0]
    broken = CustomOptimizer(lambda g, w, slots, rate, hyper: w, 1.0, ["m"], [0.0])
    with pytest.raises(ValueError, match=r"must return the row and its slots \('m',\), of sizes \[2, 2\]"):
        broken.update_rows(gradients, gradients, {"m": gradients}, 1.0, 0)


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(0.3, weight_decay_factor=0.1),
        Adagrad(optax.exponential_decay(0.3, 1, 0.5)),
        AdagradMomentum(0.3, 0.9, True),
        FTRL(0.3, l1_regularization_strength=0.01),
        Adam(0.3, clipvalue=0.1),
        CustomOptimizer(momentum_computation, 0.3, ["m"], [0.0], [0.9]),
    ],
    ids=lambda o: o.name,
)
def test_as_optax_is_update_rows_of_whole_parameters(optimizer):
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(11, 3)), jnp.float32), "b": [jnp.ones((11, 3))]}
    view = as_optax(optimizer)
    state = view.init(params)
    expected = jax.tree.map(lambda p: (p, optimizer.init_slots(p.shape)), params)
    update = jax.jit(view.update) if callable(optimizer.learning_rate) else view.update
    for step in range(3):
        gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        expected = jax.tree.map(
            lambda g, pair, step=step: optimizer.update_rows(
                g, pair[0], pair[1], optimizer.learning_rate_at(step), step
            ),
            gradients,
            expected,
        )
        for p, (rows, _) in [(params["a"], expected["a"]), (params["b"][0], expected["b"][0])]:
            np.testing.assert_allclose(p, rows, rtol=1e-6, atol=1e-6)
    for name in optimizer.slot_names:
        np.testing.assert_allclose(state.slots["a"][name], expected["a"][1][name], rtol=1e-6, atol=1e-6)
    assert state.step == 3


def test_as_optax_equals_optax():
    params = jnp.linspace(-1.0, 1.0, 33).reshape(11, 3)
    for ours, theirs in [
        (SGD(0.1), optax.sgd(0.1)),
        (Adam(0.1, sum_inside_sqrt=False), optax.adam(0.1, eps=1e-7)),
        (Adagrad(0.1), optax.adagrad(0.1, 0.1, eps=0.0)),
    ]:
        a, b = params, params
        ours = as_optax(ours)
        our_state, their_state = ours.init(a), theirs.init(b)
        for step in range(4):
            gradient = jnp.sin(params * (step + 1))
            updates, our_state = ours.update(gradient, our_state, a)
            a = optax.apply_updates(a, updates)
            with jax.numpy_dtype_promotion("standard"):
                updates, their_state = theirs.update(gradient, their_state, b)
            b = optax.apply_updates(b, updates)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_as_optax_of_an_unregistered_optimizer():
    optimizer = as_optax(UnregisteredOptimizer(stored="{}", reason="unknown optimizer 'gone'"))
    with pytest.raises(UnregisteredError, match="unknown optimizer 'gone'"):
        optimizer.init(jnp.zeros(3))


def test_as_optax_errors():
    view = as_optax(SGD())
    with pytest.raises(ValueError, match="as_optax needs the parameters"):
        view.update(jnp.ones(2), view.init(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"updates tables \[V, D\], got a parameter of shape \(2,\); set"):
        as_optax(CustomOptimizer(momentum_computation)).init(jnp.ones(2))
    with pytest.raises(ValueError, match=r"such as Adagrad\(0.05\), got GradientTransformation"):
        as_optax(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"floating-point arrays, got int32\[2\] for the parameter at \['a'\]"):
        view.init({"a": jnp.ones(2, jnp.int32)})
    with pytest.raises(ValueError, match=r"floating-point arrays, got 1.0 for the parameter at the root"):
        view.init(1.0)
    params = {"a": jnp.ones(2)}
    state = view.init(params)
    for wrong, found in [
        (jnp.ones((3, 2)), r"float32\[3, 2\]"),
        (jnp.ones(2, jnp.complex64), r"complex64\[2\]"),
        (None, "None"),
    ]:
        with pytest.raises(
            ValueError, match=rf"at \['a'\] must be floating point of its shape, \[2\], got {found}"
        ):
            view.update({"a": wrong}, state, params)
