"""Raw ids to rows: published hash values, vocabularies, every form of input, and the same rows in training and serving."""

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from jaxembed import (
    FeatureConfig,
    HashBuckets,
    RaggedTensor,
    SparseTensor,
    TableConfig,
    VocabularyFile,
    preprocess,
    serving_embedding_lookup,
)
from jaxembed.checkpoint import CheckpointError, convert_to_bundle, open_bundle
from jaxembed.hashing import hash_ints, hash_strings
from jaxembed.optimizers import SGD
from jaxembed.raw_ids import BadIdError
from jaxembed.serialization import feature_config_from_json, feature_config_to_json
from jaxembed.serve import EmbeddingForServing, ServingFunction, ServingModel
from jaxembed.train import Checkpointer, ShardedEmbedding

GAMMA = 0x9E3779B97F4A7C15
TABLE = TableConfig(10, 4, name="table")


def test_published_hashes():
    # The first outputs of splitmix64.c from the state 1234567: state n is 1234567 + n GAMMA.
    states = (np.uint64(1234567) + np.arange(5, dtype=np.uint64) * np.uint64(GAMMA)).astype(np.uint64)
    assert hash_ints(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert hash_ints(np.array(0)) == 0xE220A8397B1DCDAF
    # XXH3_64bits of the reference implementation.
    assert hash_strings(["", "a", b"abc"]).tolist() == [
        0x2D06800538D394C2,
        0xE6C632B61E964E1F,
        0x78AF5F94892F3950,
    ]


def test_recorded_hashes():
    """What a trained table depends on must never change."""
    ids = np.array([-(2**63), -5, -1, 0, 1, 2**31, 2**40, 2**63 - 1])
    assert HashBuckets(1000).rows(ids).tolist() == RECORDED["int64"]
    assert HashBuckets(1000, seed=7).rows(ids).tolist() == RECORDED["int64, seed 7"]
    words = ["", "film", "Amélie", "映画", "a" * 300]
    assert HashBuckets(1000, "string").rows(words).tolist() == RECORDED["string"]
    assert HashBuckets(1000, "string", seed=7).rows(words).tolist() == RECORDED["string, seed 7"]


RECORDED = {
    "int64": [915, 514, 936, 535, 465, 868, 641, 39],
    "int64, seed 7": [474, 744, 326, 319, 666, 477, 300, 258],
    "string": [138, 512, 846, 529, 633],
    "string, seed 7": [464, 508, 989, 663, 202],
}


def _splitmix64(x):
    z = (x + GAMMA) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.integers(0, 2**64 - 1))
def test_hash_of_ints_is_its_formula(ids, seed):
    hashed = [_splitmix64(i % 2**64) for i in ids]
    hashed = [_splitmix64(h ^ seed) if seed else h for h in hashed]
    assert hash_ints(np.array(ids, np.int64), seed).tolist() == hashed
    small = np.array([i % 100 for i in ids], np.int8)
    assert hash_ints(small).tolist() == hash_ints(small.astype(np.int64)).tolist()


def test_buckets_are_even():
    counts = np.bincount(HashBuckets(100).rows(np.arange(100_000)), minlength=100)
    assert counts.min() > 850  # 1000 each, with a standard deviation of 32
    assert counts.max() < 1150


