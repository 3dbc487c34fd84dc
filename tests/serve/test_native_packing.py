"""NativePacker: takes the usual requests as Packer does, and leaves everything else to it."""

import ctypes
import os
import sys
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed import FeatureConfig, RaggedTensor, TableConfig
from jaxembed.serve import EmbeddingForServing, ServingFunction, native_packing
from jaxembed.serve.buffers import Buffers
from jaxembed.serve.features import served_features
from jaxembed.serve.ladder import Rung
from jaxembed.serve.layout import Layout
from jaxembed.serve.native_packing import NativePacker
from jaxembed.serve.packing import Packer

# Not in `make sanitize`, which would pass having tested nothing.
pytestmark = pytest.mark.skipif(
    not NativePacker.available and "JAXEMBED_SANITIZED" not in os.environ,
    reason="the native code was not built",
)

CONFIG = {
    "long": FeatureConfig(TableConfig(1000, 4, combiner="sum", name="large")),
    "short": FeatureConfig(TableConfig(3, 4, combiner="mean", name="small")),
}
FEATURES = served_features(CONFIG, {"long": 5, "short": 2}, ["short"])
LAYOUT = Layout(FEATURES, shared=True)
GOOD = [
    RaggedTensor([7, 999, 0], np.array([0, 3, 3], np.int32)),
    RaggedTensor([2], np.array([0, 0, 1], np.int32)),
]


def of_type(leaf, ids=np.int32, splits=np.int32):
    return RaggedTensor(np.array(leaf.values, ids), np.array(leaf.row_splits, splits))


def written(leaves, batch=4):
    buffers = Buffers(LAYOUT, Rung(batch, 5))
    packer = NativePacker(FEATURES)
    rows = packer.rows(leaves)
    assert rows is not None
    return packer.write(leaves, rows, buffers), buffers


@st.composite
def bags(draw):
    rows = draw(st.integers(0, 4))
    kinds = st.sampled_from([np.int32, np.int64])
    ids, splits = draw(kinds), draw(kinds)
    leaves = []
    for limit, vocabulary in ((5, 1000), (2, 3)):
        lists = st.lists(st.integers(0, vocabulary - 1), max_size=limit)
        drawn = [draw(lists) for _ in range(rows)]
        leaves.append(of_type(RaggedTensor.from_lists(drawn), ids, splits))
    return leaves


@given(bags())
def test_packs_as_the_packer_does(leaves):
    good, buffers = written(leaves)
    assert good
    packer = Packer(FEATURES)
    ids, weights = np.empty(LAYOUT.size(Rung(4, 5)), np.int32), np.empty(LAYOUT.size(Rung(4, 5)), np.float32)
    expected = packer.write(packer.measure(leaves, None), ids, weights, 4)
    total = expected.splits[-1, -1]
    np.testing.assert_array_equal(buffers.splits, expected.splits)
    np.testing.assert_array_equal(buffers.ids[:total], ids[:total])
    np.testing.assert_array_equal(buffers.weights[:total], 1)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("values", "splits"),
    [([7, 1000, 0], [0, 3, 3]), ([7, -1, 0], [0, 3, 3]), ([1] * 6, [0, 6, 6]), ([1, 2, 3, 4], [0, 1, 3])],
    ids=["id V", "id -1", "too many ids", "padding"],
)
def test_leaves_what_is_wrong_or_unusual(values, splits, dtype):
    leaf = RaggedTensor(np.array(values, dtype), np.array(splits, dtype))
    good, _ = written([leaf, of_type(GOOD[1], dtype, dtype)])
    assert not good


@pytest.mark.parametrize("value", [2**32, -(2**63), 2**63 - 1])
def test_wide_ids_do_not_wrap_around(value):
    good, _ = written([RaggedTensor(np.array([value]), np.array([0, 1])), of_type(GOOD[1], np.int64, np.int64)])
    assert not good


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("value", [-1, 4, 2**31 - 1, -(2**31)])
def test_splits_that_changed_since_they_were_checked(at, value, dtype):
    leaf = of_type(GOOD[0], splits=dtype)
    leaf.row_splits[at] = value
    good, _ = written([leaf, of_type(GOOD[1], splits=dtype)])
    assert not good


