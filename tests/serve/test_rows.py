"""Requests that are packed one by one and run together give what each gives alone."""

import array

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed import RaggedTensor
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


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        ([5], [[3, 0]]),
        ([1, 2, 3], [[1, 1]]),
        ([1, 2], [[5, 0]]),
        ([], [[1, 1]]),
        ([1, 2], [[2, -1]]),
        ([1, 2], [[3, -1]]),
        ([1, 2], [2]),
        ([1, 2], [[1], [1]]),
        ([[1, 2]], [[1, 1]]),
        (np.array([1, 2], np.uint64), [[1, 1]]),
        (np.array([1, 2], np.int16), [[1, 1]]),
    ],
)
def test_lengths_that_do_not_fit_the_ids(ids, lengths):
    config = {"a": requests.FEATURE_CONFIG["text"][0]}
    function = ServingFunction(EmbeddingForServing(config, requests.make_tables()), batch_sizes=(4,))
    ids = ids if isinstance(ids, np.ndarray) else np.array(ids, np.int32)
    for dtype in (np.int32, np.int64):
        with pytest.raises(
            ValueError, match=r"lengths \[1, B\] ints of at least 0 that add up to N, got ids \["
        ):
            function.pack_flat(ids, np.array(lengths, dtype))


@pytest.mark.parametrize("kind", ["i1", "<i4", ">i4", ">i8", "u4", "u8"])
def test_lengths_of_any_type_of_integers(kind):
    config = {"a": requests.FEATURE_CONFIG["text"][0]}
    function = ServingFunction(
        EmbeddingForServing(config, requests.make_tables()), batch_sizes=(4,), max_ids_per_row=2
    )
    ids = np.array([1, 2, 3], np.int32)
    assert function.pack_flat(ids, np.array([[1, 2]], kind)).packed.splits.tolist() == [[0, 1, 3]]
    with pytest.raises(ValueError, match="row 1 has 3 ids; at most 2 are served"):
        function.pack_flat(ids, np.array([[0, 3]], kind))
    with pytest.raises(ValueError, match=r"lengths \[1, 2\] float32 of at least"):
        function.pack_flat(ids, np.array([[1, 2]], np.float32))


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_may_change_once_they_are_packed(order):
    def model(params, activations, dense):
        return sum(activations.values()) + dense["x"].sum(axis=1, keepdims=True)

    tables = requests.make_tables()
    function = ServingFunction(
        EmbeddingForServing({"a": FLAT_CONFIG["a"]}, tables),
        model,
        dense_inputs={"x": 2},
        weighted=["a"],
        batch_sizes=(4,),
    )
    rng = np.random.default_rng(0)

    def arrays(kind):
        ids, splits, weights = rng.integers(0, 7, 3).astype(kind), np.array([0, 1, 3]), np.ones(3, np.float32)
        dense = np.array([[1, 2], [3, 4]], np.float32, order=order)
        return ids, splits, weights, dense

    for kind in (np.int32, np.int64):
        for view in (False, True):  # read-only, of an array that is not
            for flat in (False, True):
                ids, splits, weights, dense = owned = arrays(kind)
                if view:
                    ids, splits, weights, dense = views = [array.view() for array in owned]
                    for array in views:
                        array.flags.writeable = False
                if flat:
                    rows = function.pack_flat(ids, np.array([[1, 2]]), {"x": dense})
                else:
                    rows = function.pack(
                        {"a": RaggedTensor(ids, splits)}, {"a": RaggedTensor(weights, splits)}, {"x": dense}
                    )
                assert all(array.flags.c_contiguous for array in rows.dense)
                want = function({"a": [ids[:1].tolist(), ids[1:].tolist()]}, None, {"x": dense.tolist()})
                for array in owned:
                    array[...] = -(10**6)
                np.testing.assert_allclose(function.run(rows), want, rtol=1e-6)


def test_bytes_are_packed_in_place():
    """Nobody can write to them."""
    function = ServingFunction(
        EmbeddingForServing({"a": FLAT_CONFIG["a"]}, requests.make_tables()),
        lambda params, activations, dense: dense["x"],
        dense_inputs={"x": 2},
        batch_sizes=(4,),
    )
    raw = np.ones((2, 2), np.float32).tobytes()
    ids = np.frombuffer(np.array([1, 2], np.int32).tobytes(), np.int32)
    written = memoryview(array.array("f", [1, 1, 1, 1])).toreadonly()
    for held in (raw, memoryview(raw), bytearray(raw), memoryview(bytearray(raw)).toreadonly(), written):
        dense = np.frombuffer(held, "<f4").reshape(2, 2)
        rows = function.pack_flat(ids, np.array([[1, 1]]), {"x": dense})
        assert np.shares_memory(rows.packed.ids, ids)
        lasting = held is raw or (isinstance(held, memoryview) and held.obj is raw)
        assert np.shares_memory(rows.dense[0], dense) == lasting
        assert np.shares_memory(function.pack({"a": [1, 2]}, None, {"x": dense}).dense[0], dense) == lasting


def test_lengths_whose_sum_does_not_fit_32_bits():
    config = {"a": requests.FEATURE_CONFIG["text"][0]}
    function = ServingFunction(
        EmbeddingForServing(config, requests.make_tables()), batch_sizes=(1,), max_ids_per_row=2**31 - 2
    )
    lengths = np.array([[2**31 - 2, 2**31 - 2, 5]])  # 1 in 32 bits
    with pytest.raises(ValueError, match=f"got ids .* that add up to {2**32 + 1}"):
        function.pack_flat(np.array([3], np.int32), lengths)
