"""Real processes under jax.distributed train, checkpoint and resume as one process does."""

import json

import numpy as np
import pytest

from jaxembed.checkpoint import read_checkpoint

from .processes import HERE, free_port, outputs

pytestmark = pytest.mark.multihost
DEVICES = 4


def run(directory, num_processes):
    """Trains on four devices of that many processes; what process 0 printed."""
    address = f"localhost:{free_port()}"
    program = HERE / "multihost_programs.py"
    commands = [
        (program, address, num_processes, index, DEVICES // num_processes, directory)
        for index in range(num_processes)
    ]
    return json.loads(outputs(commands)[0].splitlines()[-1])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    directory = tmp_path_factory.mktemp("single")
    return run(directory, 1), directory


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_checkpoint_and_resume_as_one(single, tmp_path, num_processes):
    expected, expected_directory = single
    found = run(tmp_path, num_processes)
    assert found["step"] == expected["step"] == 3
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=1e-5)
    ours, theirs = (read_checkpoint(path, slots=True) for path in (tmp_path, expected_directory))
    assert ours.step == theirs.step == 6
    for name, table in theirs.tables.items():
        np.testing.assert_allclose(ours.tables[name], table, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            ours.slots[name]["accumulators"], theirs.slots[name]["accumulators"], rtol=0, atol=1e-5
        )
        assert np.abs(table).max() > 1e-2, "nothing was trained"
