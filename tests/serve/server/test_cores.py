"""The cores of a container, as its control groups limit them."""

import math
import os
import sys

import pytest

from jaxembed.serve.server import cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

V1 = "12:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n"


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        # A group's is that of those in it, too.
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 50000", "a/cpu.max": "300000 100000"}, 2),
        ("0::/docker/a\n", {"cpu.max": "300000 100000"}, 3),  # the path on the host
        ("0::/../a\n", {"cpu.max": "300000 100000"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu/docker/a/cpu.cfs_quota_us": "-1\n", "cpu/docker/a/cpu.cfs_period_us": "100000\n"}, math.inf),
        (V1 + "0::/\n", {"cpu/docker/a/cpu.cfs_quota_us": "5", "cpu/docker/a/cpu.cfs_period_us": "1"}, 5),
        (None, {"cpu.max": "200000 100000\n"}, math.inf),
    ],
)
def test_limits_of_containers(tmp_path, monkeypatch, groups, files, limit):
    process, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    if groups is not None:
        process.write_text(groups)
    for name, text in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text)
    monkeypatch.setattr(cores, "_PROCESS", process)
    monkeypatch.setattr(cores, "_MOUNTED", mounted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    usable = min(limit, 16)
    assert [cores.cores_of_worker(workers) for workers in (1, 2, 100)] == [usable, max(usable // 2, 1), 1]
