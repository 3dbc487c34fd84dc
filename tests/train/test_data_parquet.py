"""Parquet files as examples."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxembed.train.data import Examples, ParquetExamples, RaggedColumn, batches, parquet
from jaxembed.train.data.parquet import bags_from_arrow

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COLUMNS = {
    "features": {"id": "id", "bag": "ids"},
    "labels": "y",
    "dense": ["d1", "d2"],
    "weights": {"bag": "w"},
}


def write(path, first, count, row_group_size=7, **replace):
    rng = np.random.default_rng(first)
    rows = np.arange(first, first + count)
    bags = [None if row % 5 == 4 else [int(row)] * int(rng.integers(4)) for row in rows]
    columns = {
        "id": pa.array(rows),
        "ids": pa.array(bags, pa.list_(pa.int64())),
        "w": pa.array([None if bag is None else [x / 2 for x in bag] for bag in bags], pa.list_(pa.float32())),
        "d1": pa.array(rows * 2),
        "d2": pa.array(rows % 3 == 0),
        "y": pa.array(rows % 2, pa.int8()),
        "unused": pa.array(["text"] * count),
    }
    pq.write_table(pa.table(columns | replace), path, row_group_size=row_group_size)
    return bags


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    bags = write(paths[0], 0, 30) + write(paths[1], 30, 23)
    return paths, [bag or [] for bag in bags]


def check(batch, bags):
    rows = batch.features["id"][batch.mask > 0]
    count = rows.size
    assert batch.features["bag"].to_lists()[:count] == [bags[row] for row in rows]
    assert batch.weights["bag"].to_lists()[:count] == [[x / 2 for x in bags[row]] for row in rows]
    np.testing.assert_array_equal(batch.dense[:count], np.stack([rows * 2, rows % 3 == 0], 1))
    np.testing.assert_array_equal(batch.labels[:count], rows % 2)
    return rows.tolist()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_batches_hold_the_rows_of_the_files(files, whole, shuffle):
    paths, bags = files
    source = ParquetExamples(paths, **COLUMNS, keep=1)
    source = source.load() if whole else source
    found = [check(batch, bags) for batch in batches(source, 8, num_epochs=2, shuffle=shuffle)]
    assert [len(rows) for rows in found] == [8] * 13 + [2]
    flat = list(itertools.chain(*found))
    assert sorted(flat[:53]) == sorted(flat[53:]) == list(range(53))
    assert (flat[:53] == list(range(53))) is not shuffle


def test_restored_iterators_go_on_at_the_next_batch(files):
    paths, bags = files
    dataset = batches(ParquetExamples(paths, **COLUMNS), 8, num_epochs=1, seed=2)
    iterator, states, rows = iter(dataset), [], []
    for _ in range(7):
        states.append(iterator.get_state())
        rows.append(check(next(iterator), bags))
    for step, state in enumerate(states):
        resumed = iter(batches(ParquetExamples(paths, **COLUMNS), 8, num_epochs=1, seed=2))
        resumed.set_state(state)
        assert [check(batch, bags) for batch in resumed] == rows[step:]


def test_row_groups_are_read_once_an_epoch_and_only_few_are_kept(files, monkeypatch):
    paths, _ = files
    reads = []
    original = ParquetExamples._read
    monkeypatch.setattr(
        ParquetExamples, "_read", lambda self, group: reads.append(group) or original(self, group)
    )
    source = ParquetExamples(paths, **COLUMNS, keep=2)
    for _ in batches(source, 4, num_epochs=1, capacities={"bag": 99}):
        pass
    assert sorted(reads) == list(range(len(source.block_splits) - 1))
    assert len(source._cache) == 2


def test_lists_are_read_once_for_the_longest(files, monkeypatch):
    paths, bags = files
    reads = []
    monkeypatch.setattr(parquet, "bags_from_arrow", lambda *args: reads.append(args) or bags_from_arrow(*args))
    source = ParquetExamples(paths, **COLUMNS)
    longest = max(map(len, bags))
    assert source.capacities(4) == {"bag": 4 * longest}
    before = len(reads)
    assert source.capacities(8) == {"bag": 8 * longest}
    assert len(reads) == before > 0


def test_bags_share_the_memory_of_arrow():
    array = pa.array([[9], [1, 2], None, [], [3]], pa.list_(pa.int32()))[1:]
    bags = bags_from_arrow(array)
    ids, _ = bags.take(np.arange(4), 3)
    assert ids.to_lists() == [[1, 2], [], [], [3]]
    buffer = array.values.buffers()[1]
    assert buffer.address <= bags.values.ctypes.data < buffer.address + buffer.size
    large = bags_from_arrow(pa.array([[2**40], [-(2**40)]], pa.large_list(pa.int64())))
    ids, _ = large.take(np.arange(2), 2)
    assert ids.to_lists() == [[2**40], [-(2**40)]]
    with pytest.raises(ValueError, match="array must hold lists, got int64"):
        bags_from_arrow(pa.array([1]))


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"id": pa.array(["x"] * 9)}, r"column 'id' of feature 'id' must hold integers .* hash them first"),
        ({"w": pa.array([[1]] * 9)}, r"weights 'w' of feature 'bag' must be lists of floating point"),
        ({"y": pa.array([[1]] * 9)}, r"column 'y' must hold numbers"),
        ({"w": pa.array([[1.0]] * 9)}, r"weights must be parallel to ids, got 1 weights for . ids in row"),
        ({"d1": pa.array([1, None, 3] * 3)}, r"'d1' must hold no nulls, got 2; fill them"),
        ({"ids": pa.array([[1, None]] * 9)}, r"x\.parquet: the lists of feature 'bag' must hold no nulls"),
        (
            {"id": pa.array([1, None, 3] * 3)},
            r"x\.parquet: column 'id' of feature 'id' must hold no nulls, got 2",
        ),
        ({"y": pa.array([0, 1, None] * 3)}, r"x\.parquet: labels 'y' must hold no nulls, got 2"),
        ({"y": pa.array([0, 1, np.nan] * 3)}, r"x\.parquet: labels 'y' must be finite, got nan and 1 more"),
        (
            {"ids": pa.array([[1]] * 9), "w": pa.array([[np.inf]] * 9)},
            r"x\.parquet: the weights of feature 'bag' must be finite, got inf and 6 more",
        ),
    ],
)
def test_wrong_columns(tmp_path, replace, message):
    write(tmp_path / "x.parquet", 0, 9, **replace)
    with pytest.raises(ValueError, match=message):
        ParquetExamples([tmp_path / "x.parquet"], **COLUMNS).load()


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "page"])
def test_damaged_files_are_named(tmp_path, damage):
    path = tmp_path / "x.parquet"
    write(path, 0, 2000, row_group_size=2000)
    content = bytearray(path.read_bytes())
    if damage == "page":
        content[4:200] = bytes(196)
    path.write_bytes(
        {"garbage": b"garbage" * 99, "truncated": content[:500], "empty": b"", "page": content}[damage]
    )
    with pytest.raises(ValueError, match=r"x\.parquet is no whole Parquet file: "):
        ParquetExamples([path], **COLUMNS).load()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet"):
        ParquetExamples([tmp_path / "nowhere.parquet"], **COLUMNS)


def test_files_that_are_written_over_are_an_error(tmp_path):
    path = tmp_path / "x.parquet"
    write(path, 0, 14)
    source = ParquetExamples([path], **COLUMNS)
    write(path, 0, 14, row_group_size=6)
    with pytest.raises(ValueError, match=r"x\.parquet: row group 0 had 7 rows when .*, now 6; write new data"):
        source.load()
    pq.write_table(pa.table({"id": list(range(14))}), path, row_group_size=7)
    with pytest.raises(ValueError, match=r"x\.parquet is no whole Parquet file: "):
        source.load()


SHRINKING = """
import os, sys
import numpy as np
import pyarrow.parquet as pq
from jaxembed.train.data import ParquetExamples
read = pq.ParquetFile.read_row_group
def shrinks(file, *args, **options):
    os.truncate(sys.argv[1], 4096)
    return read(file, *args, **options)
