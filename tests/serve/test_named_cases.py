"""The cases that a service meets, against a ServingModel: each refused with its place, and the next request served."""

import numpy as np
import pytest

from jaxembed import RaggedTensor
from jaxembed.serve import ServingModel
from tests.serve import bundles, requests

NAN, INF = float("nan"), float("inf")
HISTORY = "items/history"  # of table "items", with 70 rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    checkpoint = bundles.make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    out = bundles.convert(checkpoint, tmp_path_factory.mktemp("bundle"), exported=bundles.export())
    return ServingModel(out, max_batch_size=2).warm_up()


@pytest.fixture(autouse=True)
def good_requests_go_on(model):
    request = requests.random_inputs(0, 2), None, bundles.dense_rows(2)
    expected, count = model(*request), model.compile_count
    yield
    np.testing.assert_array_equal(model(*request)["score"], expected["score"])
    assert model.compile_count == count


def ask(model, history, weights=None, rows=2):
    leaves = {path: [[0]] * rows for path in requests.PATHS} | {HISTORY: history}
    weights = weights and requests.nest({HISTORY: weights})
    return model(requests.nest(leaves), weights, bundles.dense_rows(rows))["score"]


@pytest.mark.parametrize("bad", [-5, 70, 2**31 - 1, 2**31, 2**40, -(2**40), 2**63, 2**100])
@pytest.mark.parametrize("form", ["lists", "ragged", "dense"])
def test_ids_out_of_range(model, bad, form):
    where = rf"Feature '{HISTORY}', row 1, position 1: id {bad} is outside of table 'items' .* in \[0, 70\)"
    if form == "lists":
        leaf = [[1, 2], [3, bad]]
    elif form == "ragged":
        if not -(2**63) <= bad < 2**63:
            pytest.skip("no array holds it")
        leaf = RaggedTensor(np.array([1, 2, 3, bad], np.int64), np.array([0, 2, 4]))
    else:
        leaf, where = [3, bad], where.replace("position 1", "position 0")
        if not -(2**63) <= bad < 2**63:
            where = f"Feature '{HISTORY}', row 1, position 0: id .* is outside of table"
    with pytest.raises(ValueError, match=where):
        ask(model, leaf)


@pytest.mark.parametrize("bad", [1.5, 1.0, NAN, "7", b"7", None, True, [1]])
def test_ids_that_are_no_integers(model, bad):
    with pytest.raises(ValueError, match=rf"Feature '{HISTORY}', row 1, position 1: ids must be ints, got "):
        ask(model, [[1, 2], [3, bad]])


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e39, "1", None])
def test_weights_that_are_no_numbers(model, bad):
    with pytest.raises(
        ValueError, match=rf"Weight for '{HISTORY}', row 1, position 0 must be a finite float32, got "
    ):
        ask(model, [[1, 2], [3]], [[1.0, 2.0], [bad]])


def test_lengths_that_disagree(model):
    with pytest.raises(ValueError, match=f"Weight for '{HISTORY}' .*: row 1 has 2 weights for 1 ids"):
        ask(model, [[1, 2], [3]], [[1.0, 2.0], [1.0, 1.0]])
    with pytest.raises(
        ValueError, match=f"All features must have the same number of rows: '{HISTORY}' has 3, "
    ):
        ask(model, [[1], [2], [3]])
    with pytest.raises(ValueError, match=r"dense input 'dense' must be of shape \[2, 2\].*got \[3, 2\]"):
        model(requests.random_inputs(0, 2), None, bundles.dense_rows(3))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([0, 2, 1], "row_splits must not decrease, got 2 then 1 at position 2"),
        ([1, 2, 3], "row_splits must start at 0, got 1"),
        ([0, 1, 9], "row_splits end at 9 but there are only 3 values"),
    ],
)
def test_splits_that_are_none(splits, message):
    with pytest.raises(ValueError, match=message):
        RaggedTensor(np.array([1, 2, 3]), np.array(splits))


def test_zero_ids(model):
    empty = ask(model, [[], []])
    ragged = ask(model, RaggedTensor(np.zeros(0, np.int64), np.zeros(3, np.int64)))
    np.testing.assert_array_equal(empty, ragged)
    assert np.isfinite(empty).all()
    assert ask(model, [], rows=0).shape == (0,)


def test_a_million_ids_in_one_row(model):
    for row in ([3] * 10**6, np.full(10**6, 3)):
        with pytest.raises(
            ValueError, match=rf"Feature '{HISTORY}', row 1 has 1000000 ids; at most 6 are served. Cut the row"
        ):
            ask(model, [[1], row])
