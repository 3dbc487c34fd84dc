"""The ladder of shapes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.serve.ladder import Ladder, Rung, batch_ladder, geometric


def test_batch_sizes():
    assert batch_ladder(30) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 30)
    assert batch_ladder(1) == (1,)
    assert batch_ladder(2) == (1, 2)
    assert len(batch_ladder(1024)) == 20


@given(st.integers(1, 5000))
def test_batches_are_padded_by_half_at_most(largest):
    sizes = batch_ladder(largest)
    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert all(a < b <= max(a + 1, a * 3 // 2) for a, b in itertools.pairwise(sizes))


@given(st.integers(1, 5000), st.floats(1.1, 8))
def test_steps_are_bounded(largest, step):
    sizes = geometric(largest, step)
    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert all(a < b <= max(a + 1, round(a * step)) for a, b in itertools.pairwise(sizes))


@given(st.data(), st.integers(1, 20))
def test_rung_is_the_smallest_with_room(data, rows):
    ladder = Ladder((1, 4, 20), (2, 5, 9))
    limits = [9, 3, 1]
    ids = [data.draw(st.integers(0, rows * limit)) for limit in limits]
    rung = ladder.rung(rows, ids, limits)

    def fits(rung):
        return rung.batch >= rows and all(n <= rung.capacity(m) for n, m in zip(ids, limits, strict=True))

    assert rung == min(r for r in ladder if fits(r))


def test_capacity_is_that_of_the_feature():
    assert Rung(4, 5).capacity(9) == 20
    assert Rung(4, 5).capacity(3) == 12


@pytest.mark.parametrize("sizes", [(), (0, 1), (2, 1), (1, 1)])
def test_errors(sizes):
    with pytest.raises(ValueError, match="batch_sizes must be rising ints of at least 1"):
        Ladder(sizes, (1,))
    with pytest.raises(ValueError, match="row_lengths must be rising ints of at least 1"):
        Ladder((1,), sizes)
