"""A dry run says yes where the run says yes, and refuses what it refuses, in the same words, of every format."""

import importlib
import os
import pathlib
import re
import tempfile

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import convert_to_bundle, digests, layout
from jaxembed.cli import main
from jaxembed.convert import FORMATS, convert
from jaxembed.convert.keys import own_key
from jaxembed.id_mapping import HashBuckets, VocabularyFile
from jaxembed.optimizers import SGD
from jaxembed.serialization import feature_config_to_json
from jaxembed.train import Checkpointer, ShardedEmbedding

#: A target of each format, and of those that write several forms one of each.
TARGETS = [
    *(("jaxembed", "out"), ("npy", "out"), ("npz", "a.npz"), ("safetensors", "a.safetensors")),
    *(("torchrec", "a.pt"), ("torchrec", "a.safetensors"), ("torchrec", "sharded"), ("tensorflow", "out")),
    *(("jax-tpu-embedding", "out"), ("keras-rs", "a.h5"), ("saved-model", "out")),
]
NEEDS = {
    "torchrec": ["torch"],
    "tensorflow": ["tensorflow"],
    "keras-rs": ["h5py"],
    "saved-model": ["tensorflow", "orbax.export"],
    "jax-tpu-embedding": ["jax_tpu_embedding"],
}
SHAPE = (6, 8)


def test_every_format_is_tried():
    assert {form for form, _ in TARGETS} == set(FORMATS)


def save(folder, tables, slots, slot_type):
    """Tables, and slots of the first one, in a safetensors file; other types of tables come by --dtype."""
    arrays = {own_key((name, None)): np.full(SHAPE, i + 0.5, np.float32) for i, name in enumerate(tables)}
    arrays |= {own_key((tables[0], slot)): np.ones(SHAPE, slot_type) for slot in slots}
    save_file(arrays, folder / "source.safetensors")
    return folder / "source.safetensors"


def template(folder, tables, dtype):
    """What keras-rs and jax-tpu-embedding need besides: of `tables`, or None."""
    h5py = importlib.import_module("h5py")
    with h5py.File(folder / "template.h5", "w") as file:
        for i, name in enumerate(tables):
            group = file.create_group(f"e/_default_device_embedding_layers/r{i}/vars")
            group.attrs["name"] = name
            group["0"] = np.zeros(SHAPE, dtype)
    return folder / "template.h5"


def outcome(dry_run, source, place, **arguments):
    try:
        report = convert(source, place, dry_run=dry_run, **arguments)
    except ValueError as e:
        return type(e), str(e)
    return [(array.table, array.slot, array.dtype, array.num_bytes) for array in report.arrays]


NAMES = ["t", "a.b", "x/accumulators", "x", "../up", "é ü", "n" * 300, "n" * 70_000]


@pytest.mark.parametrize(
    ("form", "name"), [pytest.param(*t, marks=[pytest.mark.parity] * (t[0] in NEEDS)) for t in TARGETS]
)
def test_dry_run_is_the_run(form, name):
    for package in NEEDS.get(form, []):
        pytest.importorskip(package)
    seen = set()

    @hypothesis.settings(
        max_examples=8 if form == "saved-model" else 40, deadline=None, database=None, derandomize=True
    )
    @hypothesis.given(
        indices=st.lists(st.integers(0, len(NAMES) - 1), min_size=1, max_size=2, unique=True),
        dtype=st.sampled_from([None, "float16", "bfloat16"]),
        slots=st.sampled_from([[], ["accumulators"], ["momenta", "velocities"], ["odd"]]),
        slot_type=st.sampled_from([np.float32, np.float64]),
        layout=st.sampled_from([None, "fits", "another"]) if form == "keras-rs" else st.none(),
    )
    def tried(indices, dtype, slots, slot_type, layout):
        with tempfile.TemporaryDirectory() as made:
            folder, tables = pathlib.Path(made), [NAMES[i] for i in indices]
            source = save(folder, tables, slots, slot_type)
            arguments = {"source_format": "safetensors", "target_format": form, "dtype": dtype}
            if layout is not None:
                arguments["layout"] = template(
                    folder, tables if layout == "fits" else ["q"], dtype or np.float32
                )
            before = sorted(folder.rglob("*"))
            planned = outcome(True, source, folder / name, **arguments)
            assert sorted(folder.rglob("*")) == before
            done = outcome(False, source, folder / name, **arguments)
            assert planned == done
            # What is refused leaves nothing either.
            assert isinstance(done, list) or sorted(folder.rglob("*")) == before
            seen.add(type(done) is list)

    tried()
    # Not a test of one answer alone. Without a layout of theirs all is refused; safetensors take everything.
    one_answer = {"jax-tpu-embedding": {False}, "safetensors": {True}}
    assert seen == one_answer.get(form, {False, True})