@pytest.fixture
def words(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("film\nAmélie\n映画\n", encoding="utf-8")
    return VocabularyFile(file, num_oov_buckets=2)


def test_vocabulary(words, tmp_path):
    assert (words.size, words.num_rows) == (3, 5)
    rows = words.rows(["映画", "film", b"film", "Amélie", "x", ""])
    assert rows[:4].tolist() == [2, 0, 0, 1]
    assert rows[4:].tolist() == (3 + HashBuckets(2, "string").rows(["x", ""])).tolist()
    numbers = tmp_path / "numbers.txt"
    numbers.write_bytes(b"5\r\n-9\n1099511627776")
    vocabulary = VocabularyFile(numbers, 0, "int64")
    assert vocabulary.rows(np.array([2**40, 5, -9, 5])).tolist() == [2, 0, 1, 0]
    others = VocabularyFile(numbers, 7, "int64")
    assert others.rows([5, 99, -9]).tolist() == others.rows(np.array([5, 99, -9])).tolist()
    moved = tmp_path / "moved.txt"
    moved.write_bytes(numbers.read_bytes())
    assert vocabulary == VocabularyFile(moved, 0, "int64")
    assert vocabulary != VocabularyFile(moved, 1, "int64")


@pytest.mark.parametrize(
    ("content", "dtype", "message"),
    [
        (b"a\nb\na\n", "string", r"line 3 repeats b'a'; each id must be there once"),
        (b"a\n\nb\n", "string", "line 2 is empty"),
        (b"\xff\n", "string", "is not UTF-8"),
        (b"1\nx\n", "int64", r"line 2 must be an int64, got b'x'"),
        (b"1\n9223372036854775808\n", "int64", "line 2 must be an int64"),
        (b"1\n01\n", "int64", "line 2 repeats 1"),
        (b"\xef\xbb\xbfa\nb\n", "string", "begins with a byte order mark, .* without one"),
    ],
)
def test_vocabularies_that_are_none(tmp_path, content, dtype, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        VocabularyFile(tmp_path / "file", dtype=dtype)


def test_a_vocabulary_that_changed_is_refused(words, tmp_path):
    recorded = dataclasses.replace(words)  # as a checkpoint gives it: read when first needed
    (tmp_path / "words.txt").write_text("Amélie\nfilm\n映画\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is not the one that was recorded: its digest differs"):
        recorded.rows(["film"])
    (tmp_path / "words.txt").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        recorded.rows(["film"])
    with pytest.raises(ValueError, match="cannot be read"):
        VocabularyFile(tmp_path / "nothing")


def test_a_byte_order_mark_of_a_recorded_vocabulary(tmp_path, caplog):
    """Its digest is that of a file with the mark, so it cannot be written without."""
    content = b"\xef\xbb\xbfa\nb\n"
    (tmp_path / "file").write_bytes(content)
    recorded = VocabularyFile(tmp_path / "file", 0, digest=xxhash.xxh3_128_hexdigest(content), size=2)
    assert recorded.rows(["b", "\ufeffa"]).tolist() == [1, 0]
    assert "begins with a byte order mark" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HashBuckets(0), r"num_buckets must be an int in \[1, 2147483648\), got 0"),
        (lambda: HashBuckets(True), "num_buckets must be an int"),
        (lambda: HashBuckets(5, "float"), r"dtype must be one of \('int64', 'string'\), got 'float'"),
        (lambda: HashBuckets(5, seed=-1), "seed must be an int"),
        (
            lambda: FeatureConfig(TABLE, preprocessing="hash"),
            "preprocessing must be HashBuckets, VocabularyFile or",
        ),
        (
            lambda: FeatureConfig(TABLE, preprocessing=HashBuckets(11)),
            r"gives rows in \[0, 11\), but table 'table' has vocabulary_size 10",
        ),
        (lambda: FeatureConfig(TABLE, 0, True, None, None, HashBuckets(5)), "positional"),
    ],
)
def test_errors_of_configurations(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def config(words):
    return {
        "word": FeatureConfig(TABLE, preprocessing=words),
        "nested": [
            FeatureConfig(TABLE, preprocessing=HashBuckets(10)),
            FeatureConfig(TABLE, max_sequence_length=2, preprocessing=HashBuckets(9, "string")),
        ],
        "plain": FeatureConfig(TABLE),
    }


class Foreign:
    def __init__(self, array):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        return self._array


def test_every_form_of_input(words):
    feature = {"f": FeatureConfig(TABLE, preprocessing=words)}
    lists = [["film", "x"], [], ["映画"]]
    expected = [words.rows(row).tolist() for row in lists]
    flat = ["film", "x", "映画"]
    coordinates = [[0, 0], [0, 1], [2, 0], [3, 0]]
    ragged = RaggedTensor(np.array([*flat, "padding"]), np.array([0, 2, 2, 3]))
    sparse = SparseTensor(np.array(coordinates), np.array([*flat, "padding"], object), (3, 2))
    for leaf in (lists, [np.array(row, object) for row in lists], ragged):
        got = preprocess({"f": leaf}, feature)["f"]
        assert got.to_lists() == expected
        assert got.values.dtype == np.int32
    got = preprocess({"f": sparse}, feature)["f"]
    assert got.values.tolist() == [*expected[0], *expected[2], 0]
    as_bytes = np.array([word.encode() for word in flat])
    for leaf in (flat, np.array(flat), as_bytes, np.array(flat, np.dtypes.StringDType())):
        assert preprocess({"f": leaf}, feature)["f"].tolist() == words.rows(flat).tolist()
    numbers = {"f": FeatureConfig(TABLE, preprocessing=HashBuckets(10))}
    ids = np.array([[1, -5], [2**40, 7]])
    assert preprocess({"f": ids}, numbers)["f"].tolist() == HashBuckets(10).rows(ids).tolist()
    assert preprocess({"f": [[], []]}, numbers)["f"].to_lists() == [[], []]
    rows = [HashBuckets(10).rows(row).tolist() for row in ([1, 2], [3])]
    for leaf in ([jnp.array([1, 2]), [3]], [[1, 2], jnp.array([3])], [jnp.array([1, 2]), np.array([3])]):
        assert preprocess({"f": leaf}, numbers)["f"].to_lists() == rows
    for array in (np.array(flat), np.array(flat, object)):  # as of a column of a data frame
        assert preprocess({"f": Foreign(array)}, feature)["f"].tolist() == words.rows(flat).tolist()
    # Of another library: as wide as they are, where `as_input` would saturate them.
    assert preprocess({"f": Foreign(ids)}, numbers)["f"].tolist() == HashBuckets(10).rows(ids).tolist()
    plain = {"f": FeatureConfig(TABLE)}
    assert preprocess({"f": lists}, plain)["f"] is lists


class Pair(NamedTuple):
    left: Any
    right: Any


A, B = (FeatureConfig(TABLE, preprocessing=HashBuckets(10)) for _ in range(2))
LISTS = np.array([[1, 2], [3]], object)
IDS, ROWS = np.array([1, 2, 3]), [5, 0, 3]


@pytest.mark.parametrize(
    ("features", "inputs", "refusal"),
    [
        ([A, B], [IDS], "must be a list or tuple of 2 entries, got 1 entries"),
        ((A, B), [IDS, IDS], None),
        ([A, B], {"0": IDS, "1": IDS}, "must be a list or tuple of 2 entries, got dict"),
        ({"a": [A, B], "b": A}, {"a": [IDS]}, "at 'a' must be a list or tuple of 2 entries, got 1 entries"),
        ({0: A}, {"0": IDS}, None),
        ({"0": A}, {0: IDS}, None),
        ({"0": A, "1": B}, [IDS, IDS], r"must be a dict with \['0', '1'\], got list"),
        (Pair(A, B), {"left": IDS}, "'right' is missing"),
        (Pair(A, B), {"left": IDS, "right": IDS}, None),
        ({"left": A, "right": B}, Pair(IDS, IDS), None),
        ({"a/b": A}, {"a": {"b": IDS}}, "has no feature 'a'"),
        ({"a": {"b": A}, "c": FeatureConfig(TABLE)}, {"a/b": IDS}, "has no feature 'a/b'"),
        (collections.OrderedDict(b=A, a=B), collections.OrderedDict(b=IDS), "'a' is missing"),
        ({"": A}, {"": IDS}, None),
        ({"": A}, IDS, r"must be a dict with \[''\], got ndarray"),
        (A, IDS, None),
    ],
)
def test_ids_that_match_a_feature_are_never_taken_for_rows(features, inputs, refusal):
    """However the containers of both sides are made; a ServingFunction takes the structure of the configuration alone."""
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    rows = preprocess(inputs, features)
    assert type(rows) is type(inputs) or isinstance(inputs, np.ndarray)
    assert [leaf.tolist() for leaf in jax.tree.leaves(rows)] == [ROWS] * len(jax.tree.leaves(inputs))
    embedding = EmbeddingForServing(features, {"table": table})
    for leaf in jax.tree.leaves(embedding(inputs)):
        np.testing.assert_array_equal(leaf, table[ROWS])
    sharded = ShardedEmbedding(features, SGD(0.1), jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]))
    state = sharded.init(jax.random.key(0))
    (trained,) = sharded.embedding_tables(state).values()
    batch, _ = sharded.shard_batch(inputs)
    for leaf in jax.tree.leaves(sharded.lookup(state, batch)):
        np.testing.assert_array_equal(leaf, np.asarray(trained)[ROWS])
    function = ServingFunction(embedding, batch_sizes=(3,))
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            function(inputs)
        return
    for leaf in jax.tree.leaves(function(inputs)):
        np.testing.assert_array_equal(leaf, table[ROWS])


