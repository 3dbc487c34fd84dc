"""Configurations: TensorFlow's arguments, defaults and refusals; frozen, hashable, ordered."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxembed as je
from jaxembed.features import feature_tables
from jaxembed.initializers import Constant, Initializer, RandomUniform, TruncatedNormal

TABLE = je.TableConfig(10, 4, name="t")


def test_defaults():
    assert TABLE.initializer == TruncatedNormal(mean=0.0, stddev=0.5)
    assert TABLE.combiner == "mean"
    assert TABLE.dtype == jnp.float32
    assert TABLE.quantization_config is None
    feature = je.FeatureConfig(TABLE)
    assert (feature.max_sequence_length, feature.validate_weights_and_indices) == (0, True)
    assert feature.output_shape is None


def test_default_initializer_is_a_truncated_normal():
    values = np.asarray(TABLE.initializer(jax.random.key(0), (2000, 4), jnp.float32))
    assert np.abs(values).max() <= 2 * 0.5
    # The standard deviation of a normal truncated at two of its own.
    assert math.isclose(values.std(), 0.5 * 0.8796, rel_tol=0.03)


def test_the_ends_of_a_uniform_initializer_are_in_order():
    values = np.asarray(RandomUniform(-1, 2)(jax.random.key(0), (1000, 4)))
    assert -1 <= values.min() < -0.9
    assert 1.9 < values.max() < 2
    assert np.unique(RandomUniform(0.5, 0.5)(jax.random.key(0), (5, 4))).tolist() == [0.5]
    with pytest.raises(ValueError, match=r"minval must be at most maxval, got 0\.05 and -0\.05; swap them"):
        RandomUniform(0.05, -0.05)


def test_only_floats_of_an_initializer_become_floats():
    @dataclasses.dataclass(frozen=True)
    class Scaled(Initializer):
        scale: float = 1.0
        axis: int = 1
        mode: str = "fan_in"
        base: Initializer | None = None
        late: "float" = 2.0

    made = Scaled(scale=3, axis=2, late=4)
    assert (made.scale, made.axis, made.mode, made.base, made.late) == (3.0, 2, "fan_in", None, 4.0)
    assert [type(value) for value in (made.scale, made.axis, made.late)] == [float, int, float]
    with pytest.raises(ValueError, match="Scaled: late must be a finite number, got inf"):
        Scaled(late=float("inf"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary_size": 0}, "vocabulary_size must be at least 1, got 0"),
        ({"vocabulary_size": 1.5}, "vocabulary_size must be an int, got 1.5"),
        ({"vocabulary_size": 2**31}, "hash the ids into fewer buckets"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 2**31}, "dim must be below"),
        ({"initializer": 3}, "initializer must be callable"),
        ({"optimizer": "sgd"}, "optimizer must be one of jaxembed.optimizers or None, got 'sgd'"),
        ({"combiner": "max"}, "combiner must be one of .* got 'max'"),
        ({"combiner": 3}, "combiner must be one of"),
        ({"name": None}, "TableConfig needs a name, got None"),
        ({"dtype": "int32"}, "dtype must be a floating point type, got int32"),
        ({"dtype": "nonsense"}, "dtype must be a floating point type, got 'nonsense'"),
        ({"dtype": "a8"}, "dtype must be a floating point type, got 'a8'"),
        ({"quantization_config": 8}, "quantization_config must be a QuantizationConfig"),
    ],
)
def test_table_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        je.TableConfig(**({"vocabulary_size": 10, "dim": 4, "name": "t"} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": "t"}, "table must be a TableConfig, got 't'"),
        ({"max_sequence_length": -1}, "max_sequence_length must be at least 0, got -1"),
        ({"max_sequence_length": 2**31}, "max_sequence_length must be below"),
        (
            {"validate_weights_and_indices": "no"},
            "validate_weights_and_indices must be True or False, got 'no'",
        ),
        ({"validate_weights_and_indices": None}, "must be True or False, got None"),
        ({"output_shape": [2, 0]}, "output_shape must hold ints of at least 1"),
        ({"output_shape": [2.5]}, "output_shape must be ints or None"),
        ({"name": 3}, "name must be a str or None, got 3"),
    ],
)
def test_feature_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        je.FeatureConfig(**({"table": TABLE} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0.0, 1.0), "num_buckets must be at least 2, got 1"),
        ((4, 1.0, 1.0), "lower must be finite and below upper"),
        ((4, float("nan"), 1.0), "lower must be finite and below upper"),
    ],
)
def test_quantization_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        je.QuantizationConfig(*arguments)


def test_frozen_equal_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLE.dim = 5
    same = je.TableConfig(10, 4, name="t")
    assert same == TABLE
    assert hash(same) == hash(TABLE)
    assert je.FeatureConfig(TABLE, output_shape=[2, 3]).output_shape == (2, 3)
    assert hash(je.FeatureConfig(TABLE, output_shape=[2, 3])) == hash(
        je.FeatureConfig(same, output_shape=(2, 3))
    )


def test_dict_of_tables_is_a_pytree_in_the_order_of_names():
    names = ["b", "c", "a"]
    tables = {je.TableConfig(10, 4, name=name): jnp.full(1, ord(name)) for name in names}
    doubled = jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t))(tables)
    assert [config.name for config in sorted(doubled)] == ["a", "b", "c"]
    assert {config.name: int(x[0]) for config, x in doubled.items()} == {n: 2 * ord(n) for n in names}


def test_tables_of_one_name_must_be_equal():
    feature = je.FeatureConfig(TABLE)
    assert feature_tables([feature, feature]) == {"t": TABLE}
    other = je.FeatureConfig(dataclasses.replace(TABLE, initializer=Constant(1.0)))
    with pytest.raises(ValueError, match=r"two tables are named 't' but differ.*rename one"):
        feature_tables([feature, other])
    with pytest.raises(ValueError, match="are both named 'x'"):
        feature_tables([je.FeatureConfig(TABLE, name="x")] * 2)
    with pytest.raises(ValueError, match="must be a structure of FeatureConfig, got TableConfig at '0'"):
        feature_tables([TABLE])
    with pytest.raises(ValueError, match="at least one FeatureConfig"):
        feature_tables({})


@pytest.mark.parity
@pytest.mark.parametrize("name", ["TableConfig", "FeatureConfig", "QuantizationConfig"])
def test_arguments_and_defaults_are_those_of_tensorflow(name):
    tf = pytest.importorskip("tensorflow")
    theirs = inspect.signature(getattr(tf.tpu.experimental.embedding, name)).parameters
    ours = inspect.signature(getattr(je, name)).parameters
    shared = [argument for argument in theirs if argument != "layout"]
    assert list(ours)[: len(shared)] == shared
    differ = {"TableConfig": {"name", "dtype"}}.get(name, set())  # a table must have a name; types are JAX's
    for argument in set(shared) - differ:
        assert ours[argument].default == theirs[argument].default, argument