@pytest.mark.parametrize(
    ("form", "out", "arguments", "message"),
    [
        ("npy", "out", {"dtype": "bfloat16"}, r"\.npy cannot hold bfloat16, the type of table 't'; convert it with --dtype"),
        ("npz", "a.npz", {"dtype": "bfloat16"}, r"\.npz cannot hold bfloat16"),
        ("npy", "out", {"tables": ["n" * 300]}, r"too long a name for a file: 304 characters of at most 255"),
        ("jaxembed", "out", {"tables": ["n" * 70_000]}, r"too long a name for a checkpoint: 70002 characters"),
        ("npz", "a.npz", {"tables": ["n" * 70_000]}, r"too long a name for a zip archive: 70011 characters"),
        pytest.param(
            "tensorflow", "out", {"dtype": "float16"}, "a TPUEmbedding of TensorFlow cannot hold float16",
            marks=pytest.mark.parity,
        ),
        pytest.param(
            "tensorflow", "out", {"slot_type": np.float64, "slots": ["accumulators"]},
            "cannot hold float64, the type of slot 'accumulators' of table 't'; leave it out",
            marks=pytest.mark.parity,
        ),
        pytest.param(
            "tensorflow", "out", {"tables": ["x", "x/accumulators"], "slots": ["accumulators"]},
            "table 'x/accumulators' and slot 'accumulators' of table 'x' would be one variable of TensorFlow",
            marks=pytest.mark.parity,
        ),
        pytest.param("torchrec", "a.pt", {"tables": ["a.b"]}, "cannot be a module of torch", marks=pytest.mark.parity),
        pytest.param(
            "torchrec", "sharded", {"slots": ["odd"]}, "which no fused optimizer of TorchRec has",
            marks=pytest.mark.parity,
        ),
        pytest.param("keras-rs", "a.h5", {}, "pass it as layout", marks=pytest.mark.parity),
        pytest.param("jax-tpu-embedding", "out", {}, "pass it as layout", marks=pytest.mark.parity),
    ],
)  # fmt: skip
def test_what_a_dry_run_refuses(tmp_path, form, out, arguments, message):
    for package in NEEDS.get(form, []):
        pytest.importorskip(package)
    arguments = dict(arguments)
    source = save(
        tmp_path,
        arguments.pop("tables", ["t"]),
        arguments.pop("slots", []),
        arguments.pop("slot_type", np.float32),
    )
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / out, target_format=form, dry_run=dry_run, **arguments)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A checkpoint of what `save` saves."""
    folder = tmp_path_factory.mktemp("checkpoint")
    convert(save(folder, ["t"], [], np.float32), folder / "steps")
    return folder / "steps"


def test_tables_with_more_digests_than_a_manifest_has_room_for(tmp_path, monkeypatch):
    """What was written would be read by nothing; it is found before hours of writing."""
    monkeypatch.setattr(digests, "BLOCK_BYTES", 64)
    source = save(tmp_path, ["t"], ["accumulators"], np.float32)
    convert(source, tmp_path / "steps")
    for write, room, told in (
        (convert, 5, r"384 bytes of tables and slots have 6 digests, .* and a manifest has room for 5; spread"),
        (
            convert_to_bundle,
            2,
            r"192 bytes of tables and slots have 3 digests, .* and a manifest has room for 2",
        ),
    ):
        start = source if write is convert else tmp_path / "steps"
        monkeypatch.setattr(layout, "MAX_JSON", layout.ROOM + room * digests.HEX_DIGITS)
        for dry_run in (True, False):
            with pytest.raises(ValueError, match=told):
                write(start, tmp_path / "out", dry_run=dry_run)
            assert not (tmp_path / "out").exists()
        monkeypatch.setattr(layout, "MAX_JSON", layout.ROOM + (room + 1) * digests.HEX_DIGITS)
        write(start, tmp_path / write.__name__)


def blocked(folder, how):
    """A place where nothing can be written, and what is said of it."""
    file = folder / "file"
    file.write_text("")
    (folder / "nowhere").symlink_to(folder / "gone")
    long = "n" * 300
    return {
        "a file": (file, r"file (exists|is no folder, so nothing can be written at)"),
        "below a file": (file / "out", r"file is no folder, so nothing can be written at .*/out"),
        "far below a file": (
            file / "a" / "b" / "out",
            r"file is no folder, so nothing can be written at .*b/out",
        ),
        "a link to nothing": (folder / "nowhere", "nowhere (exists|is a symbolic link to nothing)"),
        "below a link to nothing": (folder / "nowhere" / "out", "nowhere is a symbolic link to nothing, so"),
        "a long name": (folder / long, "is too long a name for a file: 300 bytes of at most 255"),
        "a long name of a folder": (
            folder / long / "out",
            "is too long a name for a file: 300 bytes of at most 255",
        ),
        "a long path": (
            folder.joinpath(*["n" * 200] * 20) / "out",
            r"is too long a path: [\d,]+ bytes of at most",
        ),
    }[how]


PLACES = ["a file", "below a file", "far below a file", "a link to nothing", "below a link to nothing"]
PLACES += ["a long name", "a long name of a folder", "a long path"]


@pytest.mark.parametrize("how", PLACES)
@pytest.mark.parametrize(
    "form", ["jaxembed", "npy", "npz", "safetensors", "serving", "serving of a checkpoint"]
)
def test_places_where_nothing_can_be(steps, tmp_path, capsys, form, how):
    """The same words, and nothing is left of what was tried."""
    source = save(tmp_path, ["t"], [], np.float32)
    if form == "serving of a checkpoint":
        source, form = steps, "serving"
    place, message = blocked(tmp_path, how)
    before, told = sorted(tmp_path.rglob("*")), []
    for dry_run in (["--dry-run"], []):
        assert main(["convert", str(source), "--to", form, str(place), *dry_run]) == 2
        told.append(capsys.readouterr().err)
        assert sorted(tmp_path.rglob("*")) == before
    assert told[0] == told[1]
    assert re.search(message, told[0])


def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path):
    """What is written beside a place has names of its own, which are no longer."""
    source = save(tmp_path, ["t"], [], np.float32)
    for name in ("n" * 255, "é" * 127, "n" * 251 + ".npz"):
        report = convert(source, tmp_path / name, target_format="npz")
        assert report.path.is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_others(tmp_path, capsys):
    source = save(tmp_path, ["t"], [], np.float32)
    (tmp_path / "theirs").mkdir(mode=0o500)
    told = []
    for dry_run in (["--dry-run"], []):
        assert main(["convert", str(source), str(tmp_path / "theirs" / "out"), *dry_run]) == 1
        told.append(capsys.readouterr().err)
    assert told[0] == told[1] == f"jaxembed: [Errno 13] Permission denied: '{tmp_path / 'theirs'}'\n"


@pytest.mark.parametrize("how", ["missing", "empty", "a pipe"])
@pytest.mark.parametrize("of", ["a checkpoint", "another framework"])
def test_exported_models_are_looked_at(steps, tmp_path, capsys, how, of):
    source = steps if of == "a checkpoint" else save(tmp_path, ["t"], [], np.float32)
    file = tmp_path / "model.bin"
    {"missing": lambda: None, "empty": file.touch, "a pipe": lambda: os.mkfifo(file)}[how]()
    message = {
        "missing": "nothing is at .*/model.bin",
        "empty": "exported must be, or return, the bytes that .* got bytes of length 0",
        "a pipe": "model.bin must be a regular file",
    }[how]
    told = []
    for dry_run in (["--dry-run"], []):
        line = ["convert", str(source), "--to", "serving", str(tmp_path / "out"), "--exported", str(file)]
        assert main([*line, *dry_run]) == (1 if how == "a pipe" else 2)
        told.append(capsys.readouterr().err)
        assert not (tmp_path / "out").exists()
    assert told[0] == told[1]
    assert re.search(message, told[0])


def test_vocabularies_of_another_framework_s_tables(tmp_path, capsys):
    """A bundle carries them, so they are read before anything is written."""
    source = save(tmp_path, ["t"], [], np.float32)
    (tmp_path / "words.txt").write_text("a\nb\n")
    vocabulary = VocabularyFile(str(tmp_path / "words.txt"))
    config = {"f": FeatureConfig(TableConfig(*SHAPE, name="t"), preprocessing=vocabulary)}
    (tmp_path / "config.json").write_text(feature_config_to_json(config))
    line = ["convert", str(source), "--to", "serving", str(tmp_path / "out")]
    line += ["--feature-config", str(tmp_path / "config.json")]
    assert main([*line, "--dry-run"]) == 0
    capsys.readouterr()
    (tmp_path / "words.txt").unlink()
    told = []
    for dry_run in (["--dry-run"], []):
        assert main([*line, *dry_run]) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert "words.txt" in told[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"w": np.ones(3, np.complex64)}, "safetensors cannot hold complex64, the type of 'w'"),
        (
            {"a": {"w": np.ones(3, ml_dtypes.float8_e4m3fn)}},
            "safetensors cannot hold float8_e4m3fn, the type of 'a.w'",
        ),
        (
            {"__metadata__": np.ones(3, np.float32)},
            "the model has a leaf '__metadata__', which safetensors keeps",
        ),
        (None, r"steps/0 has no dense model to take a part of; leave select_model \(--model-key\) out"),
    ],
)
def test_dense_models_that_a_bundle_cannot_have(tmp_path, capsys, model, message):
    own = ShardedEmbedding(
        {"f": FeatureConfig(TableConfig(*SHAPE, name="t"))},
        SGD(0.1),
        jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]),
    )
    with Checkpointer(tmp_path / "steps", own) as checkpointer:
        checkpointer.save(own.init(jax.random.key(0)), model=model)
    told = []
    for dry_run in (["--dry-run"], []):
        more = ["--model-key", "params"] if model is None else []
        line = ["convert", str(tmp_path / "steps"), "--to", "serving", str(tmp_path / "out")]
        assert main([*line, *more, *dry_run]) == 2
        told.append(capsys.readouterr().err)
        assert not (tmp_path / "out").exists()
    assert told[0] == told[1]
    assert re.search(message, told[0])


def test_a_part_of_the_model_of_tables_alone(tmp_path, capsys):
    """Files of other frameworks have no dense model that we know."""
    source = save(tmp_path, ["t"], [], np.float32)
    for dry_run in (["--dry-run"], []):
        line = ["convert", str(source), "--to", "serving", str(tmp_path / "out"), "--model-key", "params"]
        assert main([*line, *dry_run]) == 2
        assert (
            "is read as tables alone, without a dense model; leave --model-key out" in capsys.readouterr().err
        )
        assert not (tmp_path / "out").exists()


@pytest.mark.parity
def test_features_that_a_saved_model_cannot_have(tmp_path):
    pytest.importorskip("tensorflow")
    table = TableConfig(*SHAPE, name="t")
    source = save(tmp_path, ["t"], [], np.float32)
    for config, message in (
        (
            {"a": FeatureConfig(table), "a.row_splits": FeatureConfig(table)},
            "would share the input 'a_row_splits'",
        ),
        (
            {"_a": FeatureConfig(table)},
            "would be the input '_a' in a signature, where names start with a letter",
        ),
        ({"a": FeatureConfig(table, preprocessing=HashBuckets(6, "string"))}, "hashes strings by XXH3"),
    ):
        for dry_run in (True, False):
            with pytest.raises(ValueError, match=message):
                convert(
                    source,
                    tmp_path / "out",
                    target_format="saved-model",
                    feature_config=config,
                    dry_run=dry_run,
                )


def test_a_name_of_one_array(tmp_path, capsys):
    """It would be a folder of steps, and is none of `npy`, which is a folder of files."""
    source = save(tmp_path, ["t"], [], np.float32)
    for dry_run in (["--dry-run"], []):
        assert main(["convert", str(source), str(tmp_path / "tables.npy"), *dry_run]) == 2
        assert "tables.npy would be one array; pass a name without .npy, with" in capsys.readouterr().err
    assert not (tmp_path / "tables.npy").exists()


def test_of_a_bundle(tmp_path, capsys):
    """A part of the model that is not there is found, and a vocabulary that is gone."""
    (tmp_path / "words.txt").write_text("a\nb\n")
    vocabulary = VocabularyFile(str(tmp_path / "words.txt"))
    own = ShardedEmbedding(
        {"f": FeatureConfig(TableConfig(*SHAPE, name="t"), preprocessing=vocabulary)},
        SGD(0.1),
        jax.make_mesh((1,), ("d",), devices=jax.devices()[:1]),
    )
    with Checkpointer(tmp_path / "steps", own) as checkpointer:
        checkpointer.save(own.init(jax.random.key(0)), model={"w": jnp.ones(3)})
    line = ["convert", str(tmp_path / "steps"), "--to", "serving", str(tmp_path / "out")]

    def refused(told, *more):
        for dry_run in (["--dry-run"], []):
            assert main([*line, *more, *dry_run]) == 2
            assert told in capsys.readouterr().err

    assert main([*line, "--dry-run", "--model-key", "w"]) == 0
    refused("the dense model has no part 'params', it has ['w']", "--model-key", "params")
    (tmp_path / "words.txt").unlink()
    refused("words.txt")
