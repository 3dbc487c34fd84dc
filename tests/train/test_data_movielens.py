"""MovieLens: layouts, what an example may know, and the split by time."""

import hashlib
import itertools
import subprocess
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed import RaggedTensor, serving_embedding_lookup, use_backend
from jaxembed.features import feature_tables
from jaxembed.train.data import (
    MovieLens,
    batches,
    fetch,
    load,
    movielens_examples,
    movielens_feature_config,
    split_by_time,
)
from jaxembed.train.data.movielens import AGE_GROUPS

RATINGS = [(7, 20, 4, 100), (3, 10, 5, 90), (7, 10, 2, 120), (3, 30, 3, 120)]
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def write(path, name, text, encoding="utf-8"):
    path.mkdir(exist_ok=True)
    (path / name).write_text(text, encoding)


def write_recbole(path):
    write(path, "x.inter", INTER + "".join("\t".join(map(str, r)) + "\n" for r in RATINGS))
    items = ["10\tToy Story\t1995\tAnimation Comedy", "20\tAmélie\tunknown\tDrama", "30\tHeat\t1996\t"]
    write(
        path,
        "x.item",
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + "\n".join(items),
    )
    users = ["3\t24\tM\twriter\t1", "7\t57\tF\tartist\t2"]
    write(
        path,
        "x.user",
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n" + "\n".join(users),
    )


def write_100k(path):
    def flags(*on):
        return "|".join("1" if i in on else "0" for i in range(19))

    write(path, "u.data", "".join("\t".join(map(str, r)) + "\n" for r in RATINGS))
    items = [
        f"10|Toy Story (1995)|01-Jan-1995||url|{flags(3, 5)}",
        f"20|Amélie (2001)|||url|{flags(8)}",
        f"30|Heat (1995)|05-Feb-1996||url|{flags()}",
    ]
    write(path, "u.item", "\n".join(items) + "\n", "latin-1")
    write(path, "u.user", "3|24|M|writer|1\n7|57|F|artist|2\n", "latin-1")


def write_1m(path):
    write(path, "ratings.dat", "".join("::".join(map(str, r)) + "\n" for r in RATINGS))
    items = ["10::Toy Story (1995)::Animation|Comedy", "20::Amélie::Drama", "30::Heat (1996)::"]
    write(path, "movies.dat", "\n".join(items) + "\n", "latin-1")
    write(path, "users.dat", "3::M::18::20::1\n7::F::56::2::2\n", "latin-1")


def write_25m(path):
    write(
        path,
        "ratings.csv",
        "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, r)) + "\n" for r in RATINGS),
    )
    items = ['10,"Toy Story (1995)",Animation|Comedy', "20,Amélie,Drama", "30,Heat (1996),(no genres listed)"]
    write(path, "movies.csv", "movieId,title,genres\n" + "\n".join(items) + "\n")


@pytest.mark.parametrize("layout", [write_recbole, write_100k, write_1m, write_25m])
def test_every_layout_gives_the_same_columns(tmp_path, layout):
    layout(tmp_path)
    data = load(tmp_path)
    np.testing.assert_array_equal(data.user_ids, [3, 7])
    np.testing.assert_array_equal(data.item_ids, [10, 20, 30])
    np.testing.assert_array_equal(data.user, [1, 0, 1, 0])
    np.testing.assert_array_equal(data.item, [1, 0, 0, 2])
    np.testing.assert_array_equal(data.rating, [4, 5, 2, 3])
    np.testing.assert_array_equal(data.timestamp, [100, 90, 120, 120])
    np.testing.assert_array_equal(data.year, [1995, 0, 1996])
    assert data.titles == ("Toy Story", "Amélie", "Heat")
    genres = [[data.genre_names[g] for g in bag] for bag in data.genres.to_lists()]
    assert genres == [["Animation", "Comedy"], ["Drama"], []]
    known = layout is not write_25m
    assert [AGE_GROUPS[a] for a in data.age] == (["18-24", "56 and over"] if known else ["unknown"] * 2)
    occupations = [data.occupation_names[o] for o in data.occupation]
    assert occupations == (["writer", "artist"] if known else ["unknown"] * 2)


