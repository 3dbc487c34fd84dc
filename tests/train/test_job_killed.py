"""Training processes that are killed: whatever the moment, the next one goes on from a whole step."""

import random
import signal
import time

import pytest

from jaxembed.checkpoint import latest_step, read_checkpoint

from .jobs import assert_same_bits, write_config, write_data
from .processes import outputs, started

KILLS = 50


def command(config, **changes):
    sets = [f"{key}={value}" for key, value in changes.items()]
    return ["-m", "jaxembed.train", "--config", config, *[x for s in sets for x in ("--set", s)]]


def saved(config):
    return config.parent / "run" / "checkpoints"


def wait_beyond(config, step, process, timeout=300):
    """Waits until a step after `step` is saved."""
    end = time.monotonic() + timeout
    while (latest_step(saved(config)) or 0) <= step:
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < end, "no new checkpoint"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_fifty_times_the_run_ends_in_the_same_bits(tmp_path):
    """Kills fall anywhere: in a step, in a save, in the deletion of an old step, in a start."""
    data = write_data(tmp_path)
    config = write_config(tmp_path, data)
    rng, last = random.Random(0), 0
    for kill in range(KILLS):
        with started([command(config, **{"training.steps": 1_000_000})]) as (process,):
            if kill % 5 == 4:
                time.sleep(rng.uniform(0, 5))  # most likely while it starts or restores
            else:
                wait_beyond(config, last, process)
                time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
        step = latest_step(saved(config)) or 0
        assert step >= last, "a whole step was lost"
        if step:
            read_checkpoint(saved(config), slots=True)  # its digests are compared
        last = step
    steps = last + 5
    outputs([command(config, **{"training.steps": steps})])
    assert latest_step(saved(config)) == steps
    alone = tmp_path / "alone"
    alone.mkdir()
    undisturbed = write_config(alone, data)
    outputs([command(undisturbed, **{"training.steps": steps, "checkpoints.every": steps})], timeout=600)
    assert_same_bits(saved(config), saved(undisturbed))


@pytest.mark.slow
def test_sigterm_ends_the_process_with_a_checkpoint(tmp_path):
    config = write_config(tmp_path, write_data(tmp_path))
    with started([command(config, **{"training.steps": 1_000_000, "checkpoints.every": 3})]) as (process,):
        wait_beyond(config, 0, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 143, errors[-4000:]
    step = latest_step(saved(config))
    outputs([command(config, **{"training.steps": step + 2})])
    assert latest_step(saved(config)) == step + 2
