"""Requests that are packed one by one and run together give what each gives alone."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.serve import EmbeddingForServing, ServingFunction
from jaxembed.serve.checks import BadIdError
from jaxembed.serve.rows import concatenate
from tests.serve import requests


def make(seed=0, **options):
    def model(params, activations, dense):
        pooled = activations["items"]["history"].sum(axis=1) + activations["user"].sum(axis=1)
        return {"score": pooled + dense["dense"].sum(axis=1), "user": activations["user"]}

    embedding = EmbeddingForServing(requests.FEATURE_CONFIG, requests.make_tables(seed))
    model = options.pop("model", model)
    return ServingFunction(
        embedding,
        model,
        dense_inputs=options.pop("dense_inputs", {"dense": 3}),
        weighted=requests.WEIGHTED,
        batch_sizes=(1, 4, 8),
        max_ids_per_row=requests.MAX_IDS,
        **options,
    )


FUNCTION = make()


def dense_of(rows, seed=0):
    return {"dense": np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)}


@given(st.lists(requests.requests(rows=(0, 1, 2, 5)), min_size=1, max_size=5), st.sampled_from([-1, 64]))
def test_together_as_alone(drawn, long):
    parts, expected = [], []
    for i, (inputs, weights, _, rows) in enumerate(drawn):
        parts.append(FUNCTION.pack(inputs, weights, dense_of(rows, i)))
        expected.append(FUNCTION(inputs, weights, dense_of(rows, i)))
    with pytest.MonkeyPatch.context() as patch:  # each piece by itself, or all in one gather
        patch.setattr("jaxembed.serve.rows._LONG", long)
        merged = concatenate(parts)
    assert len(merged) == sum(map(len, parts))
    assert merged.num_ids == sum(part.num_ids for part in parts)
    result = FUNCTION.run(merged)
    jax.tree.map(
        lambda found, *alone: np.testing.assert_allclose(found, np.concatenate(alone), rtol=1e-5, atol=1e-6),
        result,
        *expected,
    )


def test_pack_refuses_what_a_call_refuses():
    inputs = requests.random_inputs(0, 2) | {"user": [3, 50]}
    with pytest.raises(BadIdError, match=r"'user', row 1, position 0: id 50 is outside") as caught:
        FUNCTION.pack(inputs, None, dense_of(2))
    assert caught.value.feature == "user"


def test_programs_are_shared_between_versions():
    def model(params, activations, dense):
        return activations["user"] + dense["dense"].sum()

    first, second = make(0, model=model).warm_up(), make(1, model=model)
    assert second.share_programs(first)
    assert second.ready
    inputs = requests.random_inputs(1, 3)
    fresh = make(1, model=model)
    np.testing.assert_array_equal(second(inputs, None, dense_of(3)), fresh(inputs, None, dense_of(3)))
    assert second.compile_count == 0
    other = make(0)  # another model
    assert not other.share_programs(first)
    assert not other.ready


def test_programs_are_not_shared_where_dense_inputs_come_in_another_order():
    def model(params, activations, dense):
        return activations["user"][:, :1] + dense["a"] - 2 * dense["b"]

    def function(names):
        return make(0, model=model, dense_inputs=dict.fromkeys(names, 1))

    first, second = function("ab").warm_up(), function("ba")
    assert not second.share_programs(first)
    dense = {"a": np.ones((3, 1), np.float32), "b": np.zeros((3, 1), np.float32)}
    inputs = requests.random_inputs(1, 3)
    np.testing.assert_array_equal(second(inputs, None, dense), first(inputs, None, dense))


def test_padded_size():
    assert [FUNCTION.padded_size(n) for n in (1, 2, 4, 5, 8, 9, 17)] == [1, 4, 4, 8, 8, 9, 17]


FLAT_CONFIG = {name: requests.FEATURE_CONFIG["text"][i] for i, name in enumerate(("a", "b"))}


@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.sampled_from(["int32", "int64"]))
def test_flat_requests_pack_as_nested_ones(seed, rows, dtype):
    tables = requests.make_tables()
    function = ServingFunction(EmbeddingForServing(FLAT_CONFIG, tables), batch_sizes=(4,), max_ids_per_row=3)
    rng = np.random.default_rng(seed)
    bags = {
        n: [rng.integers(-1, c.table.vocabulary_size + 1, rng.integers(0, 5)).tolist() for _ in range(rows)]
        for n, c in FLAT_CONFIG.items()
    }
    ids = np.array([i for name in bags for bag in bags[name] for i in bag], dtype)
    lengths = np.array([[len(bag) for bag in bags[name]] for name in bags]).reshape(2, rows)

    def outcome(pack):
        try:
            packed = pack().packed
        except ValueError as e:
            return str(e)
        return packed.ids.tolist(), packed.splits.tolist()

    assert function.takes_flat
    assert outcome(lambda: function.pack_flat(ids, lengths)) == outcome(lambda: function.pack(bags))
