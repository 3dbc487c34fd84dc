"""What the supervisor does about workers that die, with processes that only seem to be some."""

import errno
import os
import time

import pytest
from prometheus_client import values

from jaxembed.serve.server import workers
from jaxembed.serve.server.config import ServerConfig
from jaxembed.serve.server.metrics import Metrics


class Process:
    def __init__(self, *_, **__):
        self.pid, self.returncode = 1 << 30, None

    def poll(self):
        return self.returncode

    def terminate(self):
        self.returncode = 0

    def wait(self, timeout):
        return self.returncode


@pytest.fixture
def supervisor(tmp_path):
    found = workers.Supervisor(ServerConfig(str(tmp_path), http_port=0, grpc_port=None, workers=2))
    yield found
    found._end()
    found._state.close()


def test_workers_that_serve_are_not_ended_for_one_that_never_starts(supervisor):
    supervisor._workers = {0: Process(), 1: Process()}
    assert not supervisor._any_serves
    (supervisor._state.path / "serving" / "123-7").touch()  # one that began to serve at once
    assert supervisor._any_serves
    (supervisor._state.path / "serving" / "123-7").unlink()
    assert not supervisor._any_serves
    begun = supervisor._state.path / "serving" / f"{Process().pid}-begun"
    begun.touch()
    supervisor._restart_dead()
    begun.unlink()  # by somebody who cleans up
    assert not supervisor._any_serves
    supervisor._begun[Process().pid] -= 60
    assert supervisor._any_serves


def test_a_process_that_cannot_be_made_is_made_later(supervisor, monkeypatch):
    dead = Process()
    dead.returncode = -9
    other = Process()
    supervisor._workers = {0: dead, 1: other}
    supervisor._begun[dead.pid] = time.monotonic() - 60
    lacks = [OSError(errno.EAGAIN, "no processes")]

    def start(*arguments, **options):
        if lacks:
            raise lacks.pop()
        return Process()

    monkeypatch.setattr(workers.subprocess, "Popen", start)
    monkeypatch.setattr(workers, "_RETRY_SECONDS", 0.05)
    supervisor._restart_dead()
    assert supervisor._workers[0] is dead
    supervisor._restart_dead()  # not at once
    assert supervisor._workers[0] is dead
    time.sleep(0.1)
    supervisor._restart_dead()
    assert supervisor._workers[0].poll() is None
    assert supervisor._workers[1] is other
    assert not supervisor._due
    assert supervisor._failures == 0  # it is not the command line's
    supervisor._failures = 5000  # a slot that died young for weeks, beside others that serve
    supervisor._workers[1].returncode = -9
    supervisor._restart_dead()
    assert supervisor._due[1] <= time.monotonic() + workers._SLOWEST_RESTART


def test_a_supervisor_without_files_to_open_ends_nobody(supervisor, monkeypatch):
    """A worker that died is forgotten, and replaced, once there are some."""
    dead = Process()
    dead.pid, dead.returncode = 123, -9
    other = Process()
    supervisor._workers = {0: dead, 1: other}
    supervisor._begun[dead.pid] = time.monotonic() - 60
    serving = supervisor._state.path / "serving" / "123-7"
    serving.touch()
    monkeypatch.setattr(workers.subprocess, "Popen", Process)
    monkeypatch.setattr(workers, "_RETRY_SECONDS", 0.0)
    with monkeypatch.context() as lacking:

        def fail(*_):
            raise OSError(errno.EMFILE, "Too many open files")

        lacking.setattr(supervisor._peers, "_withdraw", fail)
        lacking.setattr("jaxembed.serve.server.peers.os.listdir", fail)
        supervisor._restart_dead()
        assert supervisor._workers == {0: dead, 1: other}
        supervisor._lived = False
        assert supervisor._any_serves
    supervisor._restart_dead()
    assert supervisor._workers[0].poll() is None
    assert not serving.exists()


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_folder_that_cannot_be_read_ends_nobody(supervisor, monkeypatch, error):
    supervisor._workers = {0: Process(), 1: Process()}

    def fail(*_, **__):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as failing:
        failing.setattr("os.stat", fail)
        failing.setattr("jaxembed.serve.server.peers.os.listdir", fail)
        supervisor._restart_dead()
        supervisor._remember()
        assert supervisor._any_serves  # one may
    assert not supervisor._begun
    assert not supervisor._served
    assert not supervisor._any_serves


@pytest.mark.parametrize("serves", ["never", "before", "still"])
def test_a_mistake_that_took_long_to_find_is_said(supervisor, monkeypatch, serves):
    """It ends the server unless a worker ever served, which is told from what workers serve, not from their age."""
    (supervisor._state.path / workers.MISTAKE).write_text("model 'm:f' cannot be imported")
    serving = supervisor._state.path / "serving" / "123-7"
    if serves != "never":
        serving.touch()
    made, said = [], []

    def start(*arguments, **options):
        made.append(Process())
        if len(made) == 1:
            made[0].returncode = workers.MISTAKE_STATUS
        elif len(made) > 2:  # the mistaken one was replaced
            supervisor._stop.set()
            if serves == "before":
                serving.unlink()
        return made[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", start)
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(supervisor._state, "close", lambda: None)  # which the fixture does
    monkeypatch.setattr(workers, "_HEALTHY_SECONDS", -1.0)  # all are old
    monkeypatch.setattr(
        supervisor._log, "error", lambda message, extra: said.append((message, extra.get("reason")))
    )
    if serves != "never":
        assert supervisor.run() == 0
        assert supervisor._mistake is None
        assert supervisor._failures == 1
    else:
        with pytest.raises(ValueError, match="model 'm:f' cannot be imported"):
            supervisor.run()
    assert said[1:] == [("the command line is wrong", "model 'm:f' cannot be imported")]


def test_workers_that_die_count_on_in_the_same_files(supervisor, monkeypatch):
    """However many die, their files are those of as many as there are at a time, and what they counted is kept."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(supervisor._metrics))
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setattr(workers.subprocess, "Popen", lambda command, **_: commands.append(command) or Process())
    commands, lines = [], set()
    for slot in (0, 1):
        supervisor._start(slot)
    for deaths in range(1, 4):
        for slot, command in enumerate(commands[-2:]):
            assert command[-1] == str(slot)
            metrics = Metrics(slot)
            metrics.request("tf_rest", 200, 0.1)
            metrics.queued(5, 8)
            metrics.flush()
            lines = set(metrics.text().decode().splitlines())
            supervisor._workers[slot].returncode = -9
        assert f'jaxembed_requests_total{{protocol="tf_rest",status="200"}} {2.0 * deaths}' in lines
        assert f'jaxembed_request_seconds_count{{protocol="tf_rest"}} {2.0 * deaths}' in lines
        assert "jaxembed_queued_rows 10.0" in lines
        assert "jaxembed_room_requests 16.0" in lines
        assert len(list(supervisor._metrics.iterdir())) == 8
        supervisor._due = {0: 0.0, 1: 0.0}
        supervisor._restart_dead()
        assert len(list(supervisor._metrics.iterdir())) == 4  # what lives no more has no queue and no version


def test_a_process_that_can_never_be_made_counts_as_one_that_dies(supervisor, monkeypatch):
    dead = Process()
    dead.returncode = 1
    supervisor._workers = {0: dead}

    def start(*arguments, **options):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "python")

    monkeypatch.setattr(workers.subprocess, "Popen", start)
    monkeypatch.setattr(workers, "_RETRY_SECONDS", 0.0)
    for _ in range(workers._HOPELESS):
        supervisor._restart_dead()
    assert supervisor._failures > workers._HOPELESS