def test_load_says_what_it_looked_for(tmp_path):
    write(tmp_path, "readme", "")
    with pytest.raises(FileNotFoundError, match=r"must hold a MovieLens data set .* got \['readme'\]"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load(tmp_path / "nowhere")


def make(events, users=4, items=5):
    """A data set of (user, item, rating, timestamp) events."""
    user, item, rating, timestamp = np.asarray(events).T
    return MovieLens(
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        rating=rating.astype(np.float32),
        timestamp=timestamp.astype(np.int64),
        age=np.arange(users, dtype=np.int32),
        occupation=np.arange(users, dtype=np.int32)[::-1],
        genres=RaggedTensor.from_lists([list(range(i % 3)) for i in range(items)], np.int32),
        year=np.arange(items, dtype=np.int32) * 1000,
        user_ids=np.arange(users),
        item_ids=np.arange(items),
        titles=("",) * items,
        genre_names=("a", "b"),
        occupation_names=("unknown", "x", "y", "z"),
    )


EVENTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 5), st.integers(0, 6)),
    min_size=1,
    max_size=40,
)


@given(EVENTS, st.integers(1, 4))
def test_an_example_holds_what_its_definition_says(events, max_history):
    data = make(events)
    examples = movielens_examples(data, max_history)
    rows = np.arange(len(events))
    ids, weights = examples.features["history"].take(rows, 40 * max_history)
    genres, _ = examples.features["genres"].take(rows, 80)
    for row, (user, item, rating, time) in enumerate(events):
        earlier = sorted((e for e in events if e[0] == user and e[3] < time), key=lambda e: e[3])
        of_item = [e for e in events if e[1] == item and e[3] < time]
        # Python's sort and lexsort are stable: events of one second stay in the order of the data.
        assert ids.to_lists()[row] == [e[1] for e in earlier[-max_history:]]
        assert weights.to_lists()[row] == [e[2] - 3.5 for e in earlier[-max_history:]]
        assert genres.to_lists()[row] == list(range(item % 3))
        expected = [(item * 1000 - 1990) / 20 if item else 0]
        for known in (earlier, of_item):
            mean = (sum(e[2] for e in known) + 5 * 3.5) / (len(known) + 5)
            expected += [np.log1p(len(known)) / 5 - 0.5, mean - 3.5]
        np.testing.assert_allclose(examples.dense[row], expected, rtol=1e-5, atol=1e-6)
        singles = {name: int(examples.features[name][row]) for name in ("user", "item", "age", "occupation")}
        assert singles == {"user": user, "item": item, "age": user, "occupation": 3 - user}
        assert examples.labels[row] == (rating >= 4)


@given(EVENTS, st.integers(0, 6), st.randoms(use_true_random=False))
def test_nothing_leaks_from_the_present_or_the_future(events, now, random):
    """Whatever happens from `now` on, and the ratings given at `now`, examples up to `now` stay equal."""
    changed = [
        e
        if e[3] < now
        else (e[0], e[1], random.randint(1, 5), e[3] + (random.randint(0, 3) if e[3] > now else 0))
        for e in events
    ]
    before, after = (movielens_examples(make(e)) for e in (events, changed))
    rows = np.flatnonzero(np.asarray([e[3] <= now for e in events]))
    if rows.size:
        old, new = (e.select(rows).take(np.arange(rows.size), 40, e.capacities(40)) for e in (before, after))
        for name in old.features:
            a, b = (np.asarray(getattr(x.features[name], "values", x.features[name])) for x in (old, new))
            length = min(a.size, b.size)  # capacities may differ; padding is zero
            np.testing.assert_array_equal(a[:length], b[:length])
            assert not a[length:].any()
            assert not b[length:].any()
        np.testing.assert_array_equal(old.features["history"].row_splits, new.features["history"].row_splits)
        np.testing.assert_array_equal(old.dense, new.dense)


