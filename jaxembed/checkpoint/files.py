"""Regular files alone: what is read is no link, pipe or device, and what is written is on the disk."""

import os
import pathlib
import re
import secrets
import stat
from collections.abc import Iterable
from typing import Any

from jaxembed.checkpoint.digests import CheckpointError, digest_bytes


def open_regular(file: pathlib.Path) -> tuple[int, int]:
    """A descriptor to read from, and the size of the file.

    Raises:
      CheckpointError: if it cannot be opened, or is a link, a pipe or a folder.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise CheckpointError(f"{file} cannot be opened: {e.strerror}; it must be a regular file.") from e
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{file} must be a regular file.")
    return descriptor, status.st_size


def read_regular(file: pathlib.Path, max_bytes: int) -> bytes:
    """All of a file.

    Raises:
      CheckpointError: as `open_regular`, or if it is larger, cannot be read, or is a Git LFS pointer.
    """
    descriptor, size = open_regular(file)
    try:
        with open(descriptor, "rb") as f:
            if size > max_bytes:
                raise CheckpointError(f"{file} is too large: {size:,} bytes, of at most {max_bytes:,}.")
            content = f.read(size + 1)  # not of `max_bytes`, for which there may be no memory
    except OSError as e:
        raise CheckpointError(f"{file} cannot be read: {e.strerror}.") from e
    except MemoryError:
        raise CheckpointError(f"{file} is too large: there is no memory for {size:,} bytes.") from None
    if len(content) > size:
        raise CheckpointError(f"{file} grew while it was read.")
    refuse_pointer(file, content)
    return content


def absolute_path(path: str | pathlib.Path) -> pathlib.Path:
    """Absolute, with ~ for the user's home and without "..", which tensorstore refuses.

    What leads to a ".." is followed where it is a link, as the system does; the rest stays as it was named.
    """
    path = pathlib.Path(path).expanduser().absolute()
    parts = path.parts
    if ".." in parts:
        last = len(parts) - 1 - parts[::-1].index("..")
        path = pathlib.Path(os.path.realpath(pathlib.Path(*parts[: last + 1])), *parts[last + 1 :])
    return pathlib.Path("/", *path.parts[1:]) if path.root == "//" else path


def is_number(name: str) -> bool:
    """Whether a folder may be that of a step or version: "7", not "007"."""
    return name.isdecimal() and name == str(int(name))


def read_named(file: str | pathlib.Path, max_bytes: int) -> bytes:
    """All of a file that the user named, which may be a link, with ~ for the user's home.

    Raises:
      FileNotFoundError: if there is none.
      CheckpointError: as `read_regular`.
    """
    path = absolute_path(file)
    if not path.exists():
        raise FileNotFoundError(f"nothing is at {path}.")
    return read_regular(path.resolve(), max_bytes)


def refuse_pointer(file: pathlib.Path, start: bytes) -> None:
    """Raises:
    CheckpointError: if a file that starts so is a Git LFS pointer.
    """
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull`.")


def write_file(file: pathlib.Path, parts: Iterable[Any]) -> None:
    """Writes a new file through to the disk."""
    with open(file, "xb") as f:
        for part in parts:
            f.write(part)
        f.flush()
        os.fsync(f.fileno())


def is_writing(name: str) -> bool:
    """Whether `replace_file` gives such names to files that it is not done with."""
    return re.fullmatch(r"\.writing-[0-9a-f]{32}-[0-9a-f]{16}", name) is not None


def replace_file(file: pathlib.Path, content: bytes) -> None:
    """Writes a file that is whole, or stays what it was; a pipe or a device takes the content as it comes."""
    if file.exists() and not file.is_file():
        file.write_bytes(content)
        return
    file = file.resolve()  # a link stays one
    scratch = file.parent / f".writing-{digest_bytes(os.fsencode(file.name))}-{secrets.token_hex(8)}"
    try:
        write_file(scratch, [content])
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)


def disk_error(error: Exception, path: pathlib.Path) -> OSError | None:
    """What the system said of a disk, where tensorstore raises a ValueError of it; None of other errors."""
    found = re.search(r"(?:os_error_code='|OS error )(\d+)", str(error))
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])), str(path))


def sync_folder(folder: pathlib.Path) -> None:
    """Has the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
