"""How long a serving bundle takes to open, and what memory of its own that costs, beside other readers.

python benchmarks/bundle_open.py                  # one table of 2 GiB
python benchmarks/bundle_open.py --rows 100000    # smaller

Each reader runs in processes of their own, first one, then four at once, on files that are in the page cache.
"ms first" is the first open of a process until a JAX array on CPU can be used, "ms again" the median of later
ones. "private MB" is by how much the process's private dirty memory grows, "four, MB" what four processes that
have read every page take together, their shared pages counted once. Exits with 1 if the bundle misses 50 ms or
50 MB, or four processes hold more than one copy.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

DIM = 128
READERS = ("jaxembed bundle", "jaxembed bundle, verified", "safetensors load_file", "orbax restore")
LIMIT_SECONDS, LIMIT_BYTES = 0.05, 50e6


def main() -> int:
    """Measures every reader in a process of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2**22, help="of the table, of 128 float32 each")
    parser.add_argument("--only", nargs="*", choices=READERS, default=READERS)
    parser.add_argument("--json", action="store_true", help="print that instead of a table")
    parser.add_argument("--child", nargs=2, metavar=("READER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], pathlib.Path(options.child[1]))
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_bundle(folder / "bundles", options.rows)
        if "orbax restore" in options.only:
            _run([sys.executable, __file__, "--child", "save for orbax", str(folder)])
        for reader in options.only:
            (alone,), together = _measure(reader, folder, 1), _measure(reader, folder, 4)
            results[reader] = {**alone, "four": sum(found["all"] for found in together)}
    size = options.rows * DIM * 4
    if options.json:
        print(json.dumps({"bytes": size, "readers": results}))
    else:
        print(f"{size / 1e6:,.0f} MB of rows\n")
        print("| reader | ms first | ms again | private MB | four, MB |\n|---|---|---|---|---|")
        for reader, found in results.items():
            print(
                f"| {reader} | {found['first'] * 1e3:,.1f} | {found['again'] * 1e3:,.1f} "
                f"| {found['private'] / 1e6:,.1f} | {found['four'] / 1e6:,.0f} |"
            )
    ours = results.get(READERS[0])
    if ours is None:
        return 0
    fits = ours["first"] < LIMIT_SECONDS and ours["private"] < LIMIT_BYTES
    return int(not fits or ours["four"] > size + 4 * LIMIT_BYTES)


def write_bundle(out: pathlib.Path, rows: int) -> None:
    """A bundle of one table of random rows, written by blocks, as `convert_to_bundle` lays it out."""
    import numpy as np

    from jaxembed import FeatureConfig, TableConfig
    from jaxembed.checkpoint import digest_arrays, layout
    from jaxembed.checkpoint.safetensors_file import header_of, map_tensors
    from jaxembed.serialization import feature_config_to_json

    file = out / "1" / "tables" / "00000.safetensors"
    file.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with open(file, "xb") as f:
        f.write(header_of({"rows": (np.dtype(np.float32), (rows, DIM))}))
        for start in range(0, rows, 1 << 15):
            f.write(rng.random((min(1 << 15, rows - start), DIM), np.float32).tobytes())
        f.flush()
        # Pages that are not on the disk yet would count as dirty memory of who maps them.
        os.fsync(f.fileno())
    config = {"x": FeatureConfig(TableConfig(rows, DIM, name="t"))}
    (digests,) = digest_arrays([map_tensors(file)["rows"]])
    manifest = {
        "format": "jaxembed-bundle",
        "version": layout.VERSION,
        "step": 1,
        "feature_config": feature_config_to_json(config),
        "metadata": {},
        "tables": {"t": {"file": "tables/00000.safetensors", "rows": digests.to_json()}},
        "base": None,
        "model": None,
    }
    (out / "1" / "manifest.json").write_text(json.dumps(layout.seal(manifest)))


def child(reader: str, folder: pathlib.Path) -> None:
    """One process: opens the table, asserts what is asserted of it, and waits until all have read every page."""
    import jax
    import numpy as np

    device = jax.devices()[0]
    jax.device_put(np.zeros(1), device).block_until_ready()
    opened = _opener(reader, folder)
    if opened is None:
        return
    before, seconds = _memory(), []
    table = host = None
    for _ in range(1 if reader.startswith("orbax") else 6):
        del table, host
        since = time.perf_counter()
        host = opened()
        table = jax.device_put(host, device)
        table.block_until_ready()
        seconds.append(time.perf_counter() - since)
    if reader.startswith("jaxembed") and table.unsafe_buffer_pointer() != host.ctypes.data:
        raise SystemExit("the table was copied.")
    private = _memory()["Private_Dirty"] - before["Private_Dirty"]
    total = sum(float(np.asarray(table[i : i + 1]).sum()) for i in (0, table.shape[0] // 2, table.shape[0] - 1))
    assert np.isfinite(total)
    # Every page of it, so that memory that four processes share is seen to be shared.
    np.add.reduce(host.reshape(-1).view(np.uint32)[:: 4096 // 4])
    print(
        json.dumps(
            {"first": seconds[0], "again": statistics.median(seconds[1:] or seconds), "private": private}
        )
    )
    sys.stdout.flush()
    sys.stdin.readline()
    after = _memory()
    print(after["Pss"] - before["Pss"], flush=True)
    sys.stdin.readline()


def _opener(reader: str, folder: pathlib.Path):
    path = folder / "orbax"
    if reader.startswith("jaxembed"):
        from jaxembed.checkpoint import open_bundle

        def ours():
            bundle = open_bundle(folder / "bundles")
            if reader.endswith("verified"):
                bundle.verify()
            return bundle.tables["t"]

        return ours
    if reader.startswith("safetensors"):
        from safetensors.numpy import load_file

        return lambda: load_file(folder / "bundles" / "1" / "tables" / "00000.safetensors")["rows"]
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        if reader.startswith("save"):
            from jaxembed.checkpoint import open_bundle

            checkpointer.save(path, {"t": open_bundle(folder / "bundles").tables["t"]})
            return None
    return lambda: ocp.PyTreeCheckpointer().restore(path)["t"]


def _measure(reader: str, folder: pathlib.Path, count: int) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--child", reader, str(folder)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment())
        for _ in range(count)
    ]
    found = [json.loads(process.stdout.readline() or "{}") for process in children]
    if not all(found):
        raise SystemExit(f"{reader} failed.")
    for process, result in zip(children, found, strict=True):
        process.stdin.write("\n")
        process.stdin.flush()
        result["all"] = int(process.stdout.readline())
    for process in children:
        process.communicate("\n")
    return found


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, env=_environment())


def _environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def _memory() -> dict[str, int]:
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}


if __name__ == "__main__":
    sys.exit(main())
