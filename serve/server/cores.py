"""Cores: how many this process may keep busy."""

import math
import os
import pathlib
import sys

_PROCESS = pathlib.Path("/proc/self/cgroup")
_MOUNTED = pathlib.Path("/sys/fs/cgroup")


def cores_of_worker(workers: int) -> int:
    """The share that one of so many workers has of the cores that this process may run on, at least 1.

    A container's limit of time on them counts as so many cores, rounded up: threads beyond it would be stopped for the
    rest of each period.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(int(min(cores, _limit())) // workers, 1)


def _limit() -> float:
    """Cores that the quotas of control groups, of version 1 and 2, make up; infinite without any."""
    limit = math.inf
    for line in _words(_PROCESS, "\n"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, read = _MOUNTED, _quota
        elif "cpu" in controllers.split(","):
            folder, read = _MOUNTED / "cpu", _quota_of_version_1
        else:
            continue
        # A container may see its path on the host, and its own group as the one that is mounted.
        group = pathlib.PurePath(path.lstrip("/"))
        for part in (group, *group.parents):
            limit = min(limit, read(folder / part))
    return limit if limit == math.inf else math.ceil(limit)


def _quota(folder: pathlib.Path) -> float:
    quota, period = _words(folder / "cpu.max") or ("max", "1")
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_of_version_1(folder: pathlib.Path) -> float:
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else math.inf


def _words(file: pathlib.Path, end: str | None = None) -> list[str]:
    try:
        return [word for word in file.read_text().split(end) if word]
    except OSError:  # no Linux, or not that version
        return []
