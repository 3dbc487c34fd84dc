"""Files and folders that are written beside their place and renamed, so that what has a name is whole."""

import contextlib
import errno
import fcntl
import os
import pathlib
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator

from jaxembed.checkpoint.digests import digest_bytes
from jaxembed.checkpoint.files import is_writing, sync_folder

PREFIX = ".writing-"
#: Of what comes after the prefix, in bytes; then come a number and the host.
MAX_NAME = 150
#: In a path, for the names of files below it.
ROOM = 600
#: A folder that is being made is not locked yet.
GRACE_SECONDS = 60
#: Without a change in it, before a folder of another host is taken for abandoned.
OTHERS_SECONDS = 7 * 24 * 3600
#: What file systems say that have no hard links, or none from folder to folder.
_NO_LINKS = (
    *(errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS),
    *(errno.EMLINK, errno.EXDEV),
)


@contextlib.contextmanager
def scratch_folder(parent: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """A new folder below `parent`, to be renamed once it is whole; what is left of it is removed.

    A process that is killed leaves its folder behind, and the next one of its host to write here removes it: it takes the
    lock, which the kernel gave back. Where the file system has no locks, it stays. That of another host, whose locks this one
    may not see, goes once nothing in it has changed for a week. What `replace_file` left goes by its age.
    Folders above it that were made for it and are empty in the end go, too.

    Raises:
      OSError: if it cannot be made.
    """
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    # Not the process's number, which in a container is that of the process killed there before.
    folder, lock = parent / f"{PREFIX}{_short(name)}-{secrets.token_hex(8)}{_of_host()}", None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for other in parent.glob(f"{PREFIX}*"):
            _remove_if_abandoned(other)
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def publish(scratch: pathlib.Path, place: pathlib.Path, taken: Exception) -> None:
    """Gives what is whole its name, on the disk, and replaces nothing that has it.

    Args:
      scratch: the file or folder, in the file system of `place`.
      place: its name, which was free when the caller looked.
      taken: what to raise if it is not any more.

    Raises:
      OSError: if it cannot be renamed.
    """
    try:
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
        if scratch.is_dir():
            # Of what may come in between it replaces an empty folder alone.
            os.rename(scratch, place)
        else:
            _rename_file(scratch, place)
    except OSError as e:
        if os.path.lexists(place):
            raise taken from e
        raise
    sync_folder(place.parent)


def check_place(place: pathlib.Path) -> None:
    """Whether there can be a new file or folder at `place`, before anything is read or written.

    Raises:
      ValueError: if it would lie below what is no folder, or a name in it is too long.
      OSError: if nothing can be written there.
    """
    folder = next(path for path in place.parents if os.path.lexists(path))
    if not folder.is_dir():
        what = "a symbolic link to nothing" if folder.is_symlink() and not folder.exists() else "no folder"
        raise ValueError(f"{folder} is {what}, so nothing can be written at {place}; pass another path.")
    limit = os.pathconf(folder, "PC_NAME_MAX")
    for name in place.relative_to(folder).parts:
        length = len(os.fsencode(name))
        if length > limit:
            raise ValueError(
                f"{name[:40]!r}... is too long a name for a file: {length} bytes of at most {limit}; pass another path."
            )
    length, limit = len(os.fsencode(place)), os.pathconf(folder, "PC_PATH_MAX") - ROOM
    if length > limit:
        raise ValueError(
            f"{str(place)[:40]!r}... is too long a path: {length} bytes of at most {limit}; pass another path."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        reason = errno.EROFS if is_read_only else errno.EACCES
        raise OSError(reason, os.strerror(reason), str(folder))


def _rename_file(scratch: pathlib.Path, place: pathlib.Path) -> None:
    try:
        os.link(scratch, place)  # replaces nothing, where os.rename would
    except OSError as e:
        if e.errno not in _NO_LINKS or os.path.lexists(place):
            raise
        os.rename(scratch, place)
    else:
        with contextlib.suppress(OSError):  # the file has its name
            scratch.unlink()


def _short(name: str) -> str:
    """Such that a name of any length has a folder of its own."""
    return name if len(os.fsencode(name)) <= MAX_NAME else digest_bytes(os.fsencode(name))


def _of_host() -> str:
    """The end of the names of folders that this host makes."""
    return f"@{socket.gethostname()[:64]}"


def _last_change(folder: pathlib.Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _remove_if_abandoned(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        status = path.lstat()
        age = time.time() - status.st_mtime
        if stat.S_ISREG(status.st_mode):
            # A file has no lock: `replace_file` has it for a moment, but the clock of a file server may be another.
            if is_writing(path.name) and age > 60 * GRACE_SECONDS:
                path.unlink()
            return
        if age < GRACE_SECONDS or "@" not in path.name:
            return
        if not path.name.endswith(_of_host()) and time.time() - _last_change(path) < OTHERS_SECONDS:
            return
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
