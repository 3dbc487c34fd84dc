"""A run that goes on sees that its data is not what it was."""

import dataclasses
import json
import os
import re

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxembed.checkpoint import read_checkpoint
from jaxembed.train.data import convert_criteo
from jaxembed.train.job import CriteoData, MovieLensData, SyntheticData, load_config, open_sources, train
from jaxembed.train.job.origin import describe_files, difference

from .jobs import write_config, write_data


def origin(*paths):
    return {**describe_files(paths), "examples": {"train": 7}}


def test_files_are_known_by_size_start_and_end(tmp_path):
    path = tmp_path / "data"
    content = bytearray(os.urandom(3 << 20))
    path.write_bytes(content)
    before = origin(path)
    assert before["files"]["data"]["bytes"] == 3 << 20
    os.utime(path, (0, 0))
    assert difference(before, origin(path)) is None
    for at in (0, (1 << 20) - 1, 2 << 20, (3 << 20) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        found = difference(before, origin(path))
        assert re.fullmatch(
            rf"{path} had bytes 3,145,728, xxh3 \w{{16}}, now it has bytes 3,145,728, xxh3 \w{{16}}", found
        )
    path.write_bytes(content + b"x")
    assert "bytes 3,145,728, xxh3" in difference(before, origin(path))
    assert "now it has bytes 3,145,729, xxh3" in difference(before, origin(path))


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_small_files(tmp_path, size):
    path = tmp_path / "data"
    path.write_bytes(bytes(size))
    before = origin(path)
    assert difference(before, origin(path)) is None
    path.write_bytes(bytes(size) + b"x")
    assert difference(before, origin(path)) is not None


def test_files_that_are_new_or_gone(tmp_path):
    paths = [tmp_path / name for name in "abcde"]
    for path in paths:
        path.write_bytes(b"x")
    one, all_of_them = origin(paths[0]), origin(*paths)
    a, b, c, d, _ = paths
    assert difference(one, all_of_them) == f"of its 1 files {b}, {c}, {d} and 1 more are new"
    assert difference(all_of_them, one) == f"of its 5 files {b}, {c}, {d} and 1 more are gone"
    assert difference(None, one) is difference(one, None) is None
    a.write_bytes(b"y"), b.write_bytes(b"y")
    assert difference(all_of_them, origin(*paths)).endswith(" (1 more have changed)")


def test_files_may_be_moved_but_not_put_into_another_order(tmp_path):
    paths = [tmp_path / "here" / name for name in ("train/a", "train/b", "other/a")]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(i))
    before = origin(*paths)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = [tmp_path / "there" / path.relative_to(tmp_path / "here") for path in paths]
    assert difference(before, origin(*moved)) is None
    assert difference(before, origin(*moved[::-1])) == (
        "its files were in the order ['train/a', 'train/b', 'other/a'], now it is ['other/a', 'train/b', 'train/a']"
    )
    os.truncate(moved[1], 5)
    assert difference(before, origin(*moved)).startswith(f"{moved[1]} had bytes 1, ")


def test_many_files_are_read_less_of(tmp_path):
    paths = [tmp_path / str(i) for i in range(200)]
    for path in paths:
        path.write_bytes(bytes(1 << 20))
    before = origin(*paths)
    paths[150].write_bytes(bytes((1 << 20) - 1) + b"x")
    assert difference(before, origin(*paths)).startswith(f"{paths[150]} had")


def test_made_examples():
    data = SyntheticData(examples=40, evaluation_examples=8, vocabulary_sizes=20, ids_per_feature=2.0)
    before = open_sources(data, 4).origin
    assert before["examples"] == {"train": 40, "evaluation": 8}
    assert before == open_sources(data, 4).origin
    other = open_sources(dataclasses.replace(data, seed=1), 4).origin
    assert re.match(
        r"its generator made examples with XXH3 \w{16}, with these versions", difference(before, other)
    )


def test_movielens(tmp_path):
    ratings = [f"{u}\t{i}\t{1 + (u + i) % 5}\t{u * 10 + i}" for u in range(1, 6) for i in range(1, 6)]
    (tmp_path / "u.data").write_text("\n".join(ratings) + "\n")
    flags = "|".join(["0"] * 18 + ["1"])
    (tmp_path / "u.item").write_text("".join(f"{i}|F (1995)|01-Jan-1995||url|{flags}\n" for i in range(1, 6)))
    (tmp_path / "u.user").write_text("".join(f"{u}|24|M|writer|1\n" for u in range(1, 6)))
    data = MovieLensData(path=str(tmp_path))
    before = open_sources(data, 4).origin
    assert [os.path.basename(name) for name in before["files"]] == ["u.data", "u.item", "u.user"]
    (tmp_path / "u.user").write_text("".join(f"{u}|25|M|writer|1\n" for u in range(1, 6)))
    assert "u.user had bytes" in difference(before, open_sources(data, 4).origin)


def test_criteo(tmp_path):
    line = "\t".join(["1", *["3"] * 13, *["a"] * 26]) + "\n"
    texts = [tmp_path / "one", tmp_path / "two"]
    for text, label in zip(texts, "10", strict=True):
        text.write_text(line * 30 + label + line[1:])
        convert_criteo([text], tmp_path / f"{text.name}.columns", 50)
    before, other = (open_sources(CriteoData(path=f"{text}.columns"), 4).origin for text in texts)
    assert [os.path.basename(name) for name in before["files"]] == ["ids", "dense", "labels"]
    assert difference(before, other).startswith(f"{tmp_path}/two.columns/labels had bytes 31, ")


@pytest.mark.slow
def test_a_job_goes_on_with_changed_data_only_where_it_is_told_to(tmp_path, capfd):
    data = write_data(tmp_path)
    options = {"data.evaluation": [], "logs.tensorboard": False, "training.batch_size": 8}
    config = write_config(tmp_path, data, **options)

    def run(steps, *sets):
        with jax.numpy_dtype_promotion("standard"):
            return train(load_config(config, [f"training.steps={steps}", *sets]))

    run(2)
    saved = read_checkpoint(tmp_path / "run" / "checkpoints").metadata["data"]
    whole = data.read_bytes()
    pq.write_table(pq.read_table(data).slice(0, 190), data, row_group_size=64)
    message = (
        rf"checkpoints holds a run on other data: {data} had bytes [\d,]+, xxh3 \w{{16}}, rows 200, row groups 4, now it has "
        rf"bytes [\d,]+, xxh3 \w{{16}}, rows 190, row groups 3\. Put back .* --set training\.data_changed=accept"
    )
    with pytest.raises(ValueError, match=message):
        run(4)
    shrunk = data.read_bytes()
    data.write_bytes(whole)  # put back, it goes on
    assert run(3).step == 3
    data.write_bytes(shrunk)
    capfd.readouterr()
    assert run(4, "training.data_changed=accept").step == 4
    assert (
        f"goes on although its data has changed (training.data_changed): {data} had" in capfd.readouterr().out
    )
    # What was accepted is what it is trained on now, wherever it lies.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    data = data.rename(elsewhere / data.name)
    assert run(5, f"data.train={json.dumps([str(data)])}").step == 5
    now = read_checkpoint(tmp_path / "run" / "checkpoints").metadata["data"]
    assert (saved["examples"], now["examples"]) == ({"train": 200}, {"train": 190})
    assert np.all([saved["files"].keys() == now["files"].keys(), saved != now])