@pytest.mark.parametrize(
    ("dtype", "leaf", "message"),
    [
        ("int64", [[1], [2, "a"]], r"Feature 'f', row 1, position 1: the id must be an int64, got 'a'"),
        ("int64", [[1.5]], "row 0, position 0: the id must be an int64, got 1.5"),
        ("int64", [True], "row 0: the id must be an int64, got True"),
        ("int64", [[2**63]], "must be an int64, got 9223372036854775808"),
        ("int64", np.array([1, 2**63], np.uint64), "row 1: the id must be an int64, got 9223372036854775808"),
        ("int64", np.ma.array([1, 2], mask=[0, 1]), "Feature 'f' is a masked array with 1 masked entries"),
        ("int64", np.array([1.0]), r"the id must be an int64, got (np.float64\(1|1)"),
        ("string", [["a", 5]], "row 0, position 1: the id must be a string, got 5"),
        ("string", np.array([1]), "row 0: the id must be a string"),
        ("int64", LISTS, r"row 0: the id must be an int64, got \[1, 2\]; pass bags as a list of lists"),
        ("string", LISTS, r"row 0: the id must be a string, got \[1, 2\]; pass bags as a list of lists"),
        ("string", [["\ud800"]], "must be a string of whole characters"),
        ("string", [["a"], "b"], "row 1 must be a list of ids or one id, alike in all rows, got 'b'"),
        (
            "string",
            SparseTensor(np.array([[0, 0], [1, 4]]), np.array(["a", None], object), (2, 5)),
            "row 1, position 4: the id must be a string, got None",
        ),
    ],
)
def test_errors_of_ids(dtype, leaf, message):
    with pytest.raises(ValueError, match=message):
        preprocess({"f": leaf}, {"f": FeatureConfig(TABLE, preprocessing=HashBuckets(5, dtype))})


