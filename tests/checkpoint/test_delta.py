"""Deltas of bundles: only the changed rows, a chain of them the same bytes as the whole."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import CheckpointError, bundle, bundle_reading, convert_to_bundle, layout, open_bundle
from jaxembed.cli import main
from jaxembed.inspection import describe
from jaxembed.optimizers import SGD
from jaxembed.train import Checkpointer, ShardedEmbedding

CONFIG = {
    "x": FeatureConfig(TableConfig(40_000, 16, name="a")),
    "y": FeatureConfig(TableConfig(1000, 4, name="still")),
    "z": FeatureConfig(TableConfig(100, 4, name="whole", dtype=jnp.bfloat16)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Three steps; from one to the next, some rows of "a", none of "still" and all of "whole" change."""
    directory = tmp_path_factory.mktemp("checkpoint")
    own = ShardedEmbedding(CONFIG, SGD(0.1), jax.make_mesh((1,), ("d",)))
    tables, slots, _ = own.to_canonical(own.init(jax.random.key(0)))
    with Checkpointer(directory, own) as checkpointer:
        for step in range(3):
            checkpointer.save(own.from_canonical(tables, slots, step), model={"w": jnp.full(3, step)})
            rows = jnp.array([0, 7, 39_999]) - step % 2 * jnp.array([0, 1, 2])
            tables = {**tables, "a": tables["a"].at[rows].add(1.0), "whole": tables["whole"] + jnp.bfloat16(1)}
    return directory


@pytest.fixture
def chain(checkpoint, tmp_path):
    out = tmp_path / "out"
    convert_to_bundle(checkpoint, out, step=0)
    reports = [convert_to_bundle(checkpoint, out, step=step, delta_from=step - 1) for step in (1, 2)]
    return out, reports


def test_chain_is_the_whole_byte_by_byte(checkpoint, chain, tmp_path):
    out, reports = chain
    convert_to_bundle(checkpoint, tmp_path / "whole", step=2)
    whole, last = open_bundle(tmp_path / "whole"), open_bundle(out)
    last.verify()
    assert last.step == 2
    for name, table in whole.tables.items():
        assert last.tables[name].tobytes() == table.tobytes()
        assert last.stored()[name].digests == whole.stored()[name].digests
    assert last.table_digests == whole.table_digests
    assert last.digest != whole.digest
    assert {t.name: t.digest for t in reports[-1].tables} == whole.table_digests
    lines = [
        [line for line in describe(path).splitlines() if "xxh3-128" in line]
        for path in (out, tmp_path / "whole")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 3
    assert lines[0] == [line for line in describe(checkpoint).splitlines() if "xxh3-128" in line]
    assert last.model["w"].tolist() == [2, 2, 2]
    for report in reports:
        assert {t.name: t.num_changed for t in report.tables} == {"a": 3, "still": 0, "whole": None}
    sizes = [sum(p.stat().st_size for p in (out / str(v) / "tables").iterdir()) for v in (0, 1)]
    assert sizes[1] < sizes[0] / 100


def test_unchanged_tables_stay_mapped(chain):
    tables = open_bundle(chain[0]).tables
    assert tables["still"].ctypes.data % 4096 == 0
    device = jax.local_devices(backend="cpu")[0]
    for table in tables.values():
        assert jax.device_put(table, device).unsafe_buffer_pointer() == table.ctypes.data


def test_damage_in_the_chain_is_found(checkpoint, chain, tmp_path):
    out, _ = chain
    file = out / "1" / "tables" / "00000.safetensors"
    intact = file.read_bytes()
    data = bytearray(intact)
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"table 'a' is damaged: rows 32768 to 39999 of 40000"):
        open_bundle(out).verify()
    data = bytearray(intact)
    data[4096:4104] = (2**40).to_bytes(8, "little")
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="its ids are not rows of the table in order"):
        open_bundle(out)
    shutil.rmtree(out / "0")
    with pytest.raises(
        FileNotFoundError, match="out/1 is a delta of version 0, which is gone: no version 0 of a"
    ):
        open_bundle(out)
    convert_to_bundle(checkpoint, out, step=1, version=0)
    with pytest.raises(CheckpointError, match="is a delta of another version 0 than the one beside it"):
        open_bundle(out)


def test_a_delta_is_opened_through_links(chain, tmp_path):
    """As deployments switch versions; what it builds on is beside the folder itself."""
    out, _ = chain
    (out / "current").symlink_to("2")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "prod").symlink_to("../out/current")
    (tmp_path / "folder").symlink_to("out")
    expected = open_bundle(out)
    for path in (out / "current", tmp_path / "links" / "prod", tmp_path / "folder" / "current"):
        opened = open_bundle(path)
        opened.verify()
        assert opened.digest == expected.digest
        assert opened.directory.samefile(out / "2")
        assert opened.directory.name == "2"
    text = describe(out / "current")
    assert "note: a delta of version 1" in text
    # The number of a link is that of its version, wherever the files are.
    (out / "2").rename(tmp_path / "stored")
    (out / "2").symlink_to(tmp_path / "stored")
    assert open_bundle(out / "current").directory == out / "2"
    assert open_bundle(out).digest == expected.digest
    shutil.rmtree(out / "1")
    with pytest.raises(FileNotFoundError, match="out/2 is a delta of version 1, which is gone"):
        open_bundle(out / "current")


