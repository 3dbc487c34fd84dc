"""StateFolder: the folder that the workers of one server share. One server has it at a time."""

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import tempfile
import time

from . import logs

_LOCK = "server.lock"
_PREFIX = "jaxembed-"
#: In the lock's file, behind the number of the process: the folder goes with it.
_TEMPORARY = b"temporary"
_HELD_BY_OTHERS = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
# Of a folder that is new, the lock may not be taken yet.
_GRACE_SECONDS = 60


class StateFolder:
    """This process's right to a folder, until it is closed; the kernel gives it back for a process that was killed.

    Args:
      path: None takes a new one, which goes with the server; those of servers that were killed are removed.
      room: bytes that must be free in it.

    Raises:
      ValueError: if it cannot be written, or another server has it.
      OSError: if it has no room.
    """

    def __init__(self, path: str | None, room: int):
        self._is_own = path is None
        if path is None:
            _remove_abandoned()
            path = tempfile.mkdtemp(prefix=_PREFIX)
        self.path: pathlib.Path = pathlib.Path(path).expanduser().absolute()
        check_writable("--state", self.path)
        self._lock = _lock(self.path, b"%d %s" % (os.getpid(), _TEMPORARY if self._is_own else b""))
        try:
            self._check_room(room)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Gives the folder back, or removes it."""
        if self._is_own:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _check_room(self, size: int) -> None:
        try:
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(bytes(size))
                file.flush()
        except OSError as e:
            raise OSError(
                f"the folder of the server's state, {self.path}, cannot be written: {e.strerror}; the server needs "
                f"{size >> 10:,} KiB there. Make room, or name another folder with --state."
            ) from e


def check_writable(flag: str, folder: pathlib.Path) -> None:
    """Raises:
    ValueError: if no file can be made in the folder that an option names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ValueError(f"{flag} {folder} cannot be written: {e.strerror}; name another folder.") from e


def _lock(folder: pathlib.Path, content: bytes) -> int:
    file = folder / _LOCK
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as e:
        raise ValueError(
            f"--state {folder} cannot be written: {e.strerror} ({_LOCK}); name another folder."
        ) from e
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in _HELD_BY_OTHERS:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").partition(" ")[0]
            os.close(descriptor)
            raise ValueError(
                f"--state {folder} is that of a server that runs (process {holder}); end that one, or name another folder."
            ) from e
        logs.logger().warning(
            "the folder of the state cannot be locked; make sure that no other server has it",
            extra={"folder": str(folder), "reason": e.strerror},
        )
    with contextlib.suppress(OSError):  # a full disk is told of elsewhere
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
    return descriptor


def _remove_abandoned() -> None:
    """Removes the folders without a name of servers that were killed: nobody holds their locks."""
    for folder in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another one's, or none of these
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                status = os.fstat(descriptor)
                is_ours = status.st_uid == os.getuid() and os.pread(descriptor, 100, 0).endswith(_TEMPORARY)
                if is_ours and time.time() - status.st_mtime > _GRACE_SECONDS:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)