def test_an_ordered_dict_keeps_its_order():
    """Another order is another structure to JAX."""
    inputs = collections.OrderedDict(b=IDS, a=collections.OrderedDict(d=IDS, c=IDS))
    found = preprocess(inputs, {"a": {"c": A, "d": FeatureConfig(TABLE)}, "b": B})
    assert (list(found), list(found["a"])) == (["b", "a"], ["d", "c"])
    assert jax.tree.structure(found) == jax.tree.structure(inputs)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([5, 2**63], np.uint64), "must be an int64, got 9223372036854775808"),
        ([2**63, -1], "must be an int64, got 9223372036854775808"),
        (np.array([5.0]), "must be an int64, got"),
        (["5"], "must be an int64, got '5'"),
        (np.array(["5"]), "must be an int64, got"),
        ([True], "must be an int64, got True"),
    ],
)
def test_rows_of_ids_of_another_type_are_refused(tmp_path, ids, message):
    """Rather than rounded or parsed to ids that they are not."""
    (tmp_path / "numbers.txt").write_text("5\n-1\n1152921504606846977\n")
    vocabulary = VocabularyFile(tmp_path / "numbers.txt", 1, "int64")
    for preprocessing in (vocabulary, HashBuckets(10)):
        with pytest.raises(BadIdError, match=message):
            preprocessing.rows(ids)
    for preprocessing in (VocabularyFile(tmp_path / "numbers.txt", 1), HashBuckets(10, "string")):
        with pytest.raises(BadIdError, match="must be a string, got"):
            preprocessing.rows([5])
    if isinstance(ids, np.ndarray) and ids.dtype.kind != "u":
        with pytest.raises(ValueError, match="ids must be integers of at most 64 bits"):
            hash_ints(ids)


