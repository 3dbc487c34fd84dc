"""Says what this machine and this installation give: devices, kernel, versions, memory, extras.

jaxembed doctor

Exits with 1 if the core does not work here; what an extra lacks is only shown, whatever the version of what is there.
Where `import jaxembed` fails, as without jaxlib, no command starts: Python shows why.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from jaxembed.control_groups import memory_limits

_VERSIONS = ("jaxembed", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu")
_INSTRUCTIONS = {"v4": "x86-64-v4 (AVX-512)", "v3": "x86-64-v3 (AVX2)"}
#: What requirements of ours depend on, by its name in markers.
_SYSTEM = {"sys_platform": sys.platform, "platform_machine": platform.machine(), "os_name": os.name}
_CONDITION = re.compile(r"(\w+)\s*==\s*['\"]([^'\"]+)['\"]")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?[^;]*;(.*)\bextra\s*==\s*['\"]([^'\"]+)['\"]\s*$")


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
    for limit in memory_limits(root):
        yield f"memory limit of the control group: {'none' if limit is None else _gib(limit)}"


def missing_lines() -> Iterator[str]:
    """A line for each extra: what it lacks, and the command that installs it."""
    for extra in sorted({extra for *_, extra in _requirements("jaxembed")}):
        missing = sorted(package for package in _packages(extra) if _version(package) is None)
        if missing:
            yield f"extra {extra}: missing {', '.join(missing)}; pip install 'jaxembed[{extra}]'"
        else:
            yield f"extra {extra}: complete"


def _packages(extra: str) -> set[str]:
    """Those that an extra of ours needs on this system."""
    found: set[str] = set()
    for package, further, rest, of in _requirements("jaxembed"):
        conditions = _CONDITION.findall(rest)
        if of != extra or any(_SYSTEM.get(name, value) != value for name, value in conditions):
            continue
        wanted = (further or "").split(",")
        if package == "jaxembed":
            found.update(*map(_packages, wanted))
            continue
        # As `jax[tpu]` needs libtpu. What others need on some systems only is not looked at.
        found.add(package)
        found |= {name for name, _, rest, of in _requirements(package) if of in wanted and not rest.strip()}
    return found


def _requirements(package: str) -> Iterator[tuple[str, str | None, str, str]]:
    """Of the extras of a package that is installed: name, its own extras, what else must hold, and of which extra it is."""
    if _version(package) is not None:
        for requirement in importlib.metadata.requires(package) or ():
            found = _REQUIREMENT.match(requirement)
            if found:
                yield found[1], found[2], found[3], found[4]


def _core() -> str | None:
    """What is wrong with the core, or None; prints devices and kernel on the way."""
    try:
        import jax
        import numpy as np

        import jaxembed as je
        from jaxembed import kernel

        kinds = [f"{device.platform} {device.device_kind}" for device in jax.devices()]
        print("devices: " + ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)))
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit:
            print(f"memory of a device: {_gib(limit)}")
        reason = kernel.unavailable_reason()
        print(f"kernel: {f'plain JAX, as {reason}' if reason else f'native ({kernel.library()})'}")
        if not reason:
            chosen = kernel.instruction_set() or "unknown"
            print(f"instructions of the kernel: {_INSTRUCTIONS.get(chosen, chosen)}")
        with warnings.catch_warnings(action="ignore"):  # the line above says so
            print(f"lookups on CPU: {je.backend()}; training engine: {_engine(jax.devices()[0])}")
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


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engine(device: Any) -> str:
    """What `engine="auto"` takes on such devices."""
    if importlib.util.find_spec("jaxembed.train") is None:
        return "none, without jaxembed.train"
    # Named, not imported: the core imports no training.
    cores = importlib.import_module("jaxembed.train.engines.sparsecore_stacks").sparse_cores("auto", device)
    return f"sparsecore ({cores} a device)" if cores else "xla"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
