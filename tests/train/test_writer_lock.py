"""One process at a time saves to a folder, and a training job writes nothing beside another one."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import warnings

import pytest

from jaxembed.checkpoint import whole_steps
from jaxembed.cli import main
from jaxembed.train import Checkpointer, writer_lock
from jaxembed.train.writer_lock import WriterLock

from .checkpoint_programs import at_step, embedding
from .jobs import write_config, write_data
from .processes import started

SAVES = ["-m", "tests.train.checkpoint_programs"]


def saving(process):
    """Waits until the first step of `save_forever` is on the disk: the next ones are begun."""
    for expected in ("ready", "1", "2", "3"):
        assert process.stdout.readline() == f"{expected}\n"


def test_another_process_is_refused_until_the_first_is_killed(tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoints"
    config = write_config(tmp_path, write_data(tmp_path))
    own = embedding(1)
    with started([[*SAVES, folder]]) as (process,):
        saving(process)
        message = rf"{folder} is being written to by process {process.pid} on .*\. Wait until it has ended"
        with Checkpointer(folder, own) as checkpointer:
            with pytest.raises(ValueError, match=message):
                checkpointer.save(at_step(own, 10**6))
            assert checkpointer.latest_step() is not None  # reading is free
        assert main(["train", "--config", str(config)]) == 2
        assert f"written to by process {process.pid} on" in capsys.readouterr().err
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints"]
        # What the other one is writing stayed.
        last = int(process.stdout.readline())
        for _ in range(3):
            assert int(process.stdout.readline()) == (last := last + 1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with warnings.catch_warnings(), Checkpointer(folder, own) as checkpointer:
        warnings.simplefilter("ignore", RuntimeWarning)  # steps that it was in the middle of
        assert checkpointer.save(at_step(own, 10**6))
    assert whole_steps(folder)[-1] == 10**6


FORKED = """
import os, pathlib, signal, sys, warnings

from jaxembed.train import writer_lock
from jaxembed.train.writer_lock import WriterLock

warnings.simplefilter("ignore")  # of JAX, which this child has no use of
lock = WriterLock(pathlib.Path(sys.argv[1]))
if os.fork():
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
try:
    WriterLock(pathlib.Path(sys.argv[1]))
    print("taken", os.getpid(), flush=True)
except ValueError:
    print("refused", os.getpid(), flush=True)
signal.pause()
"""


def test_a_child_that_was_forked_has_no_part_in_the_lock(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", FORKED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        said, child = parent.stdout.readline().split()
        try:
            assert said == "refused"
            assert not can_be_locked(tmp_path)
            parent.stdin.write("\n")
            parent.stdin.close()
            parent.wait()
            os.kill(int(child), 0)  # is still there
            assert can_be_locked(tmp_path)
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_checkpointers_of_one_process_share_the_folder(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as first:
        first.save(at_step(own, 1))
        with Checkpointer(tmp_path, own) as second:
            second.save(at_step(own, 2))
        first.wait()
        first.save(at_step(own, 3))
        assert not can_be_locked(tmp_path)
    assert can_be_locked(tmp_path)
    assert whole_steps(tmp_path)[-1] == 3
    second.close()


def can_be_locked(folder):
    descriptor = os.open(folder / ".writer", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_reading_takes_no_lock(tmp_path):
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.save(at_step(own, 1))
    (tmp_path / ".writer").unlink()
    (tmp_path / ".deleting" / "7").mkdir(parents=True)
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.restore()
    assert not (tmp_path / ".writer").exists()
    assert (tmp_path / ".deleting" / "7").exists()  # it may be the writer's that is being removed


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    own = embedding(1)
    with Checkpointer(tmp_path, own) as checkpointer:
        with pytest.warns(RuntimeWarning, match=r"\.writer cannot be locked \(No locks available\)"):
            assert checkpointer.save(at_step(own, 1))
        assert checkpointer.save(at_step(own, 2))
    assert whole_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("said", ["", "999999999 {host}", "not a number", "\xff"])
def test_a_writer_that_is_not_known(tmp_path, said):
    """The file names the last writer that came to write its name: it may be dead while another one has the lock."""
    (tmp_path / ".writer").write_text(said.format(host=os.uname().nodename), "latin-1")
    with open(tmp_path / ".writer", "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being written to by another process"):
            WriterLock(tmp_path)


def test_a_writer_of_another_user_lives(tmp_path, monkeypatch):
    """It cannot be signalled, and is no reason to advise that its lock be removed."""

    def kill(pid, signal):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / ".writer").write_text(f"1 {socket.gethostname()}\n")
    with open(tmp_path / ".writer", "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=rf"by process 1 on {socket.gethostname()}\.") as raised:
            WriterLock(tmp_path)
    assert "remove" not in str(raised.value)


def test_the_lock_of_a_machine_that_is_gone(tmp_path):
    for writer in ("process 7 on elsewhere", "another process"):
        told = writer_lock._if_gone(writer, tmp_path / ".writer")
        assert told.endswith(f"remove {tmp_path / '.writer'}.")
    assert writer_lock._if_gone(f"process 7 on {socket.gethostname()}", tmp_path / ".writer") == ""