@pytest.mark.parametrize(
    "ids", ["abc", b"abc", np.str_("abc"), 5, np.int64(5), np.array(5), np.array(5.0), np.array("a", object)]
)
def test_rows_take_a_sequence(ids):
    """The letters of a string are not its ids."""
    for dtype in ("int64", "string"):
        with pytest.raises(ValueError, match=r"rows\(\) takes a sequence or array of \[N\] ids, got"):
            HashBuckets(10, dtype).rows(ids)


def test_rows_of_arrays_of_integers(tmp_path):
    """float64 does not tell such ids apart, and numpy compares uint64 with int64 in it."""
    (tmp_path / "numbers.txt").write_text("1152921504606846976\n1152921504606846977\n5\n")
    vocabulary = VocabularyFile(tmp_path / "numbers.txt", 0, "int64")
    assert vocabulary.rows(np.array([2**60 + 1, 2**60], np.uint64)).tolist() == [1, 0]
    assert vocabulary.rows(jnp.array([5])).tolist() == [2]
    assert HashBuckets(10).rows(jnp.array([5])).tolist() == HashBuckets(10).rows([5]).tolist()
    assert vocabulary.rows(np.array([])).tolist() == HashBuckets(10).rows([]).tolist() == []


@pytest.mark.parametrize("shape", [(4, 2), (2, 2, 2), (0, 3)])
def test_rows_of_arrays_of_any_rank(tmp_path, shape):
    (tmp_path / "numbers").write_text("5\n7\n9\n")
    ids = np.resize(np.array([5, 7, 100, 9, 7, -5]), shape)
    vocabulary = VocabularyFile(str(tmp_path / "numbers"), num_oov_buckets=2, dtype="int64")
    for mapping in (vocabulary, HashBuckets(10)):
        rows = [mapping.rows(ids.reshape(-1)[at : at + 1])[0] for at in range(ids.size)]
        np.testing.assert_array_equal(mapping.rows(ids), np.reshape(rows, shape), strict=False)
        assert mapping.rows(ids).shape == shape
    if ids.size:
        closed = dataclasses.replace(vocabulary, num_oov_buckets=0)
        for wrong, dtype in ((100, np.int64), (2**63, np.uint64)):
            with pytest.raises(BadIdError, match=f"{wrong}") as error:
                closed.rows(np.where(ids == 100, np.uint64(wrong), 5).astype(dtype))
            assert error.value.at == 2


def test_out_of_vocabulary_without_buckets(words):
    strict = dataclasses.replace(words, num_oov_buckets=0)
    with pytest.raises(
        ValueError, match=r"Feature 'f', row 1, position 0: id 'x' is not in the vocabulary of 3 ids"
    ):
        preprocess({"f": [["film"], ["x"]]}, {"f": FeatureConfig(TABLE, preprocessing=strict)})


