"""What came to the place of a conversion while it ran stays, whoever wrote it."""

import errno
import os
import pathlib

import numpy as np
import pytest

from jaxembed.checkpoint import read_checkpoint
from jaxembed.convert import convert, formats
from jaxembed.convert.publishing import published

TOLD = "out exists; pass another path or remove it"


def publish(place, folder):
    with published(place) as scratch:
        if folder:
            scratch.mkdir()
            (scratch / "file").write_text("ours")
        else:
            scratch.write_text("ours")


@pytest.fixture
def source(tmp_path):
    np.savez(tmp_path / "a.npz", t=np.ones((3, 2), np.float32))
    return tmp_path / "a.npz"


@pytest.mark.parametrize("target", ["npz", "safetensors", "npy", "jaxembed"])
@pytest.mark.parametrize("theirs", ["file", "empty folder", "folder", "link"])
def test_nothing_is_replaced(source, tmp_path, monkeypatch, target, theirs):
    out = tmp_path / "new" / "out"
    place = out / "0" if target == "jaxembed" else out
    module = formats.load(target)
    write = module.write

    def write_and_be_late(scratch, contents):
        notes = write(scratch, contents)
        place.parent.mkdir(exist_ok=True)
        if theirs == "file":
            place.write_text("theirs")
        elif theirs == "link":
            place.symlink_to("nowhere")
        else:
            place.mkdir()
            if theirs == "folder":
                (place / "file").write_text("theirs")
        return notes

    monkeypatch.setattr(module, "write", write_and_be_late)
    with pytest.raises(ValueError, match=rf"{place} exists; pass another path or remove it"):
        convert(source, out, target_format=target)
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    if theirs == "link":
        assert os.readlink(place) == "nowhere"
    elif theirs == "file":
        assert place.read_text() == "theirs"
    else:
        found = {path.name: path.read_text() for path in place.iterdir()}
        assert found == ({"file": "theirs"} if theirs == "folder" else {})


def test_a_file_that_comes_at_the_last_moment_stays(tmp_path, monkeypatch):
    link = os.link

    def late(scratch, place):
        pathlib.Path(place).write_text("theirs")
        link(scratch, place)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(ValueError, match=TOLD):
        publish(tmp_path / "out", folder=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "theirs"}


def test_a_folder_that_comes_at_the_last_moment_stays(tmp_path, monkeypatch):
    rename = os.rename

    def late(scratch, place):
        place.mkdir()
        (place / "file").write_text("theirs")
        rename(scratch, place)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(ValueError, match=TOLD):
        publish(tmp_path / "out", folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "theirs"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV])
def test_without_hard_links_files_are_renamed(source, tmp_path, monkeypatch, code):
    def no_links(scratch, place):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)
    convert(source, tmp_path / "b.npz")
    convert(tmp_path / "b.npz", tmp_path / "steps")
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "steps").tables["t"], np.ones((3, 2), np.float32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "steps"]


@pytest.mark.parametrize("name", ["rows-0", "stack-0", "parts", "out", "a.npz"])
def test_what_is_beside_an_output_has_not_its_name(tmp_path, name):
    with published(tmp_path / name) as scratch:
        (scratch.parent / "rows-0").write_text("beside")
        (scratch.parent / "stack-0").write_text("beside")
        (scratch.parent / "parts").mkdir()
        assert scratch.suffix == pathlib.Path(name).suffix
        scratch.write_text("ours")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "ours"}


def test_other_errors_are_those_of_the_disk(tmp_path, monkeypatch):
    def full(scratch, place):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path / "out", folder=False)
    assert not list(tmp_path.iterdir())
