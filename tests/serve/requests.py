"""A nested feature configuration of every kind, its tables, and random requests in every form."""

import numpy as np
from hypothesis import strategies as st

from jaxembed import FeatureConfig, RaggedTensor, SparseTensor, TableConfig

USERS = TableConfig(50, 4, name="users")
ITEMS = TableConfig(70, 8, combiner="mean", name="items")
TAGS = TableConfig(7, 4, combiner="sum", name="tags")
WORDS = TableConfig(30, 8, combiner="sqrtn", name="words")

FEATURE_CONFIG = {
    "user": FeatureConfig(USERS),
    "items": {
        "history": FeatureConfig(ITEMS),
        "recent": FeatureConfig(ITEMS, max_sequence_length=3),
    },
    "text": (FeatureConfig(TAGS, validate_weights_and_indices=False), FeatureConfig(WORDS)),
}
PATHS = {
    "items/history": ("items", "history"),
    "items/recent": ("items", "recent"),
    "text/0": ("text", 0),
    "text/1": ("text", 1),
    "user": ("user",),
}
WEIGHTED = ("items/history", "text/0", "text/1")
MAX_IDS = 6
PADDED = 128  # ids of a reference lookup, so that it compiles once per number of rows


def feature(path, tree=FEATURE_CONFIG):
    for key in PATHS[path]:
        tree = tree[key]
    return tree


def nest(leaves):
    return {
        "user": leaves.get("user"),
        "items": {"history": leaves.get("items/history"), "recent": leaves.get("items/recent")},
        "text": (leaves.get("text/0"), leaves.get("text/1")),
    }


def make_tables(seed=0):
    rng = np.random.default_rng(seed)
    return {
        table: rng.normal(size=(table.vocabulary_size, table.dim)).astype(np.float32)
        for table in (USERS, ITEMS, TAGS, WORDS)
    }


def random_lists(rng, path, rows, longest=MAX_IDS):
    size = feature(path).table.vocabulary_size
    return [rng.integers(0, size, rng.integers(0, longest + 1)).tolist() for _ in range(rows)]


def random_inputs(seed, rows):
    rng = np.random.default_rng(seed)
    return nest({path: random_lists(rng, path, rows) for path in PATHS})


def _lists(rng, path, lists, weights):
    return (
        lists,
        weights,
        RaggedTensor.from_lists(lists),
        weights and RaggedTensor.from_lists(weights, np.float32),
    )


def _arrays(rng, path, lists, weights):
    rows = [np.array(row, np.int64) for row in lists]
    expected = RaggedTensor.from_lists(lists)
    given = weights and [np.array(row, np.float32) for row in weights]
    return rows, given, expected, weights and RaggedTensor.from_lists(weights, np.float32)


def _ragged(rng, path, lists, weights):
    dtype = rng.choice([np.int16, np.int32, np.int64, np.uint64])
    ids = RaggedTensor.from_lists(lists, dtype).pad(MAX_IDS * len(lists) + 3)
    given = weights and RaggedTensor.from_lists(weights, np.float16).pad(MAX_IDS * len(lists) + 3)
    expected = RaggedTensor(ids.values.astype(np.int32), ids.row_splits)
    return ids, given, expected, given and RaggedTensor(given.values.astype(np.float32), given.row_splits)


def _sparse(rng, path, lists, weights):
    config = feature(path)
    if config.validate_weights_and_indices and not config.max_sequence_length:  # some to be pruned
        lists = [[-1 - i if rng.random() < 0.1 else i for i in row] for row in lists]
    ids = SparseTensor.from_lists(lists)
    order = rng.permutation(len(ids.values))
    shape = (len(lists), MAX_IDS)
    values = ids.values[order].astype(np.int32)
    ids = SparseTensor(ids.indices[order].astype(np.int32), values, shape).pad(len(order) + 2)
    if weights:
        flat = np.concatenate([np.asarray(row, np.float32) for row in weights])[order]
        if config.table.combiner != "sum":
            flat = np.where(rng.random(flat.size) < 0.1, -flat, flat)
        flat = np.pad(flat.astype(np.float32), (0, 2))
        weights = SparseTensor(ids.indices, flat, shape)
    return ids, weights or None, ids, weights or None


def _dense(rng, path, lists, weights):
    ids = rng.integers(0, feature(path).table.vocabulary_size, len(lists))
    given = ids.tolist() if rng.random() < 0.5 else ids
    one_a_row = RaggedTensor.from_lists(ids[:, None], np.int32)  # what it is of a sequence
    return given, None, one_a_row if feature(path).max_sequence_length else ids.astype(np.int32), None


FORMS = {"lists": _lists, "arrays": _arrays, "ragged": _ragged, "sparse": _sparse, "dense": _dense}


@st.composite
def requests(draw, rows=(3, 19)):
    """Inputs and weights for a ServingFunction and, by path, for serving_embedding_lookup."""
    num_rows = draw(st.sampled_from(rows))
    inputs, weights, expected = {}, {}, {}
    for path in PATHS:
        config = feature(path)
        form = draw(st.sampled_from(list(FORMS)))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        # Rows of a sequence may be longer than the limit: they are cut.
        longest = 5 if form == "sparse" else 2 * MAX_IDS if config.max_sequence_length else MAX_IDS
        longest = MAX_IDS if form == "ragged" else longest
        lists = random_lists(rng, path, num_rows, longest)
        given = None
        if path in WEIGHTED and draw(st.booleans()):
            given = [rng.uniform(0.25, 2, len(row)).astype(np.float16).tolist() for row in lists]
        inputs[path], weights[path], ids, parallel = FORMS[form](rng, path, lists, given)
        expected[path] = (_padded(ids), parallel and _padded(parallel))
    return nest(inputs), nest(weights), expected, num_rows


def _padded(tensor):
    if isinstance(tensor, np.ndarray):
        return tensor
    return tensor.pad(20 * MAX_IDS + PADDED) if len(tensor.values) > PADDED else tensor.pad(PADDED)
