"""A dry run says yes where the run says yes, and refuses what it refuses, in the same words, of every format."""

import importlib
import pathlib
import tempfile

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxembed import FeatureConfig, TableConfig
from jaxembed.cli import main
from jaxembed.convert import FORMATS, convert
from jaxembed.convert.keys import own_key
from jaxembed.id_mapping import HashBuckets, VocabularyFile
from jaxembed.optimizers import SGD
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