def test_columns_of_parquet_files(words):
    pa = pytest.importorskip("pyarrow")
    feature = {"f": FeatureConfig(TABLE, preprocessing=words)}
    lists = [["film", "x"], [], ["映画"]]
    expected = [words.rows(row).tolist() for row in lists]
    kinds = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    flat, splits = pa.array([word for row in lists for word in row]), pa.array([0, 2, 2, 3], pa.int32())
    for values in (
        *map(flat.cast, kinds),
        flat.dictionary_encode(),
        flat.cast(pa.binary()).dictionary_encode(),
    ):
        column = pa.ListArray.from_arrays(splits, values)
        got = preprocess({"f": column[:3]}, feature)["f"]
        assert got.to_lists() == expected
    nothing = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["film", None]))
    columns = [pa.array([[True]]), pa.array([["a"], None]), pa.array(["a"])]
    for column in (*columns, pa.ListArray.from_arrays(splits, nothing)):
        with pytest.raises(ValueError, match="Feature 'f': as_input: "):
            preprocess({"f": column}, feature)


def test_traced_ids_are_refused():
    feature = {"f": FeatureConfig(TABLE, preprocessing=HashBuckets(5))}
    with pytest.raises(ValueError, match="has preprocessing, which runs on the host, but its ids are traced"):
        jax.jit(lambda ids: preprocess({"f": ids}, feature))(np.arange(3))


def test_json_round_trip(words):
    original = config(words)
    again = feature_config_from_json(feature_config_to_json(original))
    assert again == original
    assert again["word"].preprocessing.rows(["映画"]).tolist() == [2]
    plain = feature_config_to_json({"f": FeatureConfig(TABLE)})
    assert "preprocessing" not in plain
    for bad in (
        '{"kind": "other"}',
        '{"kind": "vocabulary", "file": "/etc/passwd"}',
        '{"kind": "hash", "x": 1}',
        "5",
    ):
        text = plain.replace('"name": null', f'"name": null, "preprocessing": {bad}')
        assert bad in text
        with pytest.raises(ValueError, match=r"preprocessing|not a feature configuration"):
            feature_config_from_json(text)