source = ParquetExamples([sys.argv[1]], {"id": "id"}, "y")
pq.ParquetFile.read_row_group = shrinks
try:
    source.load()
except ValueError as e:
    print(e)
"""


def test_a_file_that_shrinks_while_it_is_read_does_not_end_the_process(tmp_path):
    """Where it is mapped, the process dies of SIGBUS."""
    path = tmp_path / "x.parquet"
    rng = np.random.default_rng(0)
    pq.write_table(pa.table({"id": rng.integers(0, 2**60, 100_000), "y": np.zeros(100_000)}), path)
    run = subprocess.run(
        [sys.executable, "-c", SHRINKING, path], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
    assert "x.parquet is no whole Parquet file: File too short" in run.stdout


def test_wrong_arguments(files):
    paths, _ = files
    with pytest.raises(ValueError, match=r"has no column 'nothing'; it has \['id'"):
        ParquetExamples(paths, {"a": "nothing"}, "y")
    with pytest.raises(ValueError, match="keep must be at least 1"):
        ParquetExamples(paths, {"id": "id"}, "y", keep=0)
    with pytest.raises(ValueError, match=r"weights 'w' of feature 'bag' must be"):
        ParquetExamples(paths, {"id": "id"}, "y", weights={"bag": "w"})


def test_transforms_run_on_the_prefetching_threads_while_a_step_runs():
    examples = Examples({"id": np.arange(40)}, np.zeros((40, 0)), np.zeros(40))
    made, names = threading.Semaphore(0), set()

    def transform(batch):
        names.add(threading.current_thread().name)
        made.release()
        return batch.features["id"] * 2

    iterator = iter(batches(examples, 4, shuffle=False, transform=transform, prefetch=3))
    np.testing.assert_array_equal(next(iterator), [0, 2, 4, 6])
    # Without another call of next, the three batches after the first are made ahead.
    assert all(made.acquire(timeout=20) for _ in range(4))
    assert threading.current_thread().name not in names


def test_concatenated_columns_share_or_join_their_values():
    a = RaggedColumn(np.asarray([5, 6, 7]), np.asarray([1, 0]), np.asarray([2, 2]), np.asarray([0.5, 0.6, 0.7]))
    b = RaggedColumn(np.asarray([8, 9]), np.asarray([1]), np.asarray([1]), np.asarray([0.8, 0.9]))
    same = RaggedColumn.concatenate([a, a.select(np.asarray([0]))])
    assert same.values is a.values
    both = RaggedColumn.concatenate([a, b])
    ids, weights = both.take(np.arange(3), 5)
    assert ids.to_lists() == [[6, 7], [5, 6], [9]]
    np.testing.assert_allclose(weights.values, [0.6, 0.7, 0.5, 0.6, 0.9])