@pytest.mark.parametrize("name", ["a", "still"])
def test_damage_below_is_said_of_the_folder_that_has_it(chain, name):
    """Not of the version that was opened, whose files are as they should be."""
    out, _ = chain
    i = list(open_bundle(out).tables).index(name)
    file = out / "0" / "tables" / f"{i:05d}.safetensors"
    data = bytearray(file.read_bytes())
    data[4096 + 100] ^= 1
    file.unlink()  # what is mapped must not change
    file.write_bytes(data)
    told = rf"bundle {re.escape(str(file))}: table '{name}' is damaged: rows 0 to"
    with pytest.raises(CheckpointError, match=told):
        open_bundle(out).verify()
    with pytest.raises(CheckpointError, match=told):
        open_bundle(out).verify(rest=0)
    opened = open_bundle(out)
    (out / "0").rename(out / "gone")
    with pytest.raises(CheckpointError, match=rf"table '{name}' is damaged: rows 0 to"):
        opened.verify()
    (out / "gone").rename(out / "0")
    file.unlink()
    file.write_bytes(b"short")
    with pytest.raises(CheckpointError, match=rf"bundle {file}: table '{name}': .* is truncated: 5 bytes"):
        open_bundle(out)


def test_command(checkpoint, tmp_path, capsys):
    """A dry run says what the delta will hold; the inspection whose delta it is."""
    line = ["convert", str(checkpoint), "--to", "serving", str(tmp_path)]
    assert main([*line, "--step", "0"]) == 0
    capsys.readouterr()
    delta = [*line, "--step", "1", "--delta-from", "0", "--json"]
    assert main([*delta, "--dry-run"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["0"]
    planned = json.loads(capsys.readouterr().out)
    assert main(delta) == 0
    written = json.loads(capsys.readouterr().out)
    assert planned["path"] == written["path"] == str(tmp_path / "1")
    for plan, table in zip(planned["tables"], written["tables"], strict=True):
        assert {**plan, **dict.fromkeys(("digest", "max_error", "mean_error"))} == {
            **table,
            **dict.fromkeys(("digest", "max_error", "mean_error")),
        }
    changed = {table["name"]: table["num_changed"] for table in written["tables"]}
    assert changed == {"a": 3, "still": 0, "whole": None}
    assert main(["inspect", str(tmp_path)]) == 0
    assert "note: a delta of version 0" in capsys.readouterr().out
    assert main([*line, "--version", "7", "--delta-from", "5"]) == 2
    assert "no version 5 of a bundle" in capsys.readouterr().err


def test_chains_do_not_grow_for_ever(checkpoint, chain, monkeypatch):
    out, _ = chain
    last = open_bundle(out)
    monkeypatch.setattr(bundle, "MAX_DELTAS", last.deltas)
    number = int(last.directory.name)
    with pytest.raises(
        ValueError, match=rf"version {number} ends a chain of {last.deltas} deltas.*leave delta_from out"
    ):
        convert_to_bundle(checkpoint, out, version=number + 1, delta_from=number)


@pytest.mark.parametrize("length", [bundle_reading.MAX_DELTAS, bundle_reading.MAX_DELTAS + 1, 600])
def test_chains_that_others_made_are_opened_up_to_the_same_length(checkpoint, tmp_path, length):
    """Their manifests are looked at one by one: 600 would be too many for Python's stack."""
    convert_to_bundle(checkpoint, tmp_path, step=1, version=0, select_model=lambda model: None)
    convert_to_bundle(checkpoint, tmp_path, step=1, version=1, delta_from=0, select_model=lambda model: None)
    manifest = layout.read_manifest(tmp_path / "1", "manifest.json", "jaxembed-bundle")
    for version in range(2, length + 1):
        manifest["base"] = {"version": version - 1, "digest": layout.digest(manifest)}
        (tmp_path / str(version) / "tables").mkdir(parents=True)
        (tmp_path / str(version) / "manifest.json").write_text(json.dumps(layout.seal(manifest)))
    if length <= bundle_reading.MAX_DELTAS:
        last = open_bundle(tmp_path)
        last.verify()
        assert last.deltas == length
        assert last.tables["a"].tobytes() == open_bundle(tmp_path, 0).tables["a"].tobytes()
        return
    told = (
        rf"{length} ends a chain of more than 64 deltas, .*; convert its checkpoint again, without delta_from"
    )
    with pytest.raises(CheckpointError, match=told):
        open_bundle(tmp_path)


def test_bad_requests(checkpoint, chain):
    with pytest.raises(ValueError, match="delta_from must be a version below 3, got 3"):
        convert_to_bundle(checkpoint, chain[0], version=3, delta_from=3)
    told = (
        "version 1 holds table 'a' as float32, and a delta of it cannot hold it as bfloat16: leave quantize "
        r"\(--quantize\) out to keep float32, or delta_from \(--delta-from\) to write a whole version"
    )
    with pytest.raises(ValueError, match=told):
        convert_to_bundle(checkpoint, chain[0], version=3, delta_from=1, quantize="bfloat16")
    with pytest.raises(FileNotFoundError, match="no version 5"):
        convert_to_bundle(checkpoint, chain[0], version=9, delta_from=5)
    assert not np.isnan(open_bundle(chain[0]).tables["a"]).any()
