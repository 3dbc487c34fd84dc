"""The JSON round trip of feature configurations is exact, and hostile JSON is refused without running anything."""

import collections
import dataclasses
import enum
import json
import math
import subprocess
import sys
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed import FeatureConfig, QuantizationConfig, TableConfig, initializers, optimizers
from jaxembed.combiners import CustomCombiner, register_combiner
from jaxembed.features import feature_tables
from jaxembed.names import UnregisteredError
from jaxembed.serialization import feature_config_from_json, feature_config_to_json, strict_json
from jaxembed.train import ShardedEmbedding

Pair = collections.namedtuple("Pair", ["left", "right"])


@initializers.register_initializer
@dataclasses.dataclass(frozen=True)
class Staircase(initializers.Initializer):
    name: ClassVar[str] = "test_staircase"
    height: float = 1.0

    def __call__(self, key, shape, dtype=jnp.float32):
        return jnp.broadcast_to(self.height * jnp.arange(shape[0], dtype=dtype)[:, None], shape)


@initializers.register_initializer
@dataclasses.dataclass(frozen=True)
class Tiled(initializers.Initializer):
    name: ClassVar[str] = "test_tiled"
    tile: Any = ((1.0, 2.0), (3.0,))


@optimizers.register_schedule
@dataclasses.dataclass(frozen=True)
class Milestones:
    name: ClassVar[str] = "test_milestones"
    steps: tuple[int, ...] = (10, 20)

    def __call__(self, step):
        return 0.1 * 0.5 ** (step >= jnp.array(self.steps)).sum()


@optimizers.register_optimizer
@dataclasses.dataclass(frozen=True)
class Scaled(optimizers.SGD):
    name: ClassVar[str] = "test_scaled"
    scales: Any = ((1.0,), (2.0, 3.0))


@optimizers.register_function("test_serialization.sgd")
def sgd_by_hand(gradient, weights, slots, learning_rate, hyperparameters):
    return weights - learning_rate * gradient, slots


@register_combiner("test_serialization.total")
def total(valency, vectors, weights=None):
    return vectors.sum(axis=0)