@settings(max_examples=30)
@given(EVENTS, st.floats(0, 0.49), st.floats(0, 0.49))
def test_split_by_time_is_a_partition_in_the_order_of_time(events, validation, test):
    data = make(events)
    parts = split_by_time(data, validation, test)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(events)))
    times = [data.timestamp[part] for part in parts if part.size]
    assert all((np.diff(t) >= 0).all() for t in times)
    assert all(a[-1] < b[0] for a, b in itertools.pairwise(times))


def test_errors_of_features():
    data = make([(0, 0, 5, 0)])
    with pytest.raises(ValueError, match="max_history must be at least 1, got 0"):
        movielens_examples(data, 0)
    with pytest.raises(ValueError, match=r"sum below 1, got 0.5 and 0.5"):
        split_by_time(data, 0.5, 0.5)


def test_feature_config_fits_the_batches():
    data = make([(u, i, 1 + (u + i) % 5, 10 * u + i) for u in range(4) for i in range(5)])
    config = movielens_feature_config(data, dim=4)
    assert config["item"].table is config["history"].table
    tables = {
        name: np.arange(table.vocabulary_size * 4, dtype=np.float32).reshape(-1, 4)
        for name, table in feature_tables(config).items()
    }
    examples = movielens_examples(data)
    batch = next(iter(batches(examples, 6, shuffle=False, prefetch=0)))
    with use_backend("xla"):
        found = serving_embedding_lookup(batch.features, batch.weights, tables, config)
    assert {name: x.shape for name, x in found.items()} == dict.fromkeys(config, (6, 4))
    np.testing.assert_array_equal(found["item"], tables["item"][data.item[:6]])
    ids, weights = [0, 1, 2, 3], np.asarray([1, 2, 3, 4]) - 3.5
    expected = weights @ tables["item"][ids] / np.sqrt((weights**2).sum())
    np.testing.assert_allclose(found["history"][4], expected, rtol=1e-5)


def fake_pip(monkeypatch, contents):
    """pip that downloads a wheel with `contents`, or fails where they are None; returns its calls."""
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        if contents is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/recbole.whl", "w") as wheel:
            for name, text in contents.items():
                wheel.writestr(f"recbole/dataset_example/ml-100k/{name}", text)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fetch_unpacks_once_and_only_what_is_needed(tmp_path, monkeypatch):
    contents = {f"ml-100k.{kind}": f"some {kind}" for kind in ("inter", "item", "user")}
    for name, text in contents.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        monkeypatch.setitem(fetch.__globals__["_SHA256"], name, digest)
    calls = fake_pip(monkeypatch, {**contents, "ml-100k.kg": "a large graph"})
    directory = tmp_path / "deep" / "ml-100k"
    assert fetch(directory) == fetch(directory) == directory
    assert {path.name: path.read_text() for path in directory.iterdir()} == contents
    assert len(calls) == 1
    assert "--no-deps" in calls[0]


