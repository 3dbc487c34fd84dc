"""Checkpoints: any mesh resumes bit by bit, whatever fails in a save."""

import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxembed import FeatureConfig, TableConfig
from jaxembed.checkpoint import CheckpointError, latest_step, layout, read_checkpoint, whole_steps
from jaxembed.cli import main
from jaxembed.optimizers import SGD, Adagrad, optimizer_from_dict
from jaxembed.train import Checkpointer, ShardedEmbedding

from . import checkpoint_programs as programs
from .checkpoint_programs import at_step, embedding, feature_config, same


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 1), (1, 8), (8, 2)])
def test_any_mesh_resumes_bit_by_bit(tmp_path, saved_on, restored_on):
    before, after = embedding(saved_on), embedding(restored_on)
    state = at_step(before, 7)
    with Checkpointer(tmp_path, before) as checkpointer:
        assert checkpointer.save(state)
    with Checkpointer(tmp_path, after) as checkpointer:
        restored = checkpointer.restore()
    tables, slots, _ = before.to_canonical(state)
    assert (restored.step, int(restored.state.step)) == (7, 7)
    assert same(after, restored.state, tables, slots)


def test_digests_are_the_same_from_any_mesh(tmp_path):
    manifests = []
    for n in (1, 8):
        with Checkpointer(tmp_path / str(n), embedding(n)) as checkpointer:
            checkpointer.save(at_step(embedding(n), 1))
        manifests.append(layout.read_manifest(tmp_path / str(n) / "1"))
    assert manifests[0] == manifests[1]


def test_everything_comes_back(tmp_path):
    own = embedding(4)
    params = {"w": jnp.arange(6.0).reshape(2, 3), "layers": [jnp.ones(2, jnp.bfloat16), jnp.zeros(())]}
    model = {"params": params, "opt_state": optax.adam(1e-3).init(params)}
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 3), model=model, data={"at": [1, "two"]}, metadata={"auc": 0.5})
        restored = checkpointer.restore(model=jax.tree.map(jnp.zeros_like, model))
    assert jax.tree.structure(restored.model) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, restored.model, model)
    assert (restored.data, restored.metadata) == ({"at": [1, "two"]}, {"auc": 0.5})


def test_read_from_the_checkpoint_alone(tmp_path):
    own = embedding(8)
    state = at_step(own, 5)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(state, model={"w": [jnp.ones(3)]}, metadata={"a": 1})
    read = read_checkpoint(tmp_path, slots=True)
    assert (read.step, read.metadata, read.feature_config) == (5, {"a": 1}, feature_config())
    assert all(type(table) is np.ndarray for table in read.tables.values())
    assert all(table.ctypes.data % 64 == 0 for table in read.tables.values())
    tables, slots, _ = own.to_canonical(state)
    for name in tables:
        np.testing.assert_array_equal(read.tables[name], np.asarray(tables[name]))
    accumulators = np.asarray(slots["a.b/c d"]["accumulators"])
    np.testing.assert_array_equal(read.slots["a.b/c d"]["accumulators"], accumulators)
    assert read.model["w"][0].tolist() == [1, 1, 1]
    assert read_checkpoint(tmp_path / "5", model=False).model is None


def test_optimizers_are_stored(tmp_path, capsys):
    """Of every table, whether its own or the default; of one that cannot be stored what can, and training goes on."""

    def falling(step):
        return 0.1 / (1 + step)

    for name, default in (("named", Adagrad(0.125)), ("unnamed", Adagrad(falling))):
        own = ShardedEmbedding(feature_config(), default, jax.make_mesh((1,), ("d",)))
        with Checkpointer(tmp_path / name, own) as checkpointer:
            checkpointer.save(own.init(jax.random.key(0)))
        stored = layout.optimizers(layout.read_manifest(tmp_path / name / "0"))
        assert optimizer_from_dict(stored["small"]) == SGD(0.1)
        assert main(["inspect", str(tmp_path / name)]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "a.b/c d: 1,003" in line)
        if name == "named":
            assert optimizer_from_dict(stored["a.b/c d"]) == default
            assert ", adagrad, learning rate 0.125, combiner mean" in line
        else:
            expected = Adagrad(0.125).to_dict()
            del expected["arguments"]["learning_rate"]
            assert stored["a.b/c d"] == expected
            assert ", adagrad, combiner mean" in line
    with pytest.raises(CheckpointError, match="the optimizers of a manifest must have names"):
        layout.optimizers({"optimizers": {"t": {"name": 3}}})


