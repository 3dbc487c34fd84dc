"""`jaxembed COMMAND --help` of every command, `doctor`, and `bench`."""

import shlex

import jax
import numpy as np
import pytest

from jaxembed.cli import COMMANDS, bench, doctor, main
from jaxembed.cli.doctor import memory_lines


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    examples = [x for x in capsys.readouterr().out.splitlines() if x.startswith(f"jaxembed {name}")]
    assert examples
    for example in examples:
        # argparse prints the help, and ends, before it finds what is missing; an unknown flag is still an error.
        with pytest.raises(SystemExit) as stopped:
            main([*shlex.split(example)[1:], "--no-such-flag"])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.rstrip().endswith("unrecognized arguments: --no-such-flag")


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "core: works" in out
    assert "instructions of the kernel: " in out
    assert "lookups on CPU: native; training engine: xla" in out
    assert "extra server: " in out
    assert "jaxlib " in out


def test_extras_of_packages_that_an_extra_names_are_looked_at(monkeypatch):
    requires = {
        "jaxembed": [
            'jax>=0.10; extra == "plain"',
            'jax[tpu]; (os_name == "posix") and extra == "tpu"',
            'elsewhere; (os_name == "posix" and sys_platform == "plan9") and extra == "tpu"',
            'jaxembed[plain,tpu]; extra == "both"',
        ],
        "jax": ['libtpu==0.0.42.*; extra == "tpu"', 'nothing; os_name == "nt" and extra == "tpu"', "numpy"],
    }
    monkeypatch.setattr(doctor.importlib.metadata, "requires", requires.get)
    monkeypatch.setattr(doctor, "_version", lambda name: "1" if name in requires else None)
    assert list(doctor.missing_lines()) == [
        "extra both: missing libtpu; pip install 'jaxembed[both]'",
        "extra plain: complete",
        "extra tpu: missing libtpu; pip install 'jaxembed[tpu]'",
    ]


def test_doctor_says_what_is_broken(monkeypatch, capsys):
    monkeypatch.setattr("jaxembed.kernel.unavailable_reason", lambda: 1 / 0)
    assert main(["doctor"]) == 1
    assert "core: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "told"), [("max", "none"), (str(3 << 30), "3.0 GiB")])
def test_limit_of_the_control_group(tmp_path, text, told):
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(text + "\n")
    assert list(memory_lines(tmp_path)) == ["memory: unknown", f"memory limit of the control group: {told}"]


def test_bench(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        main(["bench", "--vocabulary", "100", "--dim", "8", "--batch", "4", "--valency", "3", "--rounds", "2"])
        == 0
    )
    assert "plain JAX" in capsys.readouterr().out


def test_bench_of_long_bags_takes_no_rounding_for_other_rows(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = "bench --vocabulary 100 --dim 8 --batch 2 --valency 100000 --rounds 1"
    assert main(line.split()) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", ["xla", "auto"])
def test_bench_is_of_the_cpu_whatever_the_default_device(path, monkeypatch):
    """With another CPU device in the place of an accelerator."""
    used, device_put = set(), jax.device_put

    def put(*args):
        placed = device_put(*args)
        used.update(device for leaf in jax.tree.leaves(placed) for device in leaf.devices())
        return placed

    monkeypatch.setattr(jax, "device_put", put)
    table, ids, splits = np.ones((6, 2), np.float32), np.array([1, 2], np.int32), np.array([0, 2], np.int32)
    first, other, *_ = jax.devices("cpu")
    with jax.default_device(other):
        out = bench._jaxembed(path, table, [ids], splits)(0)
    np.testing.assert_array_equal(out, [[2, 2]])
    assert used == {first}


@pytest.mark.parametrize("error", [RuntimeError("Unknown backend cpu"), AssertionError()])
def test_bench_where_jax_has_no_cpu(error, capsys, monkeypatch):
    """As with JAX_PLATFORMS=cuda, with a GPU and without one."""

    def local_devices(backend):
        raise error

    monkeypatch.setattr(jax, "local_devices", local_devices)
    assert main(["bench", "--vocabulary", "2", "--dim", "2", "--batch", "1", "--valency", "1"]) == 2
    assert "set JAX_PLATFORMS=cpu, or cuda,cpu" in capsys.readouterr().err


def test_bench_of_nothing(capsys):
    assert main(["bench", "--batch", "0"]) == 2
    assert capsys.readouterr().err.startswith("jaxembed: --batch must be at least 1, got 0.\n")


def fails_with(told, command, capsys):
    """On a line that tells it, with status 2; by the ImportError itself, whose place must be seen, if that is None."""
    if told is None:
        with pytest.raises(ImportError, match=r"cannot (import|open)"):
            main(command)
    else:
        assert main(command) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("Parquet files need pyarrow; pip install pyarrow."), "files need pyarrow; pip install"),
        (ImportError("cannot import name 'x' from 'y'", name="y"), None),
    ],
)
def test_what_must_be_installed_is_a_line(error, told, monkeypatch, capsys):
    """What Python says of an import that fails is a fault, whose place must be seen."""

    def run(options):
        raise error

    monkeypatch.setattr("jaxembed.cli.doctor.run", run)
    fails_with(told, ["doctor"], capsys)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("No module named 'y'", name="y"), "needs the package 'y'; install it with pip"),
        (
            ImportError("cannot import name 'x' from 'y'", name="y"),
            "'y' in a newer version (cannot import name",
        ),
        (ImportError("libx.so: cannot open shared object file", name="y"), None),
    ],
)
def test_packages_of_an_extra_that_are_missing_or_old(error, told, monkeypatch, capsys):
    def import_module(name):
        raise error

    monkeypatch.setattr("importlib.import_module", import_module)
    fails_with(told, ["train", "--config", "x.toml"], capsys)


@pytest.mark.parametrize(
    ("line", "status", "told"),
    [
        ("convert /nowhere/a out", 2, "/nowhere/a"),
        ("inspect /nowhere/a", 2, "/nowhere/a"),
        ("diff /nowhere/a /nowhere/b", 2, "/nowhere/a"),
        ("train --config /nowhere/a.toml", 2, "/nowhere/a.toml"),
        ("train --config /nowhere/a.ini", 2, ".toml or .json"),
        ("serve /nowhere/a --model nonsense", 2, "MODULE:NAME"),
        ("serve /nowhere/a --http-port 99999", 2, "must be a port"),
        ("bench --rounds 0", 2, "--rounds must be at least 1"),
    ],
)
def test_mistakes_give_one_line_and_a_hint(line, status, told, capsys):
    assert main(line.split()) == status
    err = capsys.readouterr().err
    assert told in err
    assert err.startswith("jaxembed: ")
    assert err.count("\n") == 2
    assert err.endswith(f"`jaxembed {line.split()[0]} --help` has an example.\n")
