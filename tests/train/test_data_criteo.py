"""Criteo's text, its binary columns, and made-up logs of its shape."""

import gzip
import json
import os

import numpy as np
import pytest

from jaxembed.checkpoint import scratch
from jaxembed.train.data import batches, convert_criteo, criteo_feature_config, load_criteo, synthetic_criteo
from jaxembed.train.data.criteo import FEATURES, parse_criteo
from jaxembed.train.data.shuffle import permute_blocks
from jaxembed.train.data.synthetic import zipf
from jaxembed.train.job import open_sources
from jaxembed.train.job.data_config import CriteoData
from jaxembed.train.metrics import auc

SIZES = list(range(2, 28))


def random_lines(count, seed=0):
    """Lines of Criteo's form, and what each must become, computed in plain Python."""
    rng = np.random.default_rng(seed)
    lines, ids, dense, labels = [], [], [], []
    for _ in range(count):
        label = int(rng.integers(2))
        counts = [int(x) for x in rng.integers(-2, 10 ** rng.integers(1, 7), 13)]
        hashes = [int(x) for x in rng.integers(0, 2**32, 26)]
        gaps = rng.random(39) < 0.2
        fields = [str(x) for x in counts] + [f"{x:08x}" for x in hashes]
        lines.append("\t".join([str(label), *("" if gap else f for gap, f in zip(gaps, fields, strict=True))]))
        labels.append(label)
        dense.append([0.0 if g else np.log1p(max(x, 0)) for g, x in zip(gaps[:13], counts, strict=True)])
        ids.append([0 if g else 1 + h % (v - 1) for g, h, v in zip(gaps[13:], hashes, SIZES, strict=True)])
    return lines, np.asarray(ids), np.asarray(dense, np.float32), np.asarray(labels)


def test_parsing_gives_what_plain_python_gives():
    lines, ids, dense, labels = random_lines(200)
    found = parse_criteo("\n".join(lines).encode(), SIZES)
    assert [x.dtype for x in found] == [np.int32, np.float32, np.uint8]
    np.testing.assert_array_equal(found[0], ids)
    np.testing.assert_allclose(found[1], dense, rtol=1e-6)
    np.testing.assert_array_equal(found[2], labels)


def test_fields_of_every_length():
    fields = random_lines(1)[0][0].split("\t")
    numbers = [
        0,
        7,
        42,
        999,
        1234,
        99999,
        123456,
        7654321,
        87654321,
        987654321,
        10**10 + 1,
        10**15 + 3,
        10**16 - 1,
    ]
    fields[1:14] = map(str, numbers)
    fields[14:23] = ["f" * n for n in range(9)]
    ids, dense, _ = parse_criteo("\t".join(fields).encode(), [10**9] * 26)
    np.testing.assert_allclose(dense[0], np.log1p(numbers), rtol=1e-6)
    np.testing.assert_array_equal(ids[0, :9], [0, *(1 + (16**n - 1) % (10**9 - 1) for n in range(1, 9))])
    assert [x.shape for x in parse_criteo(b"", SIZES)] == [(0, 26), (0, 13), (0,)]


@pytest.mark.parametrize("chunk_bytes", [100, 3000, 1 << 20])
def test_converted_files_load_as_one(tmp_path, chunk_bytes):
    lines, ids, dense, labels = random_lines(60)
    (tmp_path / "day_0").write_text("\n".join(lines[:25]) + "\n")
    with gzip.open(tmp_path / "day_1.gz", "wt") as file:
        file.write("\n".join(lines[25:]))
    directory = tmp_path / "columns"
    paths = [tmp_path / "day_0", tmp_path / "day_1.gz"]
    assert convert_criteo(paths, directory, SIZES, chunk_bytes=chunk_bytes) == directory
    found = load_criteo(directory)
    assert found.vocabulary_sizes == tuple(SIZES)
    for i, name in enumerate(FEATURES):
        np.testing.assert_array_equal(found.examples.features[name], ids[:, i])
    np.testing.assert_allclose(found.examples.dense, dense, rtol=1e-6)
    np.testing.assert_array_equal(found.examples.labels, labels)
    batch = next(iter(batches(found.examples, 16, shuffle=False)))
    np.testing.assert_array_equal(batch.features["c26"], ids[:16, 25])
    assert (batch.dense.dtype, batch.labels.dtype) == (np.float32, np.float32)
    with pytest.raises(FileExistsError, match="remove it, or load it with load_criteo"):
        convert_criteo(paths, directory, SIZES)


def test_columns_have_the_mode_of_the_umask(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(random_lines(3)[0]))
    before = os.umask(0o027)
    try:
        directory = convert_criteo([tmp_path / "train.txt"], tmp_path / "columns", 10)
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o750
    assert sorted(path.name for path in tmp_path.iterdir()) == ["columns", "train.txt"]