def test_other_arrays_are_left():
    strided = RaggedTensor(np.arange(6, dtype=np.int32)[::2], np.array([0, 3, 3], np.int32))
    swapped = RaggedTensor(np.array([1], ">i4"), np.array([0, 1, 1], np.int32))
    on_device = RaggedTensor(jax.numpy.array([1]), np.array([0, 1, 1], np.int32))
    three = RaggedTensor(np.array([1], np.int32), np.array([0, 1, 1, 1], np.int32))
    floats = RaggedTensor(np.array([1], np.float32), np.array([0, 1, 1], np.int32))
    records = np.zeros(4, np.dtype([("pad", np.int8), ("id", np.int32)], align=False))
    unaligned = RaggedTensor(records.view(np.int8)[1:17].view(np.int32), np.array([0, 4, 4], np.int32))
    swapped_splits = RaggedTensor(np.array([1], np.int32), np.array([0, 1, 1], ">i4"))
    assert not unaligned.values.flags.aligned
    for leaf in (
        strided,
        swapped,
        on_device,
        three,
        floats,
        unaligned,
        swapped_splits,
        of_type(GOOD[0], np.uint32),
        of_type(GOOD[0], np.int16),
        of_type(GOOD[0], np.timedelta64),
    ):
        assert not written([of_type(GOOD[0]), leaf])[0]
        assert not written([leaf, of_type(GOOD[1])])[0]
    assert NativePacker(FEATURES).rows([[[1]], GOOD[1]]) is None


@pytest.mark.parametrize("kind", [np.int64, np.intc, np.long, np.longlong])  # types of C, some of one size
def test_features_may_be_of_different_types(kind):
    good, buffers = written([of_type(GOOD[0], kind), of_type(GOOD[1], splits=kind)])
    assert good
    assert buffers.ids[:4].tolist() == [7, 999, 0, 2]
    assert buffers.splits[1].tolist() == [3, 3, 4, 4, 4]


def test_long_requests():
    wide = served_features(CONFIG, {"long": 50_000, "short": 2}, [])
    buffers = Buffers(Layout(wide, shared=True), Rung(1, 50_000))
    ids = np.arange(50_000) % 1000
    leaves = [RaggedTensor(ids, np.array([0, 50_000])), RaggedTensor(np.zeros(0, np.int32), np.array([0, 0]))]
    assert NativePacker(wide).write(leaves, 1, buffers)
    np.testing.assert_array_equal(buffers.ids[:50_000], ids)
    assert buffers.splits.tolist() == [[0, 50_000], [50_000, 50_000]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of setting these attributes
@pytest.mark.parametrize("change", ["type", "shape"])
def test_arrays_that_change_while_they_are_packed(change):
    """By another thread, while the interpreter is not needed: nothing is written where there is no room."""
    first, second = 2_000_000, 1000
    room = first + second
    ids, splits = np.empty(room + second, np.int32), np.zeros((2, 2), np.int32)
    limits = (ctypes.c_uint32 * 2)(2**31 - 1, 2**31 - 1)
    long = RaggedTensor(np.zeros(first, np.int32), np.array([0, first], np.int32))
    for _ in range(5):
        leaf = RaggedTensor(np.ones(second, np.int64), np.array([0, second], np.int32))
        begin = threading.Event()

        def alter(leaf=leaf, begin=begin):
            begin.wait()
            time.sleep(0.0005)
            if change == "type":
                leaf.values.dtype = np.int32
            else:
                leaf.values.shape = (second // 2, 2)
            leaf.row_splits[1] = leaf.values.shape[0]

        thread = threading.Thread(target=alter)
        thread.start()
        ids[room:] = -7
        begin.set()
        addresses = [ctypes.addressof(limits)] * 2 + [1, 1, room, ids.ctypes.data, splits.ctypes.data]
        total = native_packing._PACK([long, leaf], RaggedTensor, *addresses)
        thread.join()
        assert (ids[room:] == -7).all()
        assert total in (-1, room)
        if total == room:
            assert splits[1].tolist() == [first, room]


def test_nothing_is_kept():
    leaves = [of_type(GOOD[0]), of_type(GOOD[1])]
    counts = [sys.getrefcount(leaf.values) for leaf in leaves]
    for _ in range(100):
        assert written(leaves)[0]
        assert not written([leaves[0], leaves[0]])[0]  # one id has no row there
    assert [sys.getrefcount(leaf.values) for leaf in leaves] == counts
    leaves[0].values.resize(7, refcheck=True)  # which numpy refuses where a buffer is still taken


def test_more_ids_than_there_is_room_for_are_left():
    many = RaggedTensor(np.zeros(100, np.int32), np.array([0, 100], np.int32))
    assert not written([many, RaggedTensor(np.zeros(1, np.int32), np.array([0, 1], np.int32))], batch=1)[0]


def test_results_and_errors_are_the_same_without_it(monkeypatch):
    rows = {
        "large": np.arange(4000, dtype=np.float32).reshape(1000, 4),
        "small": np.eye(3, 4, dtype=np.float32),
    }
    function = ServingFunction(EmbeddingForServing(CONFIG, rows), max_batch_size=2, max_ids_per_row=5).warm_up()
    request = dict(zip(CONFIG, map(of_type, GOOD), strict=True))
    bad = {**request, "short": RaggedTensor(np.array([3], np.int32), np.array([0, 0, 1], np.int32))}
    results, errors = [], []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(NativePacker, "available", False)
        results.append(function(request))
        with pytest.raises(ValueError, match="id 3 is outside of table 'small'") as caught:
            function(bad)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    for name in CONFIG:
        np.testing.assert_array_equal(results[0][name], results[1][name])