finite = st.floats(-1e30, 1e30)
positive = st.floats(1e-6, 1e6)
initializer = st.one_of(
    st.none(),
    st.builds(initializers.TruncatedNormal, finite, positive),
    st.tuples(finite, finite).map(lambda ends: initializers.RandomUniform(*sorted(ends))),
    st.builds(initializers.Constant, finite),
    st.builds(Staircase, finite),
    st.just(Tiled()),
)
optimizer = st.one_of(
    st.none(),
    st.builds(optimizers.SGD, positive, weight_decay_factor=st.none() | positive),
    st.builds(optimizers.Adagrad, positive, clipvalue=st.none() | positive),
    st.builds(optimizers.Adam, positive),
    st.just(optimizers.SGD(optimizers.CosineDecay(0.5, 100))),
    st.just(Scaled(Milestones())),
    st.just(optimizers.CustomOptimizer(sgd_by_hand, 0.1, ["a.b"], [0.5], [1.0, 2.0], slot_dims=[1])),
)
quantization = st.none() | st.builds(QuantizationConfig, st.integers(2, 256), st.just(-1.5), positive)
# Text without surrogates, which cannot be written to a file.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@st.composite
def feature_configs(draw):
    names = draw(st.lists(text.filter(bool), min_size=1, max_size=4, unique=True))
    tables = [
        TableConfig(
            draw(st.integers(1, 2**31 - 1)),
            draw(st.integers(1, 512)),
            draw(initializer),
            draw(optimizer),
            draw(st.sampled_from(["mean", "sum", "sqrtn"])),
            name,
            draw(quantization),
            draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        )
        for name in names
    ]
    feature = st.builds(
        FeatureConfig,
        st.sampled_from(tables),
        st.integers(0, 9),
        st.booleans(),
        st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=3),
    )
    key = text.filter(lambda t: "/" not in t)
    trees = st.recursive(
        feature,
        lambda inner: st.one_of(
            st.dictionaries(key, inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.builds(Pair, inner, inner),
        ),
        max_leaves=6,
    )
    return draw(trees)


@given(feature_configs())
def test_round_trip_is_exact(config):
    stored = feature_config_to_json(config)
    again = feature_config_from_json(stored)
    assert again == config
    assert hashes(again) == hashes(config)
    assert describe(again) == describe(config)
    assert feature_config_to_json(again) == stored


def hashes(config):
    return [hash(table) for table in feature_tables(config).values()]


def describe(tree):
    """Containers with their types, which == does not tell apart for tuples."""
    if isinstance(tree, dict):
        return {key: describe(child) for key, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree).__name__, tree._fields, [describe(child) for child in tree]
    if isinstance(tree, list | tuple):
        return type(tree).__name__, [describe(child) for child in tree]
    return repr(tree)


def table(**changes):
    return TableConfig(**{"vocabulary_size": 8, "dim": 4, "name": "t", **changes})


def test_what_has_no_name_cannot_be_stored():
    lambda_ = table(initializer=lambda key, shape, dtype: jnp.zeros(shape, dtype))
    with pytest.raises(ValueError, match=r"initializer of table 't' cannot be stored.*register_initializer"):
        feature_config_to_json(FeatureConfig(lambda_))
    with pytest.raises(ValueError, match=r"learning_rate cannot be stored.*register_function"):
        feature_config_to_json(FeatureConfig(table(optimizer=optimizers.SGD(lambda: 0.1))))
    with pytest.raises(ValueError, match="keys must be str to be stored, got 3"):
        feature_config_to_json({3: FeatureConfig(table())})


def test_what_is_not_json_cannot_be_stored():
    for changes, message in (
        ({"initializer": Tiled(np.float32)}, "initializer Tiled of table 't'"),
        ({"initializer": Tiled((math.inf,))}, "initializer Tiled of table 't'"),
        ({"optimizer": Scaled(scales=b"x")}, "table 't': the optimizer Scaled"),
    ):
        with pytest.raises(ValueError, match=f"{message} cannot be stored: .*are not all JSON"):
            feature_config_to_json(FeatureConfig(table(**changes)))


class Mode(enum.StrEnum):
    IN = "in"


@pytest.mark.parametrize(
    "tile", [initializers.Constant(1.0), [0.1], {"a": 1}, ((0.1, [0.2]),), Pair(0.0, 1.0), (Mode.IN,)]
)
def test_fields_that_would_come_back_otherwise_cannot_be_stored(tile):
    with pytest.raises(ValueError, match="initializer Tiled of table 't' cannot be stored: its field 'tile'"):
        feature_config_to_json(FeatureConfig(table(initializer=Tiled(tile))))
    with pytest.raises(ValueError, match=r"table 't': test_scaled\.scales cannot be stored: "):
        feature_config_to_json(FeatureConfig(table(optimizer=Scaled(scales=tile))))


@pytest.mark.parametrize("value", ['{"base": {"value": 1.0}}', '[[{"schedule": 1}]]'])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initializer": Tiled(7)}, "initializer 'test_tiled' cannot be read: its field 'tile'"),
        ({"optimizer": Scaled(scales=7)}, "optimizer 'test_scaled' cannot be read: its field 'scales'"),
        ({"optimizer": Scaled(Milestones(7))}, "schedule 'test_milestones' cannot be read: its field 'steps'"),
    ],
)
def test_dicts_that_earlier_versions_stored_are_kept(changes, message, value):
    """Of nested dataclasses, which a class takes without a word."""
    stored = feature_config_to_json(FeatureConfig(table(**changes))).replace(": 7}", f": {value}}}")
    with pytest.raises(UnregisteredError, match=f"table 't': {message} is stored as .*, which no field"):
        feature_config_from_json(stored)
    kept = feature_config_from_json(stored, keep_unregistered=True)
    assert value in feature_config_to_json(kept) == stored
    assert {kept.table} == {feature_config_from_json(stored, keep_unregistered=True).table}