def test_save_is_of_the_state_it_was_given(tmp_path):
    """The trainer donates the state right after an asynchronous save returns."""
    own = embedding(1)
    state = at_step(own, 1)
    expected = jax.tree.map(np.array, own.to_canonical(state)[:2])
    scale = jax.jit(lambda s: jax.tree.map(lambda x: x * x.dtype.type(2), s), donate_argnums=0)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(state)
        for _ in range(5):
            state = scale(state)
        assert same(own, checkpointer.restore().state, *expected)


def test_interval_force_and_old_steps(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own, max_to_keep=2, save_interval_steps=10) as checkpointer:
        assert checkpointer.latest_step() is None
        saved = [checkpointer.save(at_step(own, step)) for step in (10, 15, 20, 30)]
        assert saved == [True, False, True, True]
        assert checkpointer.save(at_step(own, 31), force=True)
        checkpointer.wait()
        assert whole_steps(tmp_path) == [30, 31]
        assert checkpointer.latest_step() == latest_step(tmp_path) == 31
        assert checkpointer.restore(30).step == 30
        with pytest.raises(FileNotFoundError, match=r"no step 10 at .*whole steps are \[30, 31\]"):
            checkpointer.restore(10)


def test_to_go_back_means_to_move_what_came_later_away(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own, max_to_keep=None) as checkpointer:
        for step in (100, 300):
            checkpointer.save(at_step(own, step))
        assert checkpointer.restore(100).step == 100
        for force in (False, True):
            with pytest.raises(
                ValueError, match=r"has step 300, later than step 150, .* move the later ones away"
            ):
                checkpointer.save(at_step(own, 150), force=force)
        assert not checkpointer.save(at_step(own, 300))  # is there
        assert checkpointer.save(at_step(own, 400))
        with pytest.raises(ValueError, match="has step 400, later than step 350"):  # though it is not whole yet
            checkpointer.save(at_step(own, 350))
        (tmp_path / "400").rename(tmp_path / "diverged too")
        (tmp_path / "300").rename(tmp_path / "diverged")
        assert checkpointer.save(at_step(own, 150))
    assert whole_steps(tmp_path) == [100, 150]


def test_deleted_steps_leave_the_disk(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own, max_to_keep=2) as checkpointer:
        for step in range(1, 7):
            checkpointer.save(at_step(own, step))
            checkpointer.wait()
        # Those of the last save are removed beside the next.
        assert len(list((tmp_path / layout.DELETING).iterdir())) <= 2
    assert not list((tmp_path / layout.DELETING).iterdir())
    assert whole_steps(tmp_path) == [5, 6]


def test_failed_write_leaves_the_last_step(tmp_path):
    """A disk that refuses to take more, here by a limit on the size of files."""
    own = embedding(1, {"x": FeatureConfig(TableConfig(50_000, 16, name="t"))})
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
        checkpointer.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            checkpointer.save(at_step(own, 2))
            with pytest.raises(OSError, match="File too large"):
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert whole_steps(tmp_path) == [1]
    assert read_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_kill_in_the_middle_of_saves(tmp_path, count):
    """Every step that is listed after SIGKILL is whole, at whatever moment it came."""
    program = pathlib.Path(programs.__file__)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    own, rng = embedding(1), np.random.default_rng(0)
    for round in range(count):
        directory = tmp_path / str(round)
        child = subprocess.Popen(
            [sys.executable, str(program), str(directory)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == "3":
                break
        time.sleep(rng.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        steps = whole_steps(directory)
        assert steps
        for step in steps:
            read = read_checkpoint(directory, step, slots=True)
            tables, slots, _ = own.to_canonical(at_step(own, step, seed=step))
            assert read.model["step"] == read.step == step
            np.testing.assert_array_equal(read.tables["small"], np.asarray(tables["small"]))
            np.testing.assert_array_equal(
                read.slots["a.b/c d"]["accumulators"], np.asarray(slots["a.b/c d"]["accumulators"])
            )
        with Checkpointer(directory, own) as checkpointer:
            assert checkpointer.restore().step == steps[-1]
            # Training goes on at the step that was being saved; what was left of it makes way.
            assert checkpointer.save(at_step(own, steps[-1] + 1, seed=1))
        assert sorted(path.name for path in directory.iterdir() if not path.name.startswith(".")) == sorted(
            map(str, [*steps[-2:], steps[-1] + 1])
        )
        assert not list(directory.glob(f"{layout.DELETING}/*"))


def test_unnamed_initializer_is_refused_before_training():
    config = {
        "x": FeatureConfig(TableConfig(8, 4, lambda key, shape, dtype: jnp.zeros(shape, dtype), name="t"))
    }
    with pytest.raises(ValueError, match="cannot be stored"):
        Checkpointer("unused", embedding(1, config))
    assert isinstance(embedding(1, config), ShardedEmbedding)