def test_fetch_says_how_to_go_on_without_a_network(tmp_path, monkeypatch):
    fake_pip(monkeypatch, None)
    with pytest.raises(OSError, match=r"no network\nWithout a network, place the files by hand: .*u\.data"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_100k(tmp_path)
    assert fetch(tmp_path) == tmp_path


def test_fetch_refuses_files_that_are_not_the_expected_ones(tmp_path, monkeypatch):
    fake_pip(monkeypatch, {f"ml-100k.{kind}": "damaged" for kind in ("inter", "item", "user")})
    with pytest.raises(OSError, match=r"ml-100k.inter must have sha256 4edb74e2"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_movielens_100k_itself():
    try:
        directory = fetch()
    except OSError as error:
        pytest.skip(f"no network: {error}")
    data = load(directory)
    assert (data.rating.size, data.num_users, data.num_items) == (100_000, 943, 1682)
    assert np.bincount(data.rating.astype(int)).tolist() == [0, 6110, 11370, 27145, 34174, 21201]
    train, validation, test = split_by_time(data)
    assert abs(train.size - 80_000) + abs(validation.size - 10_000) + abs(test.size - 10_000) < 10
    examples = movielens_examples(data)
    assert examples.features["history"].max_length == 50
    assert examples.labels.sum() == 34174 + 21201
    toy_story = data.titles.index("Toy Story")
    genres = data.genres.to_lists()[toy_story]
    assert [data.genre_names[g] for g in genres] == ["Animation", "Children's", "Comedy"]
    assert data.year[toy_story] == 1995


def replaced(old, new):
    return lambda text: text.replace(old, new)


@pytest.mark.parametrize(
    ("layout", "name", "change", "message"),
    [
        (
            write_100k,
            "u.data",
            replaced("10\t5", "10\tnan"),
            r"u\.data, line 2: .* finite .* got \['3', '10', 'nan'",
        ),
        (write_100k, "u.data", replaced("10\t5", "10.5\t5"), r"u\.data, line 2: user and item, whole"),
        (write_100k, "u.data", replaced("10\t5", "10\tx"), r"u\.data, line 2: .*'x'"),
        (write_100k, "u.data", replaced("\t90", ""), r"u\.data, line 2: .* got \['3', '10', '5'\]"),
        (write_100k, "u.data", replaced("\t90", "\t90\t1"), r"u\.data must hold ratings, as many numbers"),
        (write_100k, "u.data", lambda _: "", r"u\.data holds no ratings"),
        (write_25m, "ratings.csv", lambda text: text[: text.index("\n")], r"ratings\.csv holds no ratings"),
        (write_25m, "ratings.csv", replaced("20,4", "20,"), r"ratings\.csv, line 2: "),
        (write_1m, "ratings.dat", replaced("20::4", "20::inf"), r"ratings\.dat, line 1: .* between '::'"),
        (write_recbole, "x.inter", replaced("20\t4", "20\tnan"), r"x\.inter, line 2: "),
        (write_100k, "u.item", replaced("|0|0\n", "|0\n"), r"u\.item, line 1: exactly 24 fields .* got 23"),
        (
            write_100k,
            "u.item",
            replaced("url|0", "url|yes"),
            r"u\.item, line 1: a flag of a genre .* got 'yes'",
        ),
        (write_100k, "u.item", replaced("20|", "x|"), r"u\.item, line 2: item must be an integer, got 'x'"),
        (write_100k, "u.user", replaced("24", "old"), r"u\.user, line 1: age must be an integer .* got 'old'"),
        (write_100k, "u.user", replaced("|F|artist|2", ""), r"u\.user, line 2: at least 4 fields .* got 2"),
        (
            write_1m,
            "users.dat",
            replaced("::20::", "::21::"),
            r"users\.dat, line 1: occupation .* \[0, 21\), got '21'",
        ),
        (write_1m, "users.dat", replaced("::20::", "::-1::"), r"users\.dat, line 1: occupation .* got '-1'"),
        (write_1m, "movies.dat", replaced("::Drama", ""), r"movies\.dat, line 2: at least 3 fields"),
        (write_25m, "movies.csv", replaced(",Drama", ""), r"movies\.csv, line 3: at least 3 fields .* got 2"),
        (
            write_25m,
            "movies.csv",
            replaced("30,", "x,"),
            r"movies\.csv, line 4: item must be an integer, got 'x'",
        ),
        (write_recbole, "x.user", replaced("\tartist\t2", ""), r"x\.user, line 3: at least 4 fields .* got 3"),
        (write_recbole, "x.item", replaced("\tDrama", ""), r"x\.item, line 3: at least 4 fields .* got 3"),
    ],
)
def test_malformed_files_are_refused_by_name_and_line(tmp_path, layout, name, change, message):
    layout(tmp_path)
    file = tmp_path / name
    encoding = "latin-1" if layout in (write_100k, write_1m) else "utf-8"
    text = file.read_text(encoding)
    file.write_text(change(text), encoding)
    assert change(text) != text
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_text_of_another_encoding(tmp_path):
    write_25m(tmp_path)
    (tmp_path / "movies.csv").write_bytes((tmp_path / "movies.csv").read_text().encode("latin-1"))
    with pytest.raises(ValueError, match=r"movies\.csv must be utf-8 text, got .* at byte \d+"):
        load(tmp_path)
