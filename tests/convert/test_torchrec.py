"""TorchRec's state dicts, with TorchRec itself where it is installed and with modules of its names otherwise."""

import importlib
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import RaggedTensor, serve
from jaxembed.checkpoint import read_checkpoint
from jaxembed.cli import main
from jaxembed.convert import convert, open_source
from jaxembed.convert.interface import Options
from tests.lazy import Lazy, lazily

torch = lazily("torch")
pytestmark = pytest.mark.parity

sharded_torch = Lazy(f"{__package__}.sharded_torch")
SHAPES = {"films": (1000, 16), "users": (300, 8)}


def values(name, dtype=None):
    rows, dim = SHAPES[name]
    return torch.arange(rows * dim).reshape(rows, dim).to(dtype or torch.float32) / 64


def names_of_torchrec():
    """A module with the keys of an EmbeddingBagCollection."""
    bags = {name: torch.nn.EmbeddingBag(*shape, mode="sum") for name, shape in SHAPES.items()}
    return torch.nn.ModuleDict({"embedding_bags": torch.nn.ModuleDict(bags)})


def collection():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchrec = pytest.importorskip("torchrec")
        tables = [
            torchrec.EmbeddingBagConfig(
                name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"{name}_ids"]
            )
            for name, (rows, dim) in SHAPES.items()
        ]
        return torchrec, torchrec.EmbeddingBagCollection(tables=tables)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_with_torchrec_itself(tmp_path, suffix):
    """Its collection to a checkpoint and back to a collection; its lookup is ours."""
    torchrec, ours = collection()
    file = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(ours.state_dict(), file)
    else:
        pytest.importorskip("safetensors.torch").save_file(ours.state_dict(), file)
    report = convert(file, tmp_path / "ckpt")
    assert report.source_format == "torchrec"
    assert "embedding_bags.films.weight -> table 'films' (guessed)" in report.notes
    loaded = serve.load(tmp_path / "ckpt")
    ids = {"films": [[1, 2, 999], [], [7]], "users": [[3], [299, 299], []]}
    found = loaded.embedding({name: RaggedTensor.from_lists(bags) for name, bags in ids.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bags = torchrec.KeyedJaggedTensor(
            keys=[f"{name}_ids" for name in SHAPES],
            values=torch.tensor([i for name in SHAPES for bag in ids[name] for i in bag]),
            lengths=torch.tensor([len(bag) for name in SHAPES for bag in ids[name]]),
        )
        expected = ours(bags).to_dict()
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[f"{name}_ids"].detach().numpy(), rtol=1e-6, atol=1e-6)

    back = convert(tmp_path / "ckpt", tmp_path / f"back{suffix}", target_format="torchrec").path
    _, theirs = collection()
    state = torch.load(back, weights_only=True) if suffix == ".pt" else _load_safetensors(back)
    theirs.load_state_dict(state)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor)


def _load_safetensors(file):
    return pytest.importorskip("safetensors.torch").load_file(file)