@pytest.mark.parametrize(
    ("changes", "old", "message"),
    [
        ({"initializer": Staircase(0.5)}, '"height"', "initializer 'test_staircase' .*Staircase"),
        ({"optimizer": Scaled(0.5)}, '"scales"', "optimizer 'test_scaled' .*Scaled"),
        ({"optimizer": Scaled(Milestones())}, '"steps"', "schedule 'test_milestones' .*Milestones"),
    ],
)
def test_classes_that_no_longer_take_what_is_stored(changes, old, message):
    """A field of one's own that was renamed: who serves or inspects needs neither optimizer nor initializer."""
    message += " does not take the arguments that are stored, .*'renamed'"
    stored = feature_config_to_json(FeatureConfig(table(**changes))).replace(old, '"renamed"')
    with pytest.raises(UnregisteredError, match=f"table 't': {message}"):
        feature_config_from_json(stored)
    kept = feature_config_from_json(stored, keep_unregistered=True)
    assert feature_config_to_json(kept) == stored
    optimizer = None if "optimizer" in changes else optimizers.SGD(0.1)
    mesh = jax.make_mesh((1,), ("d",), devices=jax.devices()[:1])
    with pytest.raises(UnregisteredError, match=message):
        ShardedEmbedding(kept, optimizer, mesh).init(jax.random.key(0))


def test_custom_combiner_comes_back():
    for combiner in (CustomCombiner(total, 4), CustomCombiner(total, 3, 2, initializers.Constant(0.5))):
        config = {"x": FeatureConfig(table(combiner=combiner))}
        assert feature_config_from_json(feature_config_to_json(config)) == config
    unnamed = CustomCombiner(lambda valency, vectors: vectors.sum(axis=0), 4)
    with pytest.raises(ValueError, match="cannot be stored: it has no registered name"):
        feature_config_to_json(FeatureConfig(table(combiner=unnamed)))
    stored = feature_config_to_json({"x": FeatureConfig(table(combiner=CustomCombiner(total, 4)))})
    with pytest.raises(ValueError, match=r"unknown combiner 'os\.system'"):
        feature_config_from_json(stored.replace("test_serialization.total", "os.system"))


def test_an_unregistered_initializer_of_a_combiner_is_kept():
    combiner = CustomCombiner(total, 3, 2, Staircase(0.5))
    stored = feature_config_to_json({"x": FeatureConfig(table(combiner=combiner))}).replace("staircase", "gone")
    with pytest.raises(ValueError, match="unknown initializer 'test_gone'"):
        feature_config_from_json(stored)
    kept = feature_config_from_json(stored, keep_unregistered=True)
    assert feature_config_to_json(kept) == stored
    with pytest.raises(ValueError, match="unknown initializer 'test_gone'"):
        kept["x"].table.combiner.initializer(jax.random.key(0), (2,))


def edited(**changes):
    data = json.loads(feature_config_to_json({"x": FeatureConfig(table())}))
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = data
        for part in parents:
            at = at[int(part) if isinstance(at, list) else part]
        at[last] = value
    return json.dumps(data)


