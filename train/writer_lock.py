"""One process at a time writes to a folder of checkpoints; however it ends, the kernel gives its lock back."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import threading
import warnings

import jax

from .hosts import from_first_process

FILE = ".writer"
_HELD_BY_OTHERS = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)

_mutex = threading.Lock()
#: Device and inode of a locked file to its descriptor and how many have it; those of one process share it.
_held: dict[tuple[int, int], tuple[int, int]] = {}


def _leave_to_parent() -> None:
    """A child that was forked, as a worker of a data loader, would keep the lock after its parent was killed."""
    global _mutex
    _mutex = threading.Lock()  # another thread of the parent may have had it
    while _held:
        _, (descriptor, _) = _held.popitem()
        os.close(descriptor)


os.register_at_fork(after_in_child=_leave_to_parent)


def claim(directory: pathlib.Path) -> "WriterLock | None":
    """The lock, on process 0 of the job; all of its processes call this.

    Raises:
      ValueError: on all of them, if another process writes there.
      OSError: if the file cannot be made.
    """
    lock = error = None
    if jax.process_index() == 0:
        try:
            lock = WriterLock(directory)
        except (ValueError, OSError) as e:
            error = e
    # All stop, or none: they would wait for each other.
    said = from_first_process(None if error is None else str(error))
    if said is not None:
        raise error or ValueError(said)
    return lock


class WriterLock:
    """This process's right to write to `directory`, until it is released.

    The lock is `flock`'s, on a file that stays: it says who was the last to take it. Where the file system has no
    locks, a warning says so.

    Args:
      directory: that exists.

    Raises:
      ValueError: if another process writes there.
      OSError: if the file cannot be made.
    """

    def __init__(self, directory: pathlib.Path):
        self._key: tuple[int, int] | None = None
        descriptor = _open(directory / FILE)
        status = os.fstat(descriptor)
        key = status.st_dev, status.st_ino
        with _mutex:
            if key in _held:
                os.close(descriptor)
                descriptor, count = _held[key]
            else:
                count = 0
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as e:
                    writer = _writer(descriptor)
                    os.close(descriptor)
                    if e.errno in _HELD_BY_OTHERS:
                        raise ValueError(
                            f"{directory} is being written to by {writer}. Wait until it has ended or end it, or take "
                            f"another folder (another `out` of a training job).{_if_gone(writer, directory / FILE)}"
                        ) from e
                    warnings.warn(
                        f"{directory / FILE} cannot be locked ({e.strerror}): make sure yourself that no other process "
                        "writes there.",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    return
                # Only for the message of the next one: a full disk is no reason to refuse here.
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            _held[key] = descriptor, count + 1
        self._key = key

    @property
    def is_shared(self) -> bool:
        """Whether others of this process have it, too."""
        with _mutex:
            return self._key in _held and _held[self._key][1] > 1

    def release(self) -> None:
        """Gives it back, once the last of this process that has it does."""
        with _mutex:
            key, self._key = self._key, None
            if key not in _held:
                return
            descriptor, count = _held.pop(key)
            if count > 1:
                _held[key] = descriptor, count - 1
            else:
                os.close(descriptor)


def _open(file: pathlib.Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # NFS locks only what is open for writing.
        return os.open(file, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:  # another user's, in a folder of both
        return os.open(file, os.O_RDONLY | flags)


def _if_gone(writer: str, file: pathlib.Path) -> str:
    """What to do about the lock of a machine that is no more: some file servers keep it."""
    if writer.endswith(f" on {socket.gethostname()}"):
        return ""
    return f" If its machine is gone for good, as a preempted one is, and no other writes there, remove {file}."


def _writer(descriptor: int) -> str:
    """Who took the lock last, as far as the file says it and that process may still live."""
    with contextlib.suppress(OSError, ValueError):
        pid, host = os.pread(descriptor, 1024, 0).decode().split()
        if host == socket.gethostname():
            with contextlib.suppress(PermissionError):  # another user's, which lives
                os.kill(int(pid), 0)
        return f"process {int(pid)} on {host}"
    return "another process"