def test_training_and_serving_map_alike(words, tmp_path):
    features = config(words)
    embedding = ShardedEmbedding(features, SGD(0.1), jax.make_mesh((2,), ("d",), devices=jax.devices()[:2]))
    state = embedding.init(jax.random.key(0))
    lists = {"word": [["film", "x"], ["映画"]], "nested": [[[-5, 2**40], []], [["a", "b", "c"], []]]}
    plain = RaggedTensor.from_lists([[1], [2]])
    ragged = {
        "word": RaggedTensor(np.array(["film", "x", "映画"]), np.array([0, 2, 3])),
        "nested": [
            RaggedTensor(np.array([-5, 2**40]), np.array([0, 2, 2])),
            RaggedTensor(np.array(["a", "b", "c"]), np.array([0, 3, 3])),
        ],
        "plain": plain,
    }
    trained = jax.tree.map(np.asarray, embedding.lookup(state, ragged))
    rows = preprocess(ragged, features)
    by_hand = serving_embedding_lookup(rows, None, embedding.embedding_tables(state), features)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), trained, by_hand)
    with Checkpointer(tmp_path / "checkpoint", embedding, asynchronous=False) as checkpointer:
        checkpointer.save(state)
    convert_to_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    (tmp_path / "words.txt").unlink()  # the bundle has its own
    assert open_bundle(tmp_path / "bundle").feature_config == features
    model = ServingModel(tmp_path / "bundle", max_batch_size=2, max_ids_per_row=3)
    for served in (model(lists | {"plain": [[1], [2]]}), model(ragged)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), served, trained)
    eager = EmbeddingForServing.restore(tmp_path / "bundle")(ragged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, trained)
    assert [(f.path, f.dtype, f.preprocessed) for f in model.signature.features] == [
        ("nested/0", "int64", True),
        ("nested/1", "string", True),
        ("plain", "int64", False),
        ("word", "string", True),
    ]
    (file,) = (tmp_path / "bundle" / "0" / "vocabularies").iterdir()
    file.write_text("Amélie\nfilm\n映画\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="its digest differs"):
        ServingModel(tmp_path / "bundle", verify=False)


@pytest.mark.parametrize(
    ("old", "new", "continues"),
    [
        ("a\nb\n", "a\nb\nc\n", True),
        ("a\nb\n", "a\nb\n", True),
        ("a\nb\n", "a\nb", True),
        ("a\nb", "a\nb\nc\n", True),
        ("a\nb\n", "a\nbc\nd", False),
        ("a\nb\n", "a\n", False),
        ("a\nb\n", "b\na\nc", False),
        ("a\nb\n", "z\na\nb", False),
    ],
)
def test_vocabularies_that_continue_another(tmp_path, old, new, continues):
    """Also where the old file is gone: its digest is what is compared."""
    (tmp_path / "old").write_text(old)
    (tmp_path / "new").write_text(new)
    before, after = (VocabularyFile(str(tmp_path / name), 0) for name in ("old", "new"))
    (tmp_path / "old").unlink()
    assert after.continues(before) == continues
    rows = lambda vocabulary: {token: row for row, token in enumerate(vocabulary.splitlines())}  # noqa: E731
    assert continues == (rows(old).items() <= rows(new).items())
    assert not dataclasses.replace(after, num_oov_buckets=1).continues(before)


def test_ids_of_rows_that_a_mask_leaves_out_are_not_looked_at(tmp_path):
    """In every form; what is bad elsewhere is named by its own place."""
    (tmp_path / "known").write_text("x\ny\n")
    features = {"x": FeatureConfig(TABLE, preprocessing=VocabularyFile(tmp_path / "known", num_oov_buckets=0))}
    mask = np.float32([1, 0, 1])

    def forms(bad):
        yield ["x", "?", bad], [0, 0, 1], "row 2"
        yield [["x"], ["?", "?"], ["y", bad]], [0, 0, 0, 1, 1], "row 2, position 1"
        yield np.array([["x", "y"], ["?", "?"], ["y", bad]]), [[0, 1], [0, 0], [1, 1]], "row 5"
        values = np.array(["x", "?", bad], object)
        yield RaggedTensor(values, np.array([0, 1, 2, 3])), [0, 0, 1], "row 2, position 0"
        yield SparseTensor(np.array([[0, 0], [1, 0], [2, 3]]), values, (3, 4)), [0, 0, 1], "row 2, position 3"

    for raw, rows, _ in forms("y"):
        found = preprocess({"x": raw}, features, mask)["x"]
        assert np.asarray(getattr(found, "values", found)).tolist() == rows
    for raw, _, place in forms("!"):
        with pytest.raises(ValueError, match=f"Feature 'x', {place}: id '!' is not in the vocabulary"):
            preprocess({"x": raw}, features, mask)


def test_an_example_id_has_a_row(tmp_path):
    for content, dtype in (("heat\ncasino\n", "string"), ("", "string"), ("7\n-3\n", "int64"), ("", "int64")):
        (tmp_path / "file").write_text(content)
        for preprocessing in (
            VocabularyFile(str(tmp_path / "file"), num_oov_buckets=0 if content else 1, dtype=dtype),
            HashBuckets(9, dtype=dtype),
        ):
            feature = FeatureConfig(
                TableConfig(preprocessing.num_rows, 2, name="t"), preprocessing=preprocessing
            )
            rows = preprocess({"x": [preprocessing.example_id]}, {"x": feature})["x"]
            assert 0 <= rows[0] < preprocessing.num_rows
