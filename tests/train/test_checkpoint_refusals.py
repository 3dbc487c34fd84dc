"""What does not fit, or could not be read back, is refused, unless it is asked for."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxembed import FeatureConfig, QuantizationConfig, TableConfig
from jaxembed.checkpoint import CheckpointError, layout, read_checkpoint, steps, whole_steps
from jaxembed.id_mapping import HashBuckets, VocabularyFile
from jaxembed.optimizers import FTRL, SGD, Adam
from jaxembed.train import Checkpointer, hosts

from .checkpoint_programs import at_step, embedding, feature_config, same


def test_parts_are_left_behind_where_asked(tmp_path):
    own = embedding(1)
    state = at_step(own, 1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(state)
    without_slots = embedding(8, feature_config(optimizer=SGD(0.1)))
    fewer = embedding(1, {"one": FeatureConfig(own.tables["small"])})
    for other, message in (
        (without_slots, r"has slots of table 'a.b/c d' that its optimizer has not: \['accumulators'\]"),
        (fewer, r"has tables that the feature configuration has not: \['a.b/c d'\]"),
    ):
        with Checkpointer(tmp_path, other) as checkpointer:
            with pytest.raises(ValueError, match=message + ".* pass partial=True"):
                checkpointer.restore()
            tables = other.to_canonical(checkpointer.restore(partial=True).state)[0]
        for name, rows in tables.items():
            np.testing.assert_array_equal(rows, own.to_canonical(state)[0][name])


def test_a_failure_to_make_way_is_told_to_the_other_processes(tmp_path, monkeypatch):
    """They would wait for this one."""

    def remove_unfinished(directory):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    told = []
    with Checkpointer(tmp_path, embedding(1)) as checkpointer, monkeypatch.context() as patch:
        patch.setattr(steps, "remove_unfinished", remove_unfinished)
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(multihost_utils, "sync_global_devices", lambda name: None)
        patch.setattr(multihost_utils, "process_allgather", lambda x: told.append(int(x)) or np.array([x, 0]))
        with pytest.raises(OSError, match="Input/output error"):
            checkpointer._sweep()
    assert told == [1]


def test_a_checkpoint_that_does_not_fit_is_told_to_the_other_processes(tmp_path, monkeypatch):
    """One of them may have another vocabulary file."""
    own, told = embedding(1), []
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
    other = embedding(1, feature_config(rows=1004))
    with Checkpointer(tmp_path, other) as checkpointer:
        monkeypatch.setattr(hosts, "processes_where", lambda failed: told.append(failed) or [])
        with pytest.raises(ValueError, match=r"must be float32\[1004, 8\]"):
            checkpointer.restore()
    assert told[-1] is True


@pytest.mark.parametrize(
    "text", ['{"a":[' + "{}," * (1 << 20) + "{}]}", "[" * (1 << 21), '{"a":"' + '\\",' * (1 << 20)]
)
def test_a_manifest_of_many_values_is_refused_at_once(tmp_path, text):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
    (tmp_path / "1" / "manifest" / "metadata").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"no readable manifest/metadata \(it has [\d,]+ values, of at most"
    ):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": 1004},
            r"must be float32\[1004, 8\], the checkpoint has float32\[1003, 8\].*vocabulary_growth",
        ),
        ({"rows": 1000}, r"must be float32\[1000, 8\]"),
        ({"dim": 4}, r"must be float32\[1003, 4\]"),
        ({"dtype": jnp.bfloat16}, r"must be bfloat16\[1003, 8\]"),
        ({"name": "other"}, r"table 'other' must be .*the checkpoint has none"),
        ({"optimizer": Adam(0.1)}, r"has no slot 'momenta' .*only \['accumulators'\].* or pass fresh_slots"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
    with (
        Checkpointer(tmp_path, embedding(1, feature_config(**changes))) as checkpointer,
        pytest.raises(ValueError, match=message),
    ):
        checkpointer.restore()


SAME_NAME = r"two leaves that are stored as '(a.b|x.0)'; give one another name"
NO_ARRAYS = r"model has no arrays, got .*; leave it out"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"a": {"b": jnp.zeros(2)}, "a.b": jnp.ones(2)}, SAME_NAME),
        ({"x": [jnp.ones(1)], "x.0": jnp.zeros(1)}, SAME_NAME),
        ({}, NO_ARRAYS),
        ({"a": None, "b": []}, NO_ARRAYS),
    ],
)
def test_models_that_would_not_come_back_are_refused(tmp_path, model, message):
    """Of leaves of one name Orbax would keep one; without arrays nothing would lie where they are looked for."""
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer, pytest.raises(ValueError, match=message):
        checkpointer.save(at_step(own, 1), model=model)
    assert whole_steps(tmp_path) == []


@pytest.mark.parametrize("argument", ["metadata", "data"])
def test_what_could_not_be_read_back_is_not_saved(tmp_path, argument):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        with pytest.raises(
            ValueError, match=r"has [\d,]+ bytes and 1,04\d,\d+ values; at most .* can be read back"
        ):
            checkpointer.save(at_step(own, 1), **{argument: {"seen": [0] * (1 << 20)}})
        assert checkpointer.save(at_step(own, 1), **{argument: {"seen": [0] * 1_000_000}})
        found = getattr(checkpointer.restore(), argument)
    assert len(found["seen"]) == 1_000_000


@pytest.mark.parametrize("model", [{"n": np.int64(5)}, {"a": None, "b": [jnp.zeros(2)]}])
def test_models_of_few_leaves_come_back(tmp_path, model):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1), model=model)
        restored = checkpointer.restore(model=model).model
    jax.tree.map(np.testing.assert_array_equal, restored, model)


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": None},
        {"metadata": [1]},
        {"step": 1.0},
        {"digests": {"tables": {}, "slots": {}, "model": 5}},
    ],
)
def test_odd_manifests_are_refused(tmp_path, change):
    """Sealed, but by another program."""
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
        checkpointer.wait()
        manifest = layout.read_manifest(tmp_path / "1")
        (tmp_path / "1" / "manifest" / "metadata").write_text(json.dumps(layout.seal({**manifest, **change})))
        for read in (checkpointer.restore, lambda: read_checkpoint(tmp_path)):
            with pytest.raises(CheckpointError, match=r"manifest of .* is incomplete|is missing, though"):
                read()


def test_model_that_does_not_fit_is_refused(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1), model={"w": jnp.zeros((2, 3))})
        checkpointer.save(at_step(own, 2))
        with pytest.raises(ValueError, match=r"leaf 'w' must be bfloat16\[2, 3\], got float32\[2, 3\]"):
            checkpointer.restore(1, model={"w": jnp.zeros((2, 3), jnp.bfloat16)})
        with pytest.raises(ValueError, match=r"leaf 'w' must be float32\[4, 3\]"):
            checkpointer.restore(1, model={"w": jnp.zeros((4, 3))})
        with pytest.raises(ValueError, match=r"must have the leaves \['v'\], got \['w'\]"):
            checkpointer.restore(1, model={"v": jnp.zeros((2, 3))})
        with pytest.raises(ValueError, match="has no model; it was not saved"):
            checkpointer.restore(2, model={"w": jnp.zeros((2, 3))})


def test_vocabulary_grows_where_asked(tmp_path):
    small, large = embedding(1), embedding(8, feature_config(rows=1100))
    state = at_step(small, 4)
    with Checkpointer(tmp_path, small) as checkpointer:
        checkpointer.save(state)
    key = jax.random.key(3)
    with Checkpointer(tmp_path, large) as checkpointer:
        with pytest.raises(ValueError, match="needs a key"):
            checkpointer.restore(vocabulary_growth="initialize")
        with pytest.raises(ValueError, match="must be one of"):
            checkpointer.restore(vocabulary_growth="zeros")
        grown = checkpointer.restore(vocabulary_growth="initialize", key=key).state
    fresh = large.to_canonical(large.init(key))
    old, new = small.to_canonical(state), large.to_canonical(grown)
    name = "a.b/c d"
    for get in (lambda t: t[0][name], lambda t: t[1][name]["accumulators"]):
        rows = np.asarray(get(new))
        np.testing.assert_array_equal(rows[:1003], get(old))
        np.testing.assert_array_equal(rows[1003:], np.asarray(get(fresh))[1003:])


QUANTIZED = QuantizationConfig(16, -1.0, 1.0)


@pytest.mark.parametrize(
    ("saved", "restored", "message"),
    [
        (
            None,
            QUANTIZED,
            r"go through QuantizationConfig\(num_buckets=16.*that it was trained with through none",
        ),
        (
            QUANTIZED,
            None,
            r"go through no quantization, .* trained with through QuantizationConfig\(num_buckets=16",
        ),
        (
            QUANTIZED,
            QuantizationConfig(16, -2.0, 1.0),
            r"go through QuantizationConfig\(num_buckets=16, lower=-2.0",
        ),
    ],
)
def test_another_quantization_is_an_error_unless_asked_for(tmp_path, saved, restored, message):
    """Lookups would give other values than those that the dense model has learnt from."""
    before = embedding(1, feature_config(quantization_config=saved))
    state = at_step(before, 1)
    with Checkpointer(tmp_path, before) as checkpointer:
        checkpointer.save(state)
        assert checkpointer.restore().step == 1
    after = embedding(1, feature_config(quantization_config=restored))
    with Checkpointer(tmp_path, after) as checkpointer:
        with pytest.raises(ValueError, match=rf"table 'a.b/c d' {message}.* pass reinterpret=True"):
            checkpointer.restore()
        found = checkpointer.restore(reinterpret=True).state
    assert same(after, found, *before.to_canonical(state)[:2])


def with_ids(preprocessing, rows=4):
    table = TableConfig(rows, 8, name="words", optimizer=SGD(0.1))
    return embedding(1, {"x": FeatureConfig(table, preprocessing=preprocessing)})


def test_other_rows_of_ids_are_an_error_unless_asked_for(tmp_path):
    """Of the same shape and type, but another vocabulary or hash: each row would be that of another id."""
    for name, text in (("old", "a\nb\nc\nd\n"), ("swapped", "b\na\nc\nd\n"), ("same", "a\nb\nc\nd\n")):
        (tmp_path / name).write_text(text)
    old, swapped, same_words = (VocabularyFile(str(tmp_path / n), 0) for n in ("old", "swapped", "same"))
    cases = [
        (old, swapped),
        (old, None),
        (old, HashBuckets(4)),
        (HashBuckets(4), HashBuckets(4, seed=1)),
        (None, old),
    ]
    for i, (was, now) in enumerate(cases):
        with Checkpointer(tmp_path / str(i), with_ids(was)) as checkpointer:
            checkpointer.save(at_step(with_ids(was), 1))
        with Checkpointer(tmp_path / str(i), with_ids(now)) as checkpointer:
            with pytest.raises(
                ValueError, match=r"feature 'x' makes rows of table 'words' of its ids by .*when it was"
            ):
                checkpointer.restore()
            assert checkpointer.restore(reinterpret=True).step == 1
    with Checkpointer(tmp_path / "0", with_ids(same_words)) as checkpointer:
        assert checkpointer.restore().step == 1


def test_vocabularies_grow_at_their_end(tmp_path):
    (tmp_path / "old").write_text("a\nb\nc\nd\n")
    (tmp_path / "grown").write_text("a\nb\nc\nd\ne\n")
    (tmp_path / "inserted").write_text("a\nb\nz\nc\nd\n")
    old = VocabularyFile(str(tmp_path / "old"), 0)
    with Checkpointer(tmp_path / "steps", with_ids(old)) as checkpointer:
        checkpointer.save(at_step(with_ids(old), 1))
    growth = {"vocabulary_growth": "initialize", "key": jax.random.key(0)}
    with Checkpointer(
        tmp_path / "steps", with_ids(VocabularyFile(str(tmp_path / "grown"), 0), 5)
    ) as checkpointer:
        assert checkpointer.restore(**growth).step == 1
    for name, buckets in (("inserted", 0), ("grown", 1)):
        other = with_ids(VocabularyFile(str(tmp_path / name), buckets), 6)
        with (
            Checkpointer(tmp_path / "steps", other) as checkpointer,
            pytest.raises(ValueError, match="rows would be those of other ids"),
        ):
            checkpointer.restore(**growth)


def test_slots_that_mean_another_number_are_refused(tmp_path):
    def with_option(value):
        optimizer = FTRL(0.1, multiply_linear_by_learning_rate=value)
        return embedding(1, {"x": FeatureConfig(TableConfig(4, 8, name="t", optimizer=optimizer))})

    with Checkpointer(tmp_path, with_option(False)) as checkpointer:
        checkpointer.save(at_step(with_option(False), 1))
        assert checkpointer.restore().step == 1
    with Checkpointer(tmp_path, with_option(True)) as checkpointer:
        with pytest.raises(
            ValueError, match=r"'linears' of table 't' was saved with .*=False, and means another"
        ):
            checkpointer.restore()
        assert checkpointer.restore(reinterpret=True).step == 1
    adagrad = embedding(1, {"x": FeatureConfig(TableConfig(4, 8, name="t"))})
    with Checkpointer(tmp_path, adagrad) as checkpointer:
        assert checkpointer.restore(partial=True).step == 1
    # As converted by way of a format that keeps no slots.
    bare = embedding(1, {"x": FeatureConfig(TableConfig(4, 8, name="t", optimizer=SGD(0.1)))})
    with Checkpointer(tmp_path / "bare", bare) as checkpointer:
        checkpointer.save(at_step(bare, 1))
    manifest = layout.read_manifest(tmp_path / "bare" / "1")
    manifest["optimizers"] = layout.optimizers_to_json({"t": FTRL(0.1)})
    (tmp_path / "bare" / "1" / "manifest" / "metadata").write_text(json.dumps(layout.seal(manifest)))
    with Checkpointer(tmp_path / "bare", with_option(True)) as checkpointer:
        assert checkpointer.restore(fresh_slots=True).step == 1