deep = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "": "not valid JSON",
    "[1": "not valid JSON",
    "NaN": "NaN is not JSON",
    deep: "not valid JSON: ",
    '{"version": 1, "version": 1}': "'version' is there twice",
    "[]": "not a feature configuration: TypeError",
    "{}": "not a feature configuration: KeyError: 'version'",
    '{"version": 2}': r"format version 2, this jaxembed reads 1; upgrade",
    '{"version": ' + "9" * 5000 + "}": "not valid JSON",
    edited(tables=[]): "has no table 't'",
    edited(tables="abc"): "not a feature configuration",
    edited(tables__0__vocabulary_size=10**40): "vocabulary_size and dim must be ints below",
    edited(tables__0__dim=1.5): "vocabulary_size and dim must be ints below",
    edited(tables__0__dim=True): "vocabulary_size and dim must be ints below",
    edited(tables__0__dim=-4): "vocabulary_size and dim must be ints below",
    edited(tables__0__dtype="int8"): "dtype must be a floating point type",
    edited(tables__0__dtype="os.system"): "dtype must be a floating point type",
    edited(tables__0__name=None): "needs a name",
    edited(tables__0__combiner="max"): "combiner must be one of",
    edited(tables__0__initializer__name="os.system"): "unknown initializer 'os.system'",
    edited(tables__0__initializer__name=[]): "not a feature configuration: TypeError",
    edited(tables__0__initializer__arguments={"stddev": 10**400}): "does not take .*OverflowError",
    edited(tables__0__initializer__arguments={"x": 1}): "table 't': .*TruncatedNormal does not .*'x'",
    edited(tables__0__initializer__arguments=[]): "not a feature configuration: AttributeError",
    edited(tables__0__optimizer={"name": "os.system", "arguments": {}}): "unknown optimizer 'os.system'",
    edited(tables__0__quantization_config={"num_buckets": 1, "lower": 0, "upper": 1}): "at least 2",
    edited(features={}): "a structure has the keys",
    edited(features={"list": {}}): "a structure cannot be 'list'",
    edited(features={"import": []}): "a structure cannot be 'import'",
    edited(features={"dict": {}, "list": []}): "a structure has the keys",
    edited(features={"list": []}): "at least one FeatureConfig",
    edited(features={"namedtuple": "a b", "fields": {}}): "cannot name a namedtuple",
    edited(features={"namedtuple": "x=__import__('os')", "fields": {}}): "cannot name a namedtuple",
    edited(features={"namedtuple": "class", "fields": {}}): "cannot name a namedtuple",
    edited(features={"namedtuple": 3, "fields": {}}): "cannot name a namedtuple",
    edited(features={"namedtuple": "X", "fields": {"_f": {}}}): "cannot start with '_'",
    edited(features__dict__x__feature__max_sequence_length=2**31): "max_sequence_length an int below",
    edited(features__dict__x__feature__validate_weights_and_indices="no"): "must be true or false",
    edited(features__dict__x__feature__output_shape=["a"]): "output_shape must be ints",
    edited(features__dict__x__feature__output_shape=[-1]): "output_shape must hold ints of at least 1",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:40])
def test_hostile_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=HOSTILE[text]):
        feature_config_from_json(text)


def test_deep_structure_is_a_value_error():
    nested = '{"list": [' * 50_000 + "]}" * 50_000
    with pytest.raises(ValueError, match="not "):
        feature_config_from_json('{"version": 1, "tables": [], "features": ' + nested + "}")


@given(st.data())
def test_mutated_json_raises_value_error_or_loads(data):
    source = bytearray(edited().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        source[data.draw(st.integers(0, len(source) - 1))] = data.draw(st.integers(0, 255))
    try:
        config = feature_config_from_json(bytes(source).decode(errors="replace"))
    except ValueError:
        return
    assert feature_config_from_json(feature_config_to_json(config)) == config


def test_json_text_must_be_text():
    with pytest.raises(ValueError, match="not valid JSON"):
        strict_json(3)  # pyright: ignore[reportArgumentType]


def test_loading_imports_nothing_more():
    """A name in the JSON never makes Python import a module of that name."""
    program = (
        "import sys; from jaxembed.serialization import feature_config_from_json as f\n"
        "before = set(sys.modules)\n"
        "try: f(sys.argv[1])\n"
        "except ValueError: pass\n"
        "else: raise SystemExit('accepted')\n"
        "raise SystemExit(str(set(sys.modules) - before) if set(sys.modules) - before else 0)"
    )
    hostile = edited(tables__0__initializer__name="antigravity.fly")
    done = subprocess.run([sys.executable, "-c", program, hostile], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_restored_initializer_draws_the_same_values():
    config = feature_config_from_json(feature_config_to_json(FeatureConfig(table(initializer=Staircase(2.0)))))
    values = config.table.initializer(jax.random.key(0), (3, 2), jnp.float32)
    assert values.tolist() == [[0, 0], [2, 2], [4, 4]]


def test_a_key_among_many_that_is_there_twice():
    """Found without looking at every pair."""
    text = "{" + ",".join(f'"k{i}":1' for i in range(200_000)) + ',"k199999":1}'
    with pytest.raises(ValueError, match="key 'k199999' is there twice"):
        strict_json(text)