def test_lines_may_end_with_carriage_returns():
    lines, *_ = random_lines(20)
    for end in ("", "\r\n"):
        found = parse_criteo(("\r\n".join(lines) + end).encode(), SIZES)
        for ours, theirs in zip(found, parse_criteo("\n".join(lines).encode(), SIZES), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_texts_without_examples(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"no examples are in .*a\.txt, .*b\.txt; see that they are whole"):
        convert_criteo([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", 10)
    assert not (tmp_path / "out").exists()


def test_a_click_log_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no click log is at .*train\.txt; .* must be downloaded"):
        convert_criteo([tmp_path / "train.txt"], tmp_path / "out", 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-10], lambda data: data[:60] + bytes(60) + data[120:], lambda data: b"plain text"],
    ids=["cut off", "zeroed", "no gzip"],
)
def test_compressed_click_logs_that_are_not_whole_are_named(tmp_path, damage):
    text = "\n".join(random_lines(20)[0]).encode()
    (tmp_path / "day_0.gz").write_bytes(damage(gzip.compress(text)))
    with pytest.raises(ValueError, match=r"day_0\.gz is damaged or cut off: .*\. Get it again\."):
        convert_criteo([tmp_path / "day_0.gz"], tmp_path / "out", 10)
    assert [path.name for path in tmp_path.iterdir()] == ["day_0.gz"]


def test_what_a_killed_conversion_left_goes(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(random_lines(3)[0]))
    left = tmp_path / f".writing-columns-0{scratch._of_host()}"
    left.mkdir()
    (left / "ids").write_bytes(bytes(99))
    os.utime(left, (0, 0))
    convert_criteo([tmp_path / "train.txt"], tmp_path / "columns", 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["columns", "train.txt"]


def test_a_failed_conversion_leaves_nothing(tmp_path):
    lines, *_ = random_lines(3)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.txt").write_text("\n".join([*lines, "1\t2"]) + "\n")
    with pytest.raises(ValueError, match=r"train.txt, from example 0 on: a line must have .* got 2 in line 3"):
        convert_criteo([tmp_path / "in" / "train.txt"], tmp_path / "out", 10)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, "2"), "labels must be 0 or 1, got 2"),
        ((0, ""), "labels must be 0 or 1, got none in line 0"),
        ((1, "-"), "a count must be an integer or empty, got '-' in line 0"),
        ((14, "\r"), "fields must be digits of base 16"),
        ((1, "1x"), "fields must be digits of base 10"),
        ((1, "a"), "fields must be digits of base 10"),
        ((1, "--1"), "fields must be digits of base 10"),
        ((14, "0000000g"), "fields must be digits of base 16"),
        ((14, "0000000A"), "base 16 .lower case., got others"),
        ((14, "0000`000"), "fields must be digits of base 16"),
        ((14, "o"), "fields must be digits of base 16"),
        ((14, "p"), "fields must be digits of base 16"),
        ((1, "1" * 17), "a field of 17 characters is too long"),
        ((14, "000000000"), "a field of 9 characters is too long"),
    ],
)
def test_wrong_fields(change, message):
    fields = random_lines(1)[0][0].split("\t")
    fields[change[0]] = change[1]
    with pytest.raises(ValueError, match=message):
        parse_criteo("\t".join(fields).encode(), SIZES)


def test_damaged_columns_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="write it with convert_criteo"):
        load_criteo(tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(random_lines(5)[0]))
    directory = convert_criteo([tmp_path / "train.txt"], tmp_path / "columns", 10)
    (directory / "dense").write_bytes((directory / "dense").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"dense must have 260 bytes, got 259; convert it again"):
        load_criteo(directory)
    meta = json.loads((directory / "criteo.json").read_text())
    assert meta["examples"] == 5


@pytest.mark.parametrize("sizes", [1, [5] * 25, [5] * 25 + [2**31]])
def test_wrong_vocabulary_sizes(sizes, tmp_path):
    for refuses in (criteo_feature_config, lambda sizes: convert_criteo([], tmp_path / "columns", sizes)):
        with pytest.raises(ValueError, match=r"26 ints from 2 to below 2\*\*31"):
            refuses(sizes)


def test_feature_config_has_a_table_per_feature():
    config = criteo_feature_config(SIZES, 8)
    assert [(name, f.table.name, f.table.vocabulary_size) for name, f in config.items()] == [
        (name, name, size) for name, size in zip(FEATURES, SIZES, strict=True)
    ]


def test_block_shuffle_is_a_permutation_that_uses_blocks_up():
    splits = (0, 5, 6, 40, 57)
    for epoch in range(4):
        found = permute_blocks(np.arange(57), splits, 3, epoch)
        assert sorted(found.tolist()) == list(range(57))
        blocks = np.searchsorted(splits, found, side="right")
        assert np.count_nonzero(np.diff(blocks)) == 3
        np.testing.assert_array_equal(permute_blocks(np.arange(20, 40), splits, 3, epoch), found[20:40])
    assert (
        permute_blocks(np.arange(57), splits, 3, 0).tolist()
        != permute_blocks(np.arange(57), splits, 3, 1).tolist()
    )


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.05, 2.0])
def test_ids_follow_the_law(exponent):
    size = 1000
    ranks = zipf(np.random.default_rng(0), 200_000, size, exponent)
    assert 0 <= ranks.min() <= ranks.max() < size
    edges = np.arange(1, size + 2, dtype=np.float64)
    mass = np.diff(np.log(edges) if exponent == 1 else edges ** (1 - exponent) / (1 - exponent))
    expected = mass / mass.sum()
    found = np.bincount(ranks, minlength=size) / 200_000
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(expected.max() / 200_000))


