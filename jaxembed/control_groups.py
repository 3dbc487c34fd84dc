"""What Linux's control groups, as those of a container, leave of the machine."""

import pathlib
from collections.abc import Iterator

_MEMORY_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
#: Without a limit, the first version of cgroups tells a number near this one.
_NO_LIMIT = 1 << 62


def memory_limits(root: pathlib.Path = pathlib.Path("/")) -> Iterator[int | None]:
    """For each version of control groups that is there, the limit of memory in bytes, None where there is none."""
    for name in _MEMORY_LIMITS:
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        yield int(text) if text.isdecimal() and int(text) < _NO_LIMIT else None
