"""The exported model in a bundle: the same bytes back, made of the bundle itself, and damage an error."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import CheckpointError, convert_to_bundle, files, open_bundle
from jaxembed.checkpoint.files import read_regular
from jaxembed.convert import open_source
from jaxembed.optimizers import SGD
from jaxembed.train import Checkpointer, ShardedEmbedding

CONFIG = {"x": FeatureConfig(TableConfig(1000, 4, name="a"))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    own = ShardedEmbedding(CONFIG, SGD(0.1), jax.make_mesh((1,), ("d",)))
    with Checkpointer(directory, own) as checkpointer:
        state = own.init(jax.random.key(0))
        checkpointer.save(state, model={"w": jnp.arange(4.0)})
        tables, slots, _ = own.to_canonical(state)
        checkpointer.save(
            own.from_canonical({"a": tables["a"].at[3].add(1.0)}, slots, 1), model={"w": jnp.ones(4)}
        )
    return directory


def exported_of(bundle):
    """A score of one id, tables and parameters as arguments."""
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (bundle.tables, bundle.model))
    score = jax.jit(lambda tables, model, i: tables["a"][i] @ model["w"])
    return export.export(score)(*abstract, jax.ShapeDtypeStruct((), jnp.int32)).serialize()


def test_runs_on_the_tables_of_the_bundle(checkpoint, tmp_path):
    convert_to_bundle(checkpoint, tmp_path, step=0, exported=exported_of)
    convert_to_bundle(checkpoint, tmp_path, step=1, exported=exported_of, delta_from=0)
    for version in (0, 1):
        bundle = open_bundle(tmp_path, version)
        bundle.verify()
        assert bundle.exported is not None
        # Tables are arguments: they are not in the artefact.
        assert len(bundle.exported) < bundle.tables["a"].nbytes
        score = jax.jit(export.deserialize(bytearray(bundle.exported)).call)
        np.testing.assert_allclose(
            score(bundle.tables, bundle.model, 3), bundle.tables["a"][3] @ bundle.model["w"], rtol=1e-6
        )


def test_a_delta_of_an_exported_model_is_given_one(checkpoint, tmp_path):
    convert_to_bundle(checkpoint, tmp_path, step=0, exported=exported_of)
    message = r"version 0 holds an exported model, and a delta takes over rows alone.* Pass exported=.* again, or leave"
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message):
            convert_to_bundle(checkpoint, tmp_path, step=1, delta_from=0, dry_run=dry_run)
    convert_to_bundle(checkpoint, tmp_path, step=1)
    assert open_bundle(tmp_path).exported is None


def test_bytes_are_kept_as_they_are(checkpoint, tmp_path):
    convert_to_bundle(checkpoint, tmp_path, step=0)
    convert_to_bundle(checkpoint, tmp_path, step=1, exported=b"any bytes")
    told = [open_source(tmp_path / str(version)).notes for version in (0, 1)]
    assert told == [
        ("left out: the dense model",),
        ("left out: the dense model", "left out: the exported model"),
    ]
    assert [open_bundle(tmp_path, version).exported for version in (0, 1)] == [None, b"any bytes"]
    assert (tmp_path / "1" / "model.stablehlo").read_bytes() == b"any bytes"


@pytest.mark.parametrize("exported", [b"", "text", lambda bundle: None])
def test_what_is_no_artefact_leaves_no_bundle(checkpoint, tmp_path, exported):
    with pytest.raises(
        ValueError, match=r"must be, or return, the bytes that .* gives, got (bytes|str|NoneType)"
    ):
        convert_to_bundle(checkpoint, tmp_path, exported=exported)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b"\1" + file.read_bytes()[1:]), "does not have the digest"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "does not have the digest"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "too large"),
        (lambda file: file.unlink(), "cannot be opened: No such file"),
        (lambda file: (file.rename(file.parent / "other"), file.symlink_to("other")), "must be a regular file"),
    ],
)
def test_damage_is_an_error(checkpoint, tmp_path, damage, message):
    path = convert_to_bundle(checkpoint, tmp_path, exported=b"an artefact").path
    damage(path / "model.stablehlo")
    with pytest.raises(CheckpointError, match=f"model.stablehlo .*{message}"):
        _ = open_bundle(tmp_path).exported
    with pytest.raises(CheckpointError, match=message):
        open_bundle(tmp_path).verify()


def test_no_more_memory_is_taken_than_a_file_needs(tmp_path):
    (tmp_path / "small").write_bytes(b"content")
    assert read_regular(tmp_path / "small", 2**53) == b"content"


def test_a_file_for_which_there_is_no_memory(tmp_path, monkeypatch):
    def no_memory(descriptor, mode):
        os.close(descriptor)
        raise MemoryError

    (tmp_path / "large").write_bytes(b"content")
    monkeypatch.setattr(files, "open", no_memory, raising=False)
    with pytest.raises(CheckpointError, match="large is too large: there is no memory for 7 bytes"):
        read_regular(tmp_path / "large", 2**53)