def test_synthetic_logs_have_criteos_shape_and_can_be_learned():
    one = synthetic_criteo(2000, SIZES, seed=1)
    again = synthetic_criteo(2000, SIZES, seed=1)
    for name, size in zip(FEATURES, SIZES, strict=True):
        assert one.features[name].dtype == np.int32
        assert 0 <= one.features[name].min() <= one.features[name].max() < size
        np.testing.assert_array_equal(one.features[name], again.features[name])
    assert one.dense.shape == (2000, 13)
    assert 0.1 < one.labels.mean() < 0.6
    linear = pytest.importorskip("sklearn.linear_model")
    features = np.concatenate(
        [one.dense, *(np.eye(v)[one.features[n]] for n, v in zip(FEATURES, SIZES, strict=True))], 1
    )
    model = linear.LogisticRegression(C=0.1).fit(features[:1500], one.labels[:1500])
    assert auc(one.labels[1500:], model.decision_function(features[1500:])) > 0.6
    many = synthetic_criteo(300, 50, ids_per_feature=10)
    assert abs(many.features["c1"].lengths.mean() - 10) < 1
    with pytest.raises(ValueError, match="exponent must be above 0"):
        synthetic_criteo(1, 5, exponent=0)


def criteo_data(tmp_path, text, **options):
    return CriteoData(path=str(tmp_path / "columns"), text=(str(text),), **options)


def test_a_job_takes_no_columns_of_other_texts_or_sizes(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("\n".join(random_lines(40)[0]))
    second.write_text("\n".join(random_lines(80)[0]))
    made = open_sources(criteo_data(tmp_path, first, vocabulary_sizes=50), 4)
    again = open_sources(criteo_data(tmp_path, first, vocabulary_sizes=50), 4)
    np.testing.assert_array_equal(made.train.labels, again.train.labels)
    with pytest.raises(ValueError, match=r"columns were made from a\.txt, not from b\.txt\. Remove the folder"):
        open_sources(criteo_data(tmp_path, second, vocabulary_sizes=50), 4)
    with pytest.raises(ValueError, match=r"vocabulary_sizes \(c1: 50, not 1000; c2: .* and 23 more\)\. Remove"):
        open_sources(criteo_data(tmp_path, first, vocabulary_sizes=1000), 4)
    alone = CriteoData(path=str(tmp_path / "columns"), vocabulary_sizes=1000)
    with pytest.raises(ValueError, match=r"c1: 50, not 1000"):
        open_sources(alone, 4)
    first.rename(tmp_path / "moved.txt")
    # As they are, with the sizes that they were made for; a text that was removed since is known by its name.
    for data in (CriteoData(path=alone.path), criteo_data(tmp_path, first)):
        assert {f.table.vocabulary_size for f in open_sources(data, 4).feature_config.values()} == {50}
    first.write_bytes((tmp_path / "moved.txt").read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"made when .*a\.txt had \d+ bytes .* now it has \d+ and"):
        open_sources(criteo_data(tmp_path, first, vocabulary_sizes=50), 4)
    text = (tmp_path / "moved.txt").read_bytes()
    (tmp_path / "moved.txt").replace(first)
    os.utime(first, ns=(0, 10**9))
    # Touched or copied, it is the same.
    np.testing.assert_array_equal(made.train.labels, open_sources(criteo_data(tmp_path, first), 4).train.labels)
    first.write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    os.utime(first, ns=(0, 10**9))
    with pytest.raises(ValueError, match=r"and was changed at 1\.000 \(seconds"):
        open_sources(criteo_data(tmp_path, first, vocabulary_sizes=50), 4)


def test_columns_whose_texts_are_known_by_time_alone(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(random_lines(40)[0]))
    directory = convert_criteo([text], tmp_path / "columns", 50)
    meta = json.loads((directory / "criteo.json").read_text())
    del meta["texts"][0]["xxh3"]
    (directory / "criteo.json").write_text(json.dumps(meta))
    assert len(open_sources(criteo_data(tmp_path, text), 4).train) == 38
    os.utime(text, ns=(0, 10**9))
    with pytest.raises(ValueError, match=r"and was changed at 1\.000 \(seconds"):
        open_sources(criteo_data(tmp_path, text), 4)


def test_columns_that_do_not_say_what_they_were_made_from(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(random_lines(40)[0]))
    directory = convert_criteo([text], tmp_path / "columns", 50)
    meta = json.loads((directory / "criteo.json").read_text())
    del meta["texts"]
    (directory / "criteo.json").write_text(json.dumps(meta))
    assert len(open_sources(criteo_data(tmp_path, "other.txt", vocabulary_sizes=50), 4).train) == 38
    with pytest.raises(ValueError, match="c1: 50, not 60"):
        open_sources(criteo_data(tmp_path, "other.txt", vocabulary_sizes=60), 4)
