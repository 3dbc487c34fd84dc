"""Says what this machine and this installation give: devices, kernel, versions, memory, extras.

jaxembed doctor

Exits with 1 if the core does not work here; what an extra lacks is only shown.
"""

import argparse
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Iterator

_VERSIONS = ("jaxembed", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu")
_CGROUP_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
#: Without a limit, the first version of cgroups tells a number near this one.
_NO_LIMIT = 1 << 62
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*;.*\bextra\s*==\s*['\"]([^'\"]+)['\"]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `jaxembed doctor`: none."""


def run(options: argparse.Namespace) -> int:
    """Prints what it finds; 1 if a lookup does not give what it must."""
    print(
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    )
    print(", ".join(f"{name} {_version(name) or 'missing'}" for name in _VERSIONS))
    for line in memory_lines():
        print(line)
    fault = _core()
    print(f"core: {fault or 'works'}")
    for line in missing_lines():
        print(line)
    return 1 if fault else 0


def memory_lines(root: pathlib.Path = pathlib.Path("/")) -> Iterator[str]:
    """The machine's memory and the control group's limit, where they are known."""
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        yield f"memory: {_gib(1024 * int(fields['MemTotal'].split()[0]))}"
    except (OSError, KeyError, ValueError):
        yield "memory: unknown"
    for name in _CGROUP_LIMITS:
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        limited = text.isdecimal() and int(text) < _NO_LIMIT
        yield f"memory limit of the control group: {_gib(int(text)) if limited else 'none'}"


def missing_lines() -> Iterator[str]:
    """A line for each extra: what it lacks, and the command that installs it."""
    extras: dict[str, set[str]] = {}
    for requirement in importlib.metadata.requires("jaxembed") or ():
        found = _REQUIREMENT.match(requirement)
        if found and not found[1].startswith("jaxembed"):
            extras.setdefault(found[2], set()).add(re.split(r"[\[<>=!~ ]", found[1])[0])
    for extra, packages in sorted(extras.items()):
        missing = sorted(package for package in packages if _version(package) is None)
        if missing:
            yield f"extra {extra}: missing {', '.join(missing)}; pip install 'jaxembed[{extra}]'"
        else:
            yield f"extra {extra}: complete"


def _core() -> str | None:
    """What is wrong with the core, or None; prints devices and kernel on the way."""
    try:
        import jax
        import numpy as np

        import jaxembed as je
        from jaxembed import bag_native

        kinds = [f"{device.platform} {device.device_kind}" for device in jax.devices()]
        print("devices: " + ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)))
        reason = bag_native.unavailable_reason()
        print(f"kernel: {f'plain JAX, as {reason}' if reason else f'native ({bag_native.library()})'}")
        print(f"vector instructions of this processor: {_vectors()}")
        with je.use_backend("xla" if reason else "auto"):
            table = je.TableConfig(vocabulary_size=4, dim=2, combiner="sum", name="doctor")
            rows = np.arange(8, dtype=np.float32).reshape(4, 2)
            ids = {"x": je.RaggedTensor.from_lists([[0, 1], [3]])}
            features = {"x": je.FeatureConfig(table=table)}
            found = np.asarray(je.serving_embedding_lookup(ids, None, {table: rows}, features)["x"])
        if not np.array_equal(found, np.asarray([[2.0, 4.0], [6.0, 7.0]])):
            return f"a lookup gave {found.tolist()} for [[2, 4], [6, 7]]; reinstall jaxembed and jax"
    except Exception as e:
        # Whatever is broken is what this command is for.
        return f"{type(e).__name__}: {e}"
    return None


def _vectors() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    flags = set(re.findall(r"\w+", next((x for x in text.splitlines() if x.startswith("flags")), "")))
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"} <= flags:
        return "x86-64-v4 (AVX-512)"
    return "x86-64-v3 (AVX2)" if {"avx2", "fma", "bmi2"} <= flags else "baseline"


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
