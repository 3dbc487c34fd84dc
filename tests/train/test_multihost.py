"""Real processes under jax.distributed train, checkpoint and resume as one process does."""

import json
import re
import signal
import time

import jax
import numpy as np
import pytest

from jaxembed.checkpoint import latest_step, read_checkpoint
from jaxembed.train.job import load_config, train

from .jobs import write_config, write_data
from .processes import HERE, free_port, outputs, started

pytestmark = pytest.mark.multihost
DEVICES = 4


def run(directory, num_processes):
    """Trains on four devices of that many processes; what each found."""
    address = f"localhost:{free_port()}"
    program = HERE / "multihost_programs.py"
    commands = [
        (program, address, num_processes, index, DEVICES // num_processes, directory)
        for index in range(num_processes)
    ]
    return [json.loads(output.splitlines()[-1]) for output in outputs(commands, timeout=600)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    directory = tmp_path_factory.mktemp("single")
    return run(directory, 1), directory


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("several")
    return run(directory, request.param), directory


def test_processes_train_checkpoint_and_resume_as_one(single, several):
    (expected,), expected_directory = single
    each, directory = several
    for found in each:
        assert found["step"] == expected["step"] == 3
        assert found["plan"] == expected["plan"]
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=1e-5)
    ours, theirs = (read_checkpoint(path, slots=True) for path in (directory, expected_directory))
    assert ours.step == theirs.step == 6
    for name, table in theirs.tables.items():
        np.testing.assert_allclose(ours.tables[name], table, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            ours.slots[name]["accumulators"], theirs.slots[name]["accumulators"], rtol=0, atol=1e-5
        )
        assert np.abs(table).max() > 1e-2, "nothing was trained"
    # Dropout left the same out and BatchNorm averaged over the rows of all processes; its mean holds a bias before it,
    # whose gradient is rounding errors.
    for norm, wanted in zip(norms(ours), norms(theirs), strict=True):
        np.testing.assert_allclose(norm["var"], wanted["var"], rtol=1e-4)
        assert (np.abs(wanted["var"] - 1) > 1e-3).any()


def norms(checkpoint):
    state = checkpoint.model["model_state"]
    assert state["top"]["dropout"]["rngs"]["count"] == 6 * 2
    return [*state["bottom"]["norms"].values(), *state["top"]["norms"].values()]


def test_models_with_other_keys_on_other_processes_are_refused(several):
    for found in several[0]:
        assert found["refused"].startswith(
            "all processes must start from the same model; make it on each with nnx.Rngs"
        )


def test_processes_choose_row_kernels_that_all_of_them_find_fast(several):
    for found in several[0]:
        assert found["row_kernels"] == {"a": "pallas", "b": "xla"}


def job_commands(config, num_processes, steps):
    """The training command, once for each process."""
    settings = [f"training.steps={steps}", f"distributed.cpu_devices={DEVICES // num_processes}"]
    if num_processes > 1:
        address = f"localhost:{free_port()}"
        settings += [
            "distributed.enabled=true",
            f"distributed.coordinator_address={address}",
            f"distributed.num_processes={num_processes}",
        ]
    commands = []
    for index in range(num_processes):
        own = [*settings, f"distributed.process_id={index}"] if num_processes > 1 else settings
        sets = [part for setting in own for part in ("--set", setting)]
        commands.append(["-m", "jaxembed.train", "--config", config, *sets])
    return commands


@pytest.mark.slow
def test_the_command_trains_on_two_processes_and_sigterm_to_one_stops_both(tmp_path):
    (tmp_path / "one").mkdir()
    data = write_data(tmp_path)
    alone, config = write_config(tmp_path / "one", data), write_config(tmp_path, data)
    checkpoints = tmp_path / "run" / "checkpoints"
    with started(job_commands(config, 2, 1_000_000)) as processes:
        wait_for_a_step(checkpoints, processes)
        processes[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=300)[1][-3000:] for process in processes]
        assert [process.returncode for process in processes] == [143, 143], errors
    stopped = latest_step(checkpoints)
    outputs(job_commands(config, 2, stopped + 4))
    outputs(job_commands(alone, 1, stopped + 4))
    ours, theirs = (read_checkpoint(p, slots=True) for p in (checkpoints, tmp_path / "one/run/checkpoints"))
    assert ours.step == theirs.step == stopped + 4
    for found, wanted in ((ours.tables, theirs.tables), (ours.slots, theirs.slots), (ours.model, theirs.model)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, wanted)
    assert ours.metadata["evaluation"]["auc"] == pytest.approx(theirs.metadata["evaluation"]["auc"], abs=1e-3)


@pytest.mark.slow
def test_a_second_job_in_the_same_folder_is_refused_on_all_its_processes(tmp_path):
    config = write_config(tmp_path, write_data(tmp_path))
    checkpoints = tmp_path / "run" / "checkpoints"
    with started(job_commands(config, 2, 1_000_000)) as first:
        wait_for_a_step(checkpoints, first)
        before = sorted(path.name for path in (tmp_path / "run").iterdir())
        with started(job_commands(config, 2, 1_000_000)) as second:
            found = [process.communicate(timeout=300) for process in second]
            for process, (_, errors) in zip(second, found, strict=True):
                assert process.returncode == 2, errors[-4000:]
                assert f"{checkpoints} is being written to by process {first[0].pid} on " in errors
                assert "Wait until it has ended or end it" in errors
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
        reached = latest_step(checkpoints)
        wait_for_a_step(checkpoints, first, beyond=reached + 6)
        first[0].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=300)[1][-3000:] for process in first]
        assert [process.returncode for process in first] == [143, 143], errors
    read_checkpoint(checkpoints, slots=True)
    # Once the first has ended, the same command goes on.
    outputs(job_commands(config, 2, latest_step(checkpoints) + 2))


@pytest.mark.slow
def test_hosts_that_read_other_data_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    data = [write_data(tmp_path), write_data(tmp_path / "other", nan_at=190)]
    commands = job_commands(write_config(tmp_path, data[0]), 2, 4)
    config = write_config(tmp_path / "other", data[0], out=str(tmp_path / "run"))
    commands[1][3] = config
    commands[1] += ["--set", f'data.evaluation=["{data[1]}"]']
    with started(commands) as processes:
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [2, 2], errors
    assert "processes [1] read other data than process 0; their errors say how" in errors[0]
    assert (
        f"process 1 reads other data than process 0 (there, now here): of its 1 files {data[1]} are new"
        in errors[1]
    )
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_changed_data_is_refused_on_all_processes(tmp_path):
    data = write_data(tmp_path)
    config = write_config(tmp_path, data)
    with jax.numpy_dtype_promotion("standard"):
        train(load_config(config, ["training.steps=2"]))
    write_data(tmp_path, nan_at=199)
    with started(job_commands(config, 2, 4)) as processes:
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [2, 2], errors
    for error in errors:
        assert re.search(
            rf"run on other data: {data} had bytes .* now it has bytes .*data_changed=accept", error
        )


def wait_for_a_step(checkpoints, processes, timeout=300, beyond=-1):
    end = time.monotonic() + timeout
    while (latest_step(checkpoints) or -1) <= beyond:
        for process in processes:
            assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.02)