def test_with_modules_of_its_names(tmp_path, capsys):
    module = names_of_torchrec()
    torch.save(
        {"epoch": 3, "model": {f"net.{k}": v for k, v in module.state_dict().items()}}, tmp_path / "m.pt"
    )
    report = convert(tmp_path / "m.pt", tmp_path / "ckpt")
    assert "model.net.embedding_bags.users.weight -> table 'users' (guessed)" in report.notes
    assert "combiner 'sum'" in report.notes[-1]
    assert main(["inspect", str(tmp_path / "m.pt")]) == 0
    assert "films: 1,000 x 16" in capsys.readouterr().out
    keys = {f"net.embedding_bags.{name}.weight": (name, None) for name in SHAPES}
    convert(tmp_path / "ckpt", tmp_path / "back.pt", keys=keys)
    again = names_of_torchrec()
    torch.nn.ModuleDict({"net": again}).load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True))
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_types_keys_and_optimizer_state(tmp_path):
    """Transposed and bfloat16 tensors; Adagrad's sums, Adam's moments; sums of rows have a slot of their own."""
    state = {
        "embedding_bags.films.weight": values("films").t().contiguous().t(),
        "embedding_bags.users.weight": values("users", torch.bfloat16),
        "over.weight": torch.ones(3),
    }
    optimizer = {
        "state": {
            "embedding_bags.films.weight": {
                "films.momentum1": values("films") + 1,
                "films.exp_avg_sq": values("films") + 2,
            },
            "embedding_bags.users.weight": {"users.momentum1": torch.ones(SHAPES["users"][0])},
        }
    }
    torch.save({"model": state, "optimizer": optimizer}, tmp_path / "m.pt")
    report = convert(tmp_path / "m.pt", tmp_path / "ckpt")
    assert any(note.startswith("row_accumulators are of row-wise Adagrad") for note in report.notes)
    counted = convert(tmp_path / "m.pt", tmp_path / "counted", step=7)
    asked = [any("give the number of steps taken with --step" in n for n in r.notes) for r in (report, counted)]
    assert asked == [True, False]
    read = read_checkpoint(tmp_path / "ckpt", slots=True)
    np.testing.assert_array_equal(read.tables["films"], values("films").numpy())
    assert read.tables["users"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        read.tables["users"].astype(np.float32), values("users", torch.bfloat16).float()
    )
    np.testing.assert_array_equal(read.slots["films"]["momenta"], values("films").numpy() + 1)
    np.testing.assert_array_equal(read.slots["films"]["velocities"], values("films").numpy() + 2)
    np.testing.assert_array_equal(read.slots["users"]["row_accumulators"], np.ones(SHAPES["users"][0]))
    back = convert(tmp_path / "ckpt", tmp_path / "back.pt")
    assert any(note.startswith("left out: slots, which torchrec reads from a sharded") for note in back.notes)
    assert torch.equal(
        torch.load(tmp_path / "back.pt", weights_only=True)["embedding_bags.users.weight"],
        values("users", torch.bfloat16),
    )
    adagrad = {
        "embedding_bags.films.weight": values("films"),
        "o.embedding_bags.films.weight.films.momentum1": values("films"),
    }
    torch.save(adagrad, tmp_path / "a.pt")
    assert list(open_source(tmp_path / "a.pt").slots["films"]) == ["accumulators"]
    named = open_source(
        tmp_path / "a.pt", options=Options(keys={"embedding_bags.films.weight": ("other", None)})
    )
    assert list(named.tables) == ["other"]


def test_a_file_is_checked_as_it_is_read(tmp_path):
    """Not when it is opened: a dry run reads no rows, and takes no time for them."""
    names = {name: f"embedding_bags.{name}.weight" for name in SHAPES}
    torch.save({names[name]: values(name) for name in SHAPES}, tmp_path / "m.pt")
    content = bytearray((tmp_path / "m.pt").read_bytes())
    # The first rows of the other table are the same bytes, and come before.
    content[content.rindex(values("users").numpy().tobytes()) + 4000] ^= 1
    (tmp_path / "m.pt").write_bytes(content)
    assert len(convert(tmp_path / "m.pt", tmp_path / "out", dry_run=True).arrays) == 2
    opened = open_source(tmp_path / "m.pt").tables
    np.testing.assert_array_equal(opened["films"].read(), values("films").numpy())
    with pytest.raises(
        ValueError, match=r"m.pt: embedding_bags.users.weight is damaged: .* the checksum it was saved with"
    ):
        opened["users"].source[0:1]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_files_without_checksums_are_told_of(tmp_path):
    """They are not damaged, and torch reads them."""
    saving = importlib.import_module("torch.distributed.checkpoint")
    state = {"embedding_bags.films.weight": values("films")}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "m.pt")
        saving.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("m.pt", "dcp"):
        with pytest.raises(
            ValueError, match=r"Bad CRC-32 .*set_crc32_options\(False\) was called, save it again"
        ):
            convert(tmp_path / name, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_tensors_of_other_types_are_left_out(tmp_path):
    """They are no tables, and no reason to refuse those beside them."""
    state = {
        "embedding_bags.films.weight": values("films"),
        "scale": torch.ones(3).to(torch.float8_e4m3fn),
        "phase": torch.ones(3, dtype=torch.complex64),
    }
    torch.save(state, tmp_path / "m.pt")
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "m.safetensors")
    importlib.import_module("torch.distributed.checkpoint").save(
        state, checkpoint_id=tmp_path / "dcp", no_dist=True
    )
    for name in ("m.pt", "m.safetensors", "dcp"):
        report = convert(tmp_path / name, tmp_path / "out" / name, target_format="jaxembed")
        assert [array.table for array in report.arrays] == ["films"]
        told = " ".join(note for note in report.notes if note.startswith("left out"))
        assert "scale (" in told
        assert "phase" in told
        with pytest.raises(ValueError, match=r"'scale' has a type that no table has: .*; leave it out of keys"):
            convert(tmp_path / name, tmp_path / "named", keys={"scale": ("scale", None)})


