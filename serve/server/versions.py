"""Versions: watches a folder of versions, and serves the newest, or the one it is pinned to.

A new version is verified and warmed up beside the one that serves, and takes its place between two requests;
a request stays with the version that it was packed for. A version that fails is reported, and the old one goes on; it
is tried again once it, or what it is a delta of, changes, and from time to time where other workers serve it.
"""

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable

from .config import ServerConfig
from .errors import OptionError, RequestError, unavailable
from .failures import Failures
from .metrics import Metrics
from .pace import Pace
from .peers import Peers
from .pin import Pin
from .served import BundleModel, ServedModel
from .version_folder import VersionFolder

Load = Callable[[ServerConfig, int, ServedModel | None], ServedModel]
# After the last request: until then, loading leaves the interpreter to others.
_BUSY_SECONDS = 1.0
# After which a version is tried again that other workers serve, and this one could not.
_RETRY_SECONDS = 10.0
#: Of the thread's name that loads.
LOADER = "jaxembed-load"


class Versions:
    """The versions of one folder.

    Args:
      config: of the server.
      metrics: told of every switch.
      load: makes a model of a version, on a thread; the third argument is the one that serves.
      peers: the other workers; without a pin, the first version is none below those that they serve.
    """

    def __init__(
        self, config: ServerConfig, metrics: Metrics, load: Load = BundleModel, peers: Peers | None = None
    ):
        self._config, self._metrics, self._load = config, metrics, load
        self._current: ServedModel | None = None
        self._identity: tuple[int, ...] | None = None
        self._peers = peers
        self._failures = Failures(config.directory)
        self._reported = ""
        self._thread = concurrent.futures.ThreadPoolExecutor(1, LOADER)
        self._turn, self._pinning = asyncio.Lock(), asyncio.Lock()
        self._loaded = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        if config.state:
            state = pathlib.Path(config.state)
        else:
            state = pathlib.Path(tempfile.mkdtemp(prefix="jaxembed-"))
            weakref.finalize(self, shutil.rmtree, state, ignore_errors=True)
        self._pin = Pin(state, metrics.log)

    @property
    def current(self) -> ServedModel | None:
        """The version that serves."""
        return self._current

    @property
    def failed(self) -> dict[int, str]:
        """Why versions cannot be served."""
        return self._failures.reasons

    @property
    def pinned(self) -> int | None:
        """The version that was asked for; None to follow the newest."""
        return self._pin.read()

    def available(self) -> dict[int, tuple[int, ...]]:
        """The versions in the folder, in rising order, and what tells a version from another of its number."""
        return self._read().versions

    def _read(self) -> VersionFolder:
        return VersionFolder.read(self._config.directory)

    def _survey(self) -> VersionFolder:
        folder = self._read()
        self._failures.look(folder)
        return folder

    def model(self, version: str | None = None) -> ServedModel:
        """The model for a request, of a version if it names one.

        Raises:
          RequestError: if nothing serves yet, or another version does.
        """
        if self._current is None:
            raise unavailable("no version is ready")
        if version and version != str(self._current.version):
            raise RequestError(404, f"version {version[:40]!r} is not served; {self._current.version} is.")
        return self._current

    async def start(self) -> None:
        """Loads the version to serve, and begins to watch the folder."""
        await self.look()
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def loaded(self) -> None:
        """Returns once a version serves."""
        await self._loaded.wait()

    async def stop(self) -> None:
        """Stops watching; what loads a version is left to itself."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def pin(self, version: int | None) -> None:
        """Serves `version` until told otherwise; None follows the newest again.

        This worker serves it on return; the others from their next look at the folder on, once they have loaded it.

        Raises:
          RequestError: if it is not there, cannot be served or not be written down; then nothing changes. Or if it
            is not served all the same, as another worker was told otherwise meanwhile.
        """
        async with self._pinning:
            before = self.pinned
            if version is not None and version not in self.available():
                raise RequestError(
                    404, f"there is no version {version}; versions are {list(self.available())}."
                )
            if version is not None:
                self._failures.forget(version)
            await self._write_pin(version)
            await self.look()
            if version is None:
                return
            if version in self.failed:
                if self.pinned == version:  # no other worker was told otherwise meanwhile
                    await self._write_pin(before)
                raise RequestError(409, f"version {version} cannot be served: {self.failed[version]}")
            if self._current is None or self._current.version != version:
                raise RequestError(
                    409,
                    f"version {version} is not served: it went, or another worker was told otherwise meanwhile. "
                    f"{self._pinned_now()}",
                )

    async def _write_pin(self, version: int | None) -> None:
        try:
            await asyncio.to_thread(self._pin.write, version)
        except OSError as e:
            raise RequestError(
                503,
                f"the version to serve cannot be written to the server's folder of state: {e.strerror}; make room "
                f"there, or make it writable, and send this again. {self._pinned_now()}",
                retry_after=1,
            ) from e

    def _pinned_now(self) -> str:
        pinned = self.pinned
        return "The newest version is followed." if pinned is None else f"Version {pinned} stays pinned."

    async def look(self) -> None:
        """Looks at the folder, and switches if there is reason to."""
        async with self._turn:
            folder = await asyncio.get_running_loop().run_in_executor(self._thread, self._survey)
            available = folder.versions
            pinned = self.pinned
            if pinned is not None:
                candidates = [pinned] if pinned in available else []
            else:
                # Never down by itself: a version that vanished may be served from the files that are mapped.
                lowest = self._floor() if self._current is None else self._current.version
                candidates = [version for version in available if version >= lowest][::-1]
            if self._current is None and not candidates:
                self._report("no version to serve yet", self._why_none(folder, pinned))
            else:
                self._report("the folder of the versions is not in order", folder.troubles())
            elsewhere = set() if self._peers is None else set(self._peers.others().values())
            for version in candidates:
                identity = available[version]
                if self._current is not None and (version, identity) == (self._current.version, self._identity):
                    return
                now = asyncio.get_running_loop().time()
                if self._failures.stands(version, identity, now, version in elsewhere):
                    continue
                if await self._switch(version, identity):
                    return

    def _floor(self) -> int:
        """The highest version that other workers serve; -1 for none."""
        return -1 if self._peers is None else max(self._peers.others().values(), default=-1)

    def _why_none(self, folder: VersionFolder, pinned: int | None) -> str:
        floor = self._floor()
        if pinned is not None:
            why = f"version {pinned} is pinned, and it is not there"
        elif floor >= 0:
            why = (
                f"other workers serve version {floor}, and neither that one nor a newer one is there; this worker "
                "takes no requests"
            )
        else:
            return folder.why_none()
        return "; ".join(text for text in (why, folder.troubles()) if text)

    def _report(self, what: str, reason: str) -> None:
        """Logs what is wrong with the folder, once."""
        if reason and reason != self._reported:
            extra = {"folder": str(self._config.directory), "reason": reason}
            self._metrics.log.warning(what, extra=extra)
        self._reported = reason

    async def _switch(self, version: int, identity: tuple[int, ...]) -> bool:
        loop, begin = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        old = self._current
        try:
            load = self._load_first if old is None else self._load_beside
            model = await loop.run_in_executor(self._thread, load, version, old)
        except Exception as e:
            # Less and less often where a version serves, which loading disturbs.
            tries = 0 if old is None else min(self._failures.tries(version, identity), 6)
            again = loop.time() + _RETRY_SECONDS * 2**tries
            if self._failures.add(version, identity, f"{type(e).__name__}: {e}", again):
                self._metrics.version_failed()
                self._metrics.log.error(
                    "a version cannot be served",
                    extra={"version": version, "reason": str(e) or type(e).__name__},
                    exc_info=None if isinstance(e, OptionError) else e,
                )
            return False
        self._current, self._identity = model, identity
        self._loaded.set()
        self._tell_peers(version)
        before = None if old is None else old.version
        del old
        gc.collect(0)  # until then, JAX keeps host memory that none of its arrays needs any more
        self._failures.forget(version)
        self._metrics.version(version)
        self._metrics.log.info(
            "version switched",
            extra={
                "from_version": before,
                "version": version,
                "seconds": round(loop.time() - begin, 3),
            },
        )
        return True

    def _tell_peers(self, version: int) -> None:
        if self._peers is not None:
            try:
                self._peers.serve(version)
            except OSError as e:
                extra = {"version": version, "reason": str(e)}
                self._metrics.log.warning("other workers cannot be told what this one serves", extra=extra)

    def _load_first(self, version: int, old: ServedModel | None) -> ServedModel:
        self._failures.begin(version)
        return self._load(self._config, version, old)

    def _load_beside(self, version: int, old: ServedModel | None) -> ServedModel:
        _step_back()
        with Pace(self._busy):
            return self._load_first(version, old)

    def _busy(self) -> bool:
        recent = self._metrics.recent
        return bool(recent) and time.time() - recent[-1][0] < _BUSY_SECONDS

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.poll_seconds)
            try:
                await self.look()
            except Exception as e:
                self._metrics.log.error("the folder cannot be looked at", exc_info=e)


def _step_back() -> None:
    """Lets the threads that serve go first; on Linux, priorities are those of threads, and inherited by new ones."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
