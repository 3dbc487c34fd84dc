"""Checkpoints from plain arrays and into them: the same bytes, a checkpoint like any other, and clear refusals."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import re
import shutil
import tempfile
import tracemalloc
import weakref
import zipfile

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxembed import FeatureConfig, HashBuckets, QuantizationConfig, TableConfig, combiners, serve
from jaxembed.checkpoint import layout, read_checkpoint, whole_steps
from jaxembed.cli import main
from jaxembed.combiners import CustomCombiner, register_combiner
from jaxembed.convert import convert, open_source
from jaxembed.convert.interface import Stream, stored
from jaxembed.convert.keys import keys_from_json, own_key, own_place
from jaxembed.convert.mapped import new_mapped, temporary_mapped
from jaxembed.initializers import Constant
from jaxembed.names import UnregisteredError
from jaxembed.optimizers import Adagrad
from jaxembed.serialization import feature_config_to_json
from jaxembed.train import Checkpointer, ShardedEmbedding

CONFIG = {
    "x": FeatureConfig(TableConfig(40_000, 16, name="../items")),
    "y": [FeatureConfig(TableConfig(100, 4, name="b.c/d", combiner="sum"))],
}
FORMATS = {"npy": "arrays", "npz": "arrays.npz", "safetensors": "arrays.safetensors"}


@register_combiner("test_arrays.first_weighted")
def weighted(valency, vectors, weights):
    return vectors[0] * weights[0] + weights[1]


def embedding(config=CONFIG, devices=2):
    return ShardedEmbedding(config, Adagrad(0.1), jax.make_mesh((devices,), ("d",)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    own = embedding()
    state = own.init(jax.random.key(0))
    tables, slots, _ = own.to_canonical(state)
    slots["../items"]["accumulators"] = slots["../items"]["accumulators"].at[39_999, 3].set(7.0)
    with Checkpointer(directory, own) as checkpointer:
        checkpointer.save(own.from_canonical(tables, slots, 5), metadata={"auc": 0.5})
    return directory


@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back(checkpoint, tmp_path, form):
    there = convert(checkpoint, tmp_path / FORMATS[form], target_format=form)
    back = convert(there.path, tmp_path / "back")
    assert (there.target_format, back.source_format, back.path.name) == (form, form, "5")
    assert [a.digest for a in there.arrays] == [a.digest for a in back.arrays]
    before, after = read_checkpoint(checkpoint, slots=True), read_checkpoint(back.path, slots=True)
    assert (after.step, after.feature_config, after.metadata) == (5, CONFIG, {"auc": 0.5})
    jax.tree.map(np.testing.assert_array_equal, (after.tables, after.slots), (before.tables, before.slots))
    manifests = [layout.read_manifest(p) for p in (checkpoint / "5", back.path)]
    assert manifests[0] == manifests[1]


def test_weights_of_custom_combiners_go_along(tmp_path):
    table = TableConfig(20, 4, name="t", combiner=CustomCombiner(weighted, 3, 2, Constant(1.0)))
    own = embedding({"x": FeatureConfig(table)})
    state = own.init(jax.random.key(0))
    weights = {"t": np.array([1.5, -2.0], np.float32)}
    with Checkpointer(tmp_path / "checkpoint", own) as checkpointer:
        checkpointer.save(dataclasses.replace(state, combiner_weights=weights))
    there = convert(tmp_path / "checkpoint", tmp_path / "a.safetensors")
    back = convert(there.path, tmp_path / "back")
    np.testing.assert_array_equal(read_checkpoint(back.path).combiner_weights["t"], weights["t"])
    lost = convert(tmp_path / "checkpoint", tmp_path / "a.pt", target_format="torchrec")
    assert "weights of custom combiners" in str(lost.notes)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_a_combiner_that_is_not_registered_is_no_damage(tmp_path, monkeypatch, name):
    table = TableConfig(20, 4, name="t", combiner=CustomCombiner(weighted, 3))
    np.savez(tmp_path / "t.npz", t=np.ones((20, 4), np.float32))
    convert(tmp_path / "t.npz", tmp_path / name, feature_config={"x": FeatureConfig(table)})
    monkeypatch.setattr(combiners, "_REGISTRY", {})
    with pytest.raises(UnregisteredError, match=rf"{name}.*unknown combiner .*--import MODULE"):
        convert(tmp_path / name, tmp_path / "out")


def test_missing_weights_of_custom_combiners(tmp_path, capsys):
    """A source without them is refused, saying how to give them; so are weights that do not fit."""
    table = TableConfig(20, 4, name="t", combiner=CustomCombiner(weighted, 3, 2, Constant(1.0)))
    config = {"x": FeatureConfig(table)}
    np.savez(tmp_path / "a.npz", t=np.ones((20, 4), np.float32))
    (tmp_path / "config.json").write_text(feature_config_to_json(config))
    line = ["convert", f"{tmp_path}/a.npz", "--feature-config", f"{tmp_path}/config.json", "--no-progress"]
    assert main([*line, f"{tmp_path}/out"]) == 2
    assert (
        f"the CustomCombiner of table 't' has 2 weights of its own, which {tmp_path}/a.npz has not; pass "
        "combiner_weights={'t': ...} (--combiner-weights)"
    ) in capsys.readouterr().err
    for weights, told in (
        ('{"t": [1.5]}', "combiner_weights of table 't' must have the shape [2] by its combiner, got [1]"),
        ('{"t": [1, 2], "u": [1]}', "combiner_weights are of ['u'], but the tables are ['t']"),
        ('{"t": "x"}', '--combiner-weights must be JSON {"table": [weights]}'),
        ("[1", "JSON"),
    ):
        (tmp_path / "weights.json").write_text(weights)
        assert main([*line, "--combiner-weights", f"{tmp_path}/weights.json", f"{tmp_path}/out"]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "weights.json").write_text('{"t": [1.5, -2]}')
    for target in ("jaxembed", "serving"):
        to = ["--to", target, f"{tmp_path}/{target}"]
        assert main([*line, "--combiner-weights", f"{tmp_path}/weights.json", *to]) == 0
        np.testing.assert_array_equal(read_checkpoint(tmp_path / target).combiner_weights["t"], [1.5, -2])


def test_an_imported_checkpoint_is_one_like_any_other(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "a.safetensors")
    directory = convert(tmp_path / "a.safetensors", tmp_path / "back").path.parent
    own = embedding(devices=8)
    with Checkpointer(directory, own) as checkpointer:
        restored = checkpointer.restore()
        assert restored.step == 5
        expected = read_checkpoint(checkpoint, slots=True)
        tables, slots, _ = own.to_canonical(restored.state)
        jax.tree.map(np.testing.assert_array_equal, (tables, slots), (expected.tables, expected.slots))
        checkpointer.save(own.from_canonical(tables, slots, 6))
    assert whole_steps(directory) == [5, 6]
    assert serve.load(directory, 5).step == 5
    # Orbax by itself, too.
    found = ocp.StandardCheckpointer().restore(directory / "5" / "tables")
    np.testing.assert_array_equal(found[layout.encode_name("../items")], expected.tables["../items"])


def test_official_readers_read_it(checkpoint, tmp_path):
    table = read_checkpoint(checkpoint).tables["b.c/d"]
    convert(checkpoint, tmp_path / "a.safetensors")
    convert(checkpoint, tmp_path / "a.npz")
    convert(checkpoint, tmp_path / "a", target_format="npy")
    name = "tables/b%2Ec%2Fd"
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")[name], table)
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays[name], table)
        assert arrays["slots/%2E%2E%2Fitems/accumulators"][39_999, 3] == 7
    np.testing.assert_array_equal(np.load(tmp_path / "a" / f"{name}.npy", mmap_mode="r"), table)


def test_arrays_of_others(tmp_path, capsys):
    """Any order of bytes and axes, packed or not; what is no table is left out, and said."""
    rng = np.random.default_rng(0)
    table, biased = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
    arrays = {"emb.weight": np.asfortranarray(table), "other": biased.astype(">f4"), "bias": biased[0]}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **arrays)
    (tmp_path / "c").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "c" / f"{name}.npy", array)
    save_file(
        {k: np.ascontiguousarray(v, v.dtype.newbyteorder("=")) for k, v in arrays.items()},
        tmp_path / "d.safetensors",
    )
    for source in ("a.npz", "b.npz", "c", "d.safetensors"):
        out = tmp_path / f"out-{source}"
        assert main(["convert", str(tmp_path / source), str(out), "--step", "3", "--to", "jaxembed"]) == 0
        said = capsys.readouterr().out
        assert "emb.weight -> table 'emb.weight' (guessed)" in said
        assert "left out: bias" in said
        assert "no feature configuration given: one feature for each table" in said
        read = read_checkpoint(out)
        assert (read.step, sorted(read.feature_config)) == (3, ["emb.weight", "other"])
        np.testing.assert_array_equal(read.tables["emb.weight"], table)
        np.testing.assert_array_equal(read.tables["other"], biased)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_by_columns_is_read_once(tmp_path, monkeypatch, save):
    """Each of its rows is all over it: it is copied, and the copy is on the disk until the last of them was read."""
    table = np.asfortranarray(np.random.default_rng(0).normal(size=(1000, 6)).astype(">f4"))
    save(tmp_path / "a.npz", t=table)
    array, counts, read = open_source(tmp_path / "a.npz").tables["t"], [], zipfile.ZipExtFile.read

    def counted(member, size=-1):
        data = read(member, size)
        counts.append(len(data))
        return data

    def copy(dtype, shape):
        copies.append(weakref.ref(made := np.zeros(shape, dtype)))
        return made

    copies = []
    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    monkeypatch.setattr("jaxembed.convert.npz.COPY_BYTES", 1000)
    monkeypatch.setattr("jaxembed.convert.npz.temporary_mapped", copy)
    for start in range(0, 1000, 10):
        assert [made() is None for made in copies] == [False] * (start > 0)
        np.testing.assert_array_equal(array.source[start : start + 10], table[start : start + 10])
    assert [made() is None for made in copies] == [True]
    assert sum(counts) == table.nbytes
    assert max(counts) == 1000
    np.testing.assert_array_equal(array.source[5:9], table[5:9])


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (1e6, ["--dtype", "float16"], "holds -1000000.0 at row 1, column 1, which is too large for float16"),
        (
            3e38,
            ["--to", "serving", "--quantize", "int8"],
            r"row 1 of the table ranges from -3e\+38 to 3e\+38, too far",
        ),
        (
            3.4028235e38,
            ["--to", "serving", "--quantize", "bfloat16"],
            r"at row 1, column \d, which would become infinite",
        ),
    ],
)
def test_values_that_would_become_infinite(tmp_path, capsys, value, options, message):
    np.savez(tmp_path / "t.npz", t=np.float32([[1, 2, 3], [0, -value, value]]))
    assert main(["convert", str(tmp_path / "t.npz"), str(tmp_path / "out"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_keys_configuration_and_serving(tmp_path, capsys):
    table = np.arange(60, dtype=np.float64).reshape(20, 3) / 7
    np.savez(tmp_path / "a.npz", w=table, sums=np.ones((20, 3), np.float32))
    config = {"f": FeatureConfig(TableConfig(20, 3, name="t", combiner="sum", dtype=jnp.bfloat16))}
    (tmp_path / "config.json").write_text(feature_config_to_json(config))
    (tmp_path / "keys.json").write_text(json.dumps({"w": "t", "sums": ["t", "accumulators"]}))
    common = ["convert", str(tmp_path / "a.npz"), "--feature-config", str(tmp_path / "config.json")]
    common += ["--keys", str(tmp_path / "keys.json")]
    assert main([*common, str(tmp_path / "out")]) == 2
    assert (
        "must be bfloat16 by its feature configuration, got float64; pass dtype='bfloat16'"
        in capsys.readouterr().err
    )
    assert main([*common, str(tmp_path / "out"), "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rounded = table.astype(jnp.bfloat16)
    assert report["arrays"][0]["max_error"] == np.abs(table - rounded.astype(np.float64)).max() > 0
    read = read_checkpoint(tmp_path / "out", slots=True)
    assert (read.feature_config, read.slots["t"]["accumulators"].sum()) == (config, 60)
    np.testing.assert_array_equal(read.tables["t"], rounded)
    assert main([*common, str(tmp_path / "bundle"), "--dtype", "bfloat16", "--to", "serving"]) == 0
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "bundle").tables["t"], rounded)
    assert [p.name for p in (tmp_path / "bundle").iterdir()] == ["0"]


def test_another_framework_s_tables_to_serving(tmp_path, capsys):
    """One report, of the bundle; planned without writing, with the sizes that it then has."""
    np.savez(
        tmp_path / "a.npz",
        **{"tables/t": np.ones((20, 3), np.float32), "slots/t/s": np.ones((20, 3), np.float32)},
    )
    line = ["convert", str(tmp_path / "a.npz"), "--to", "serving", str(tmp_path / "out"), "--quantize", "int8"]
    told = []
    for more in (["--dry-run"], ["--dry-run", "--json"], ["--json"]):
        assert main([*line, *more]) == 0
        assert (tmp_path / "out").exists() == (more == ["--json"])
        told.append(capsys.readouterr().out)
    lines = told[0].splitlines()
    assert lines[0] == "read as npz, to be written as serving"
    assert "  left out: slots, which serving has no use for" in lines
    assert f"would write {tmp_path / 'out' / '0'}" in lines
    planned, written = map(json.loads, told[1:])
    assert (planned["path"], written["source_format"]) == (written["path"], "npz")
    assert planned["notes"] == written["notes"]
    (plan,), (table,) = planned["tables"], written["tables"]
    assert (
        (plan["dtype"], plan["num_bytes"]) == (table["dtype"], table["num_bytes"]) == ("int8", 20 * 3 + 20 * 8)
    )
    assert (plan["digest"], len(table["digest"])) == (None, 32)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["0"]
    assert main([*line, "--dry-run"]) == 2
    assert "out/0 exists, and may be in use" in capsys.readouterr().err


def test_a_delta_of_another_framework_s_tables(tmp_path, capsys):
    """Planned as it is then written: rows are compared as they would be stored, here rounded to bfloat16."""
    rows = np.random.default_rng(0).normal(size=(1000, 6)).astype(np.float32)
    changed = rows.copy()
    changed[[3, 500]] += 1
    changed[7] += 1e-9  # which no bfloat16 shows
    np.savez(tmp_path / "a.npz", **{"tables/t": rows, "tables/u": rows})
    np.savez(tmp_path / "b.npz", **{"tables/t": changed, "tables/u": rows})
    line = ["--to", "serving", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(["convert", str(tmp_path / "a.npz"), *line]) == 0
    capsys.readouterr()
    delta = ["convert", str(tmp_path / "b.npz"), *line, "--version", "1", "--delta-from", "0", "--json"]
    told = []
    for more in (["--dry-run"], []):
        assert main([*delta, *more]) == 0
        told.append(json.loads(capsys.readouterr().out))
    sizes = [[(t["name"], t["num_bytes"], t["num_changed"]) for t in report["tables"]] for report in told]
    assert sizes[0] == sizes[1]
    assert [count for _, _, count in sizes[1]] == [2, 0]
    for more in (["--dry-run"], []):
        assert main([*delta[:-4], "2", "--delta-from", "7", *more]) == 2
        assert "delta_from must be a version below 2, got 7" in capsys.readouterr().err


def test_a_configuration_under_which_rows_are_something_else_is_told(tmp_path):
    """Whoever gives one asks for it, and is shown what that changes."""
    np.savez(tmp_path / "a.npz", t=np.ones((4, 2), np.float32), u=np.ones((4, 2), np.float32))
    was = {n: FeatureConfig(TableConfig(4, 2, name=n)) for n in "tu"}
    quantized = TableConfig(4, 2, name="t", quantization_config=QuantizationConfig(16, -1.0, 1.0))
    now = {"t": FeatureConfig(quantized), "u": FeatureConfig(was["u"].table, preprocessing=HashBuckets(4))}
    convert(tmp_path / "a.npz", tmp_path / "steps", feature_config=was)
    notes = convert(tmp_path / "steps", tmp_path / "new", feature_config=now).notes
    assert notes == (
        f"table 't' is looked up through {quantized.quantization_config}, and was through none",
        f"feature 'u' makes rows of its ids by {HashBuckets(4)}, and did by nothing",
    )
    assert convert(tmp_path / "steps", tmp_path / "same", feature_config=was).notes == ()


def test_progress_bar(checkpoint, tmp_path, capsys):
    """Where asked for, else on terminals only; of all bytes that are read."""
    pytest.importorskip("tqdm")
    convert(checkpoint, tmp_path / "a.npz", progress=True)
    assert re.search(r"100%\|.*5\.12M/5\.12M", capsys.readouterr().err)
    convert(checkpoint, tmp_path / "b.npz", progress=None)
    assert main(["convert", str(checkpoint), str(tmp_path / "c.npz")]) == 0
    assert capsys.readouterr().err == ""


def test_dry_run_writes_nothing(checkpoint, tmp_path):
    for form, name in (*FORMATS.items(), ("jaxembed", "out")):
        report = convert(checkpoint, tmp_path / name, target_format=form, dry_run=True)
        assert next((a.table, a.slot, a.num_bytes, a.digest) for a in report.arrays) == (
            "../items",
            None,
            2_560_000,
            None,
        )
    assert list(tmp_path.iterdir()) == []


def test_memory_is_a_few_blocks(tmp_path):
    shape = (1 << 20, 32)
    mapped = np.lib.format.open_memmap(tmp_path / "t.npy", "w+", np.float32, shape)
    mapped[::4096] = 1
    del mapped
    tracemalloc.start()
    convert(tmp_path / "t.npy", tmp_path / "out", target_format="safetensors")
    convert(tmp_path / "out", tmp_path / "ckpt", source_format="safetensors", target_format="jaxembed")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20 < shape[0] * shape[1] * 4


def test_a_failure_leaves_nothing(tmp_path):
    def read_rows(start, stop):
        if start > 100_000:
            raise ValueError("the source is gone")
        return np.zeros((stop - start, 16), np.float32)

    broken = Stream("t", None, stored("t", (300_000, 16), np.float32, read_rows), np.dtype(np.float32))
    with pytest.raises(ValueError, match="the source is gone"):
        list(broken.blocks())
    np.savez_compressed(tmp_path / "a.npz", t=np.random.default_rng(0).normal(size=(300_000, 8)))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(data)
    for form, name in (*FORMATS.items(), ("jaxembed", "out")):
        with pytest.raises(ValueError, match=r"a.npz: t.npy is damaged"):
            convert(tmp_path / "a.npz", tmp_path / name, target_format=form, dtype="float32")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def npz(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


def npy(array, **changes):
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    data = out.getvalue()
    for old, new in changes.get("replace", ()):
        data = data.replace(old, new)
    return data


GOOD = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"no archive", "is no .npz file, or is damaged"),
        ("a.npz", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("a.npz", npz(t=npy(np.array([{}], object))), "holds objects"),
        ("a.npz", npz(t=npy(GOOD, replace=[(b"(3, 2)", b"(9, 2)")])), "not of the size that its header says"),
        ("a.npz", npz(t=b"garbage"), "is no .npz file, or is damaged"),
        ("a.npz", npz(t=npy(GOOD[0])), r"no table that jaxembed recognizes.*It has t float32\[2\]"),
        ("a.npy", npy(np.array([{}], object)), "is no .npy file of numbers"),
        ("a.npy", npy(GOOD, replace=[(b"(3, 2)", b"(9, 2)")]), "is no .npy file of numbers"),
        ("a.npy", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("a.safetensors", b"\xff" * 64, "is no safetensors file"),
        ("a.npy", npy(GOOD.astype(np.int32)), "no table that jaxembed recognizes"),
        (
            "a.npy",
            npy(GOOD.astype(np.float64)),
            "float64, which JAX does not train by default.*--dtype float32",
        ),
        ("a.txt", b"hello", "looks like none of .*say which one it is .source_format, or --from of convert"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / name, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_bad_requests_are_refused(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "a.npz", t=GOOD, s=GOOD)
    config = {"f": FeatureConfig(TableConfig(3, 2, name="t"))}

    def refused(message, source="a.npz", out="out", error=ValueError, **arguments):
        with pytest.raises(error, match=message):
            convert(tmp_path / source, tmp_path / out, **arguments)

    refused("is an empty folder", "empty")
    refused("nothing is at", "none", error=FileNotFoundError)
    refused("unknown format 'onnx'", target_format="onnx")
    refused("dtype must be one of", dtype="int8")
    refused("has no array 'w'; it has s, t", keys={"w": ("t", None)})
    refused("is slot 'x' of table 'u', but there is no such table", keys={"t": ("t", None), "s": ("u", "x")})
    refused(
        r"names table 'u'; there are \['s', 't'\]",
        feature_config={"f": FeatureConfig(TableConfig(3, 2, name="u"))},
    )
    refused(
        r"must be \[4, 2\] by its feature", feature_config={"f": FeatureConfig(TableConfig(4, 2, name="t"))}
    )
    refused("combiner is for a source without", feature_config=config, combiner="sum")
    refused("exists; pass another path", out="a.npz")
    (tmp_path / "out" / "0").mkdir(parents=True)
    refused("exists; pass another path")
    shutil.rmtree(tmp_path / "out")
    report = convert(tmp_path / "a.npz", tmp_path / "out", feature_config=config)
    assert "left out, not in the feature configuration: s" in report.notes
    with pytest.raises(ValueError, match="cannot hold bfloat16"):
        convert(checkpoint, tmp_path / "b.npz", dtype="bfloat16")
    (tmp_path / "link.npz").symlink_to(tmp_path / "a.npz")
    refused("must be a regular file", "link.npz", "out2")


NAMES = st.text(st.characters(codec="utf-8"), min_size=1)


@hypothesis.given(place=st.tuples(NAMES, st.none() | NAMES))
def test_any_name_has_a_key_that_is_a_safe_path(place):
    key = own_key(place)
    assert own_place(key) == place
    assert pathlib.PurePosixPath(key).parts == tuple(key.split("/"))
    assert not {".", ".."} & set(key.split("/"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object, got list"),
        ('{"a": 1}', r'must be "table" or \["table", "slot"\], got 1'),
        ('{"a": ["t"]}', "must be"),
        ('{"a": ""}', r"keys\['a'\] must be \"table\" or .*, got ''"),
        ('{"a": ["t", ""]}', r"must be .*, got \['t', ''\]"),
        ('{"a": ["", "s"]}', r"must be .*, got \['', 's'\]"),
        ('{"a": "t", "b": "t"}', "has table 't' twice"),
        ('{"a": "t", "a": "u"}', "is there twice"),
    ],
)
def test_bad_keys_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        keys_from_json(text)


def test_empty_names_are_refused_of_any_reader(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", w=np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"keys\['w'\] must name a table"):
        convert(tmp_path / "a.npz", tmp_path / "out", keys={"w": ("", None)})
    (tmp_path / "keys.json").write_text('{"w": ""}')
    assert main(["inspect", str(tmp_path / "a.npz"), "--keys", str(tmp_path / "keys.json")]) == 2
    assert """keys.json: keys['w'] must be "table" or ["table", "slot"], got ''""" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "a.npz"), "--keys", str(tmp_path / "none.json")]) == 2
    assert "nothing is at" in capsys.readouterr().err


def test_tensors_of_other_types_are_left_out(tmp_path):
    save_file({"t": GOOD, "u": np.ones(4, np.uint8)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(content.replace(b'"U8"', b'"F9"'))
    report = convert(tmp_path / "b.safetensors", tmp_path / "out", target_format="jaxembed")
    assert "left out, of types that no table has: u (F9)" in report.notes
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "out").tables["t"], GOOD)
    with pytest.raises(ValueError, match="'u' has a type that no table has: F9; leave it out of keys"):
        convert(tmp_path / "b.safetensors", tmp_path / "named", keys={"t": ("t", None), "u": ("u", None)})


def test_keys_are_of_the_source_or_else_of_the_target(tmp_path, capsys):
    """Those that were followed in reading name nothing that is written; of our own source they name what is."""
    np.savez(tmp_path / "a.npz", emb=GOOD, other=GOOD)
    read = {"emb": ("movie", None)}
    convert(tmp_path / "a.npz", tmp_path / "a.safetensors", target_format="torchrec", keys=read)
    assert list(load_file(tmp_path / "a.safetensors")) == ["embedding_bags.movie.weight"]
    convert(tmp_path / "a.npz", tmp_path / "steps", keys=read)
    named = {"net.movie.weight": ("movie", None)}
    convert(tmp_path / "steps", tmp_path / "b.safetensors", target_format="torchrec", keys=named)
    assert list(load_file(tmp_path / "b.safetensors")) == ["net.movie.weight"]
    for keys, place in (
        ({"w": ("film", None)}, "table 'film'"),
        ({"w": ("movie", "s")}, "slot 's' of table 'movie'"),
    ):
        with pytest.raises(
            ValueError, match=rf"keys\['w'\] must be one of the tables \['movie'\], .*got {place}"
        ):
            convert(tmp_path / "steps", tmp_path / "c.safetensors", target_format="torchrec", keys=keys)
    for target in ("npz", "safetensors", "jaxembed"):
        with pytest.raises(
            ValueError, match=f"keys are neither for reading jaxembed, .*nor for writing {target}; leave"
        ):
            convert(tmp_path / "steps", tmp_path / "out", target_format=target, keys=named)
    with pytest.raises(
        ValueError, match=r"has no array 'net.movie.weight'; .*to name those of a target, convert from a"
    ):
        convert(tmp_path / "a.npz", tmp_path / "d.safetensors", target_format="torchrec", keys=named)
    (tmp_path / "keys.json").write_text('{"w": "movie"}')
    line = ["convert", str(tmp_path / "steps"), "--to", "serving", str(tmp_path / "out")]
    assert main([*line, "--keys", str(tmp_path / "keys.json")]) == 2
    assert "leave keys (--keys) out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no room")
def test_a_disk_without_room_for_a_mapped_array(tmp_path, monkeypatch):
    """Its room is asked for before it is written: writing to a hole of a full disk ends the process."""

    def full(descriptor, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = new_mapped(tmp_path / "first", np.float32, (3, 2))
    assert (tmp_path / "first").stat().st_blocks * 512 >= made.nbytes
    np.testing.assert_array_equal(made, np.zeros((3, 2)))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device for 24 bytes: '.*second'"):
        new_mapped(tmp_path / "second", np.float32, (3, 2))
    told = (
        f"No space left on device for 24 bytes in a temporary file; set TMPDIR to .*: '{tempfile.gettempdir()}'"
    )
    with pytest.raises(OSError, match=told):
        temporary_mapped(np.float32, (3, 2))


@pytest.mark.parametrize("step", ["-1", str(2**31)])
def test_steps_that_nothing_reads_are_refused(tmp_path, capsys, step):
    np.savez(tmp_path / "a.npz", films=np.ones((3, 2), np.float32))
    assert (
        main(["convert", str(tmp_path / "a.npz"), str(tmp_path / "out"), "--to", "jaxembed", "--step", step])
        == 2
    )
    assert f"step must be in [0, 2**31), got {step}" in capsys.readouterr().err
