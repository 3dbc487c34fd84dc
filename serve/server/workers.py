"""Supervisor: starts the worker processes, starts those again that die, and stops them together.

The workers accept from one socket, which the supervisor holds: what a worker that dies had not accepted is
served by the others. Tables are mapped from their files, so all workers share one copy of them.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import FrameType

from . import logs
from .config import CONFIG_VARIABLE, ENDING_SECONDS, MISTAKE, MISTAKE_STATUS, ServerConfig
from .cores import cores_of_worker
from .metric_files import METRIC_BYTES
from .peers import Peers
from .shared_tables import forget_tables
from .state_folder import StateFolder, check_writable

_BACKLOG = 1024
_SLOWEST_RESTART = 30.0
_HEALTHY_SECONDS = 10.0
_RETRY_SECONDS = 1.0
_STATE_BYTES = 1 << 16  # beside the metrics, and compiled programs, without which it does
# Of processes, memory or files there are none left for the moment.
_LACKS = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_HOPELESS = 5  # deaths and failed starts in a row, where no worker ever lived long, and none serves


class Supervisor:
    """Runs the workers of one server.

    Args:
      config: of the server.

    Raises:
      ValueError: if there is no folder of bundles, a folder cannot be written, or another server has that of the state.
      OSError: if a port is taken, or a disk is full.
    """

    def __init__(self, config: ServerConfig):
        if not config.directory.is_dir():
            raise ValueError(
                f"there is no folder at {config.directory}; name the one that `jaxembed convert --to serving` fills "
                "with versions, or make it, and versions may come later."
            )
        if (config.directory / "manifest.json").is_file():
            raise ValueError(
                f"{config.directory} is one version of a bundle; name the folder that it is in, "
                f"{config.directory.parent}."
            )
        if config.compile_cache is not None:
            check_writable("--compile-cache", pathlib.Path(config.compile_cache).expanduser().absolute())
        self._state = StateFolder(config.state, _STATE_BYTES + METRIC_BYTES * config.workers)
        try:
            self._listener, self._grpc_holder = _listen(config)
        except OSError:
            self._state.close()
            raise
        self.grpc_port: int | None = None if self._grpc_holder is None else self._grpc_holder.getsockname()[1]
        self._config = replace(config, state=str(self._state.path))
        if self._config.compiled is not None:  # made now, it needs no room later
            self._config.compiled.mkdir(parents=True, exist_ok=True)
        self._metrics = self._state.path / "metrics"
        shutil.rmtree(self._metrics, ignore_errors=True)
        self._metrics.mkdir(parents=True)
        forget_tables(self._state.path)
        self._peers = Peers(self._state.path)
        self._peers.clear()
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._due: dict[int, float] = {}
        self._failures, self._lived, self._served = 0, False, False
        self._begun: dict[int, float] = {}  # remembered, as somebody may clean the folder up
        self._mistake: str | None = None
        self._stop = threading.Event()
        self._log = logs.logger()

    @property
    def http_port(self) -> int:
        """The port that is listened at."""
        return self._listener.getsockname()[1]

    @property
    def pids(self) -> list[int]:
        """Of the workers."""
        return [process.pid for process in self._workers.values()]

    def run(self) -> int:
        """Runs until SIGTERM or SIGINT; 0 if all workers ended in time, 1 also if none can be started.

        Raises:
          ValueError: if workers find that the command line is wrong.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        try:
            for slot in range(self._config.workers):
                self._start(slot)
            self._log.info(
                "listening",
                extra={"http_port": self.http_port, "grpc_port": self.grpc_port, "workers": self.pids},
            )
            while not self._stop.wait(0.05):
                self._remember()
                self._restart_dead()
                if self._mistake is not None:
                    # Once a worker served it is a passing one, as of a package that is being replaced.
                    if not self._served and not self._serves:
                        self._end()
                        raise ValueError(self._mistake)
                    self._mistake = None  # a worker that finds it again says so again
                if self._failures >= _HOPELESS and not self._any_serves:
                    self._log.error(
                        "giving up: every worker dies when it starts, or cannot be started; what was printed says why"
                    )
                    self._end()
                    return 1
            return self._end()
        finally:
            self._end()  # those that are left, should something else have failed
            if self._grpc_holder is not None:
                self._grpc_holder.close()
            self._state.close()

    @property
    def _any_serves(self) -> bool:
        """Whether a worker ever lived long, or has a version to serve: one that does is not ended for another's sake."""
        now = time.monotonic()
        self._lived |= any(
            process.poll() is None and self._is_healthy(process.pid, now) for process in self._workers.values()
        )
        return self._lived or self._serves

    def _is_healthy(self, pid: int, now: float) -> bool:
        """To find out that it cannot begin may take a worker long, and is no life."""
        return pid in self._begun and now - self._begun[pid] > _HEALTHY_SECONDS

    @property
    def _serves(self) -> bool:
        """Whether a worker has a version to serve."""
        try:
            return bool(self._peers.look())
        except OSError:  # it cannot be told, and one may
            return True

    def _remember(self) -> None:
        """Of workers that die, that one of them served."""
        if not self._served:
            self._served = bool(self._peers.others())

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def _start(self, slot: int) -> None:
        descriptor = self._listener.fileno()
        port = -1 if self.grpc_port is None else self.grpc_port
        # Without -P, what lies in the working folder is taken for packages of the same names, in a clone ours.
        command = [sys.executable, "-P", "-m", "jaxembed.serve.server.worker"]
        command += [str(descriptor), str(port), str(os.getpid()), str(slot)]
        environment = {
            **os.environ,
            "PROMETHEUS_MULTIPROC_DIR": str(self._metrics),
            CONFIG_VARIABLE: self._config.to_json(),
            # What XLA sizes its threads by; there is no option for it.
            "NPROC": str(self._config.threads or cores_of_worker(self._config.workers)),
        }
        self._workers[slot] = subprocess.Popen(
            command, pass_fds=[descriptor], env=environment, start_new_session=True
        )

    def _restart_dead(self) -> None:
        waited = set(self.pids) - self._begun.keys()
        self._begun |= {pid: time.monotonic() for pid in waited if self._peers.has_begun(pid)}
        for slot, process in list(self._workers.items()):
            if process.poll() is None:
                continue
            if slot not in self._due:
                now = time.monotonic()
                lived = self._is_healthy(process.pid, now)
                self._begun.pop(process.pid, None)
                with contextlib.suppress(OSError):  # else before the next one starts
                    self._forget(slot, process.pid)
                self._lived |= lived
                self._failures = 0 if lived else self._failures + 1
                # One that lived is replaced at once, one that dies young more and more slowly.
                delay = min(
                    0.0 if self._failures <= 1 else 0.5 * 2 ** min(self._failures, 10), _SLOWEST_RESTART
                )
                self._due[slot] = now + delay
                self._log.error(
                    "a worker died", extra={"worker": process.pid, "status": process.returncode, "delay": delay}
                )
            if time.monotonic() >= self._due[slot]:
                try:
                    self._forget(slot, process.pid)
                    if process.returncode == MISTAKE_STATUS:
                        self._mistake = (self._state.path / MISTAKE).read_text("utf-8")
                        self._log.error("the command line is wrong", extra={"reason": self._mistake})
                    self._start(slot)
                    del self._due[slot]
                except OSError as e:
                    if e.errno not in _LACKS:  # it may be so for good
                        self._failures += 1
                    self._due[slot] = time.monotonic() + _RETRY_SECONDS
                    self._log.error(
                        "a worker cannot be started", extra={"reason": str(e), "delay": _RETRY_SECONDS}
                    )

    def _forget(self, slot: int, pid: int) -> None:
        from prometheus_client import multiprocess

        multiprocess.mark_process_dead(slot, str(self._metrics))
        self._peers.forget(pid)

    def _end(self) -> int:
        self._listener.close()  # the workers' last one decides when connections are refused
        for process in self._workers.values():
            if process.poll() is None:
                process.terminate()
        config, late = self._config, 0
        until = time.monotonic() + config.drain_grace + config.drain_timeout + ENDING_SECONDS
        for process in self._workers.values():
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                late += 1
        return 1 if late else 0


def _listen(config: ServerConfig) -> tuple[socket.socket, socket.socket | None]:
    """A socket that listens for HTTP, and one that holds the port of gRPC."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(listener, "--http-port", config.host, config.http_port)
        listener.listen(_BACKLOG)
        return listener, _reserve(config, family)
    except OSError:
        listener.close()
        raise


def _reserve(config: ServerConfig, family: socket.AddressFamily) -> socket.socket | None:
    """Has a port that gRPC of all workers can share; the socket is bound, but never listens."""
    if config.grpc_port is None:
        return None
    # Another server would share the port as the workers do, and answer some of the requests.
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(probe, "--grpc-port", config.host, config.grpc_port)
    holder = socket.socket(family)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    _bind(holder, "--grpc-port", config.host, config.grpc_port)
    return holder


def _bind(bound: socket.socket, flag: str, host: str, port: int) -> None:
    try:
        bound.bind((host, port))
    except OSError as e:
        bound.close()
        raise OSError(f"cannot listen at {host} port {port}: {e.strerror}; pass another {flag}.") from e