def run(processes, what, *arguments):
    """The program `what` of sharded_torch.py, in so many processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(pathlib.Path(__file__).parent / "sharded_torch.py")]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(processes), str(port), what, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), outputs


def test_sharded_checkpoints_of_torch(tmp_path, capsys):
    """Over rows and columns, from two processes; and back, to be loaded over columns and rows."""
    run(2, "torch_save", tmp_path / "dcp")
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    report = convert(tmp_path / "dcp", tmp_path / "ckpt")
    assert report.source_format == "torchrec"
    read = read_checkpoint(tmp_path / "ckpt", slots=True)
    for name, shape in sharded_torch.SHAPES.items():
        assert read.tables[name].shape == shape
        for offset, found in (
            (0, read.tables[name]),
            (0.25, read.slots[name]["momenta"]),
            (0.5, read.slots[name]["velocities"]),
        ):
            np.testing.assert_array_equal(found, sharded_torch.values(name, offset).numpy())
    assert main(["inspect", str(tmp_path / "dcp")]) == 0
    assert "films: 1,001 x 16" in capsys.readouterr().out
    keys = {f"net.embedding_bags.{name}.weight": (name, None) for name in sharded_torch.SHAPES}
    back = convert(tmp_path / "ckpt", tmp_path / "back", target_format="torchrec", keys=keys)
    assert any("films.exp_avg_sq" in note for note in back.notes)
    run(2, "torch_load", tmp_path / "back")
    third = convert(tmp_path / "back", tmp_path / "third")
    assert [a.digest for a in third.arrays] == [a.digest for a in report.arrays]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_slots_of_tables_by_other_names(tmp_path):
    """TorchRec names a slot after the module of the table, which a key may name otherwise than the table."""
    modules = {"item": "embedding_bags.t_item.weight", "user": "net.embeddings.t_user.weight"}
    arrays = {f"tables/{name}": np.full((3, 2), i, np.float32) for i, name in enumerate(modules)}
    arrays |= {
        f"slots/{name}/accumulators": np.full((3, 2), 5 + i, np.float32) for i, name in enumerate(modules)
    }
    np.savez(tmp_path / "a.npz", **arrays)
    convert(tmp_path / "a.npz", tmp_path / "steps", target_format="jaxembed")
    keys = {module: (name, None) for name, module in modules.items()}
    report = convert(tmp_path / "steps", tmp_path / "sharded", target_format="torchrec", keys=keys)
    assert not any(note.startswith("model is an EmbeddingBagCollection by itself") for note in report.notes)
    back = open_source(tmp_path / "sharded")
    assert sorted(back.slots) == ["t_item", "t_user"]
    for name in modules:
        slot = back.slots[f"t_{name}"]["accumulators"]
        np.testing.assert_array_equal(slot.read(), arrays[f"slots/{name}/accumulators"])
    bare = convert(tmp_path / "steps", tmp_path / "bare", target_format="torchrec")
    assert bare.notes[-1].startswith("model is an EmbeddingBagCollection by itself")


@pytest.mark.parametrize("optimizer", ["EXACT_ADAGRAD", "EXACT_ROWWISE_ADAGRAD"])
def test_sharded_checkpoints_of_torchrec(tmp_path, optimizer):
    """TorchRec's own fused optimizer trains on from what was converted to a checkpoint and back."""
    collection()
    pytest.importorskip("fbgemm_gpu")
    run(1, "torchrec_save", tmp_path / "dcp", optimizer)
    report = convert(tmp_path / "dcp", tmp_path / "ckpt")
    slots = {(a.table, a.slot) for a in report.arrays if a.slot}
    keys = {f"net.embedding_bags.{name}.weight": (name, None) for name in SHAPES}
    convert(tmp_path / "ckpt", tmp_path / "back", target_format="torchrec", keys=keys)
    if optimizer == "EXACT_ADAGRAD":
        assert slots == {("films", "accumulators"), ("users", "accumulators")}
        run(1, "torchrec_load", tmp_path / "back", optimizer, tmp_path / "dcp")
    else:
        # A table over two ranges of columns has two sums a row.
        assert slots == {("users", "row_accumulators")}
        assert any(note.startswith("left out: ") and "films.momentum1" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_bad_folders_are_refused(tmp_path, monkeypatch):
    """Unfinished, of others, with code in them, and with parts that are elsewhere."""
    monkeypatch.chdir(tmp_path)
    good = {"embedding_bags.films.weight": values("films")}
    saving = importlib.import_module("torch.distributed.checkpoint")
    saving.save(good, checkpoint_id=tmp_path / "good", no_dist=True)

    def refused(message, metadata=None, data=None):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        for name, content in ((".metadata", metadata), ("__0_0.distcp", data)):
            if content is not None:
                (tmp_path / "bad" / name).write_bytes(content)
        if metadata == b"":
            (tmp_path / "bad" / ".metadata").unlink()
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "bad", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    whole = (tmp_path / "good" / ".metadata").read_bytes()
    data = (tmp_path / "good" / "__0_0.distcp").read_bytes()
    refused(r"has no \.metadata: the save was not finished", b"")
    refused("is no pickle of torch's checkpoints, or is damaged: it names pathlib.*touch", pickle.dumps(Evil()))
    refused(
        "is no pickle of torch's checkpoints, or is damaged: it has a memo that is too large",
        b"\x80\x04Nr\xff\xff\xff\x7f.",
    )
    refused("is no metadata of torch.distributed.checkpoint", pickle.dumps({"a": 1}))
    refused("is no pickle of torch's checkpoints", whole[:100])
    refused("is a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\n")
    refused(
        r"names a file that is not in its folder: \.\./_0\.distcp",
        whole.replace(b"__0_0.distcp", b"../_0.distcp"),
    )
    refused("its pieces are not all of it", whole.replace(b"K\x10\x86", b"K\x11\x86", 1))
    refused(r"__0_0\.distcp is too short", data=data[:5000])
    (tmp_path / "good" / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (tmp_path / "good" / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"__0_0\.distcp cannot be opened: .*; it must be a regular file"):
        convert(tmp_path / "good", tmp_path / "out")
    flipped = bytearray(data)
    flipped[5000] ^= 1
    refused("does not have the checksum it was saved with", data=bytes(flipped))
    assert not (tmp_path / "touched").exists()


class Evil:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("touched"),))


def test_bad_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save({"w": torch.ones(2, 3)}, tmp_path / "plain.pt")
    whole = (tmp_path / "plain.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        ("evil", "is no torch checkpoint of plain tensors"),
        ("text", "is no torch checkpoint of plain tensors"),
        ("cut", "is no torch checkpoint of plain tensors"),
        ("lfs", "is a Git LFS pointer"),
        (
            "plain",
            r"no table that jaxembed recognizes; say which array is which table with keys. It has w float32\[2, 3\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / f"{name}.pt", tmp_path / "out")
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "out").exists()
    np.savez(tmp_path / "a.npz", **{"a.b": np.ones((2, 3), np.float32)})
    with pytest.raises(ValueError, match=r"cannot be a module of torch, for its '.'; give it a key"):
        convert(tmp_path / "a.npz", tmp_path / "out.pt")


def test_without_torch_the_extra_is_named(tmp_path):
    (tmp_path / "m.pt").write_bytes(b"PK")
    program = f"""
import sys
sys.modules["torch"] = None
from jaxembed.convert import convert
try:
    convert({str(tmp_path / "m.pt")!r}, {str(tmp_path / "out")!r})
except ValueError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "needs the package 'torch'; install it with pip install 'jaxembed[torch]'" in done.stdout
