"""Memory that restoring a checkpoint takes, in processes of one device each, after a save from another mesh.

python benchmarks/restore_memory.py                  # 1 GiB of rows and 1 GiB of slots, 8 devices to 1, 1 to 8
python benchmarks/restore_memory.py --rows 100000    # smaller

Prints, for each restore, the peak of the resident memory of its largest process, beside what it may be: its
share of tables and slots, and 512 MB. Every row and slot is compared with what was saved. Exits with 1 if a
peak is above its bound.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

ALLOWANCE = 512e6
DIM = 128


def main() -> int:
    """Saves on one mesh, restores on the other, and prints the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2**21, help="of the table, of 128 float32 each")
    parser.add_argument("--devices", type=int, default=8, help="of the larger mesh")
    parser.add_argument("--json", action="store_true", help="print that instead of a table")
    parser.add_argument(
        "--child", nargs=4, metavar=("WHAT", "DIRECTORY", "INDEX", "ADDRESS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.child:
        what, directory, index, address = options.child
        child(what, pathlib.Path(directory), options.rows, options.devices, int(index), address)
        return 0
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for saved_on, restored_on in ((options.devices, 1), (1, options.devices)):
            directory = pathlib.Path(folder) / str(saved_on)
            _run("save", directory, options.rows, saved_on, 1)
            since = time.perf_counter()
            peaks = _run("restore", directory, options.rows, restored_on, restored_on)
            size = 2 * options.rows * DIM * 4
            results.append(
                {
                    "saved_on": saved_on,
                    "restored_on": restored_on,
                    "bytes": size,
                    "peak": max(peaks),
                    "bound": size / restored_on + ALLOWANCE,
                    "seconds": time.perf_counter() - since,
                }
            )
    if options.json:
        print(json.dumps(results))
    else:
        print(
            "| devices | tables and slots MB | peak MB of a process | share + 512 MB | seconds, whole process |"
        )
        print("|---|---|---|---|---|")
        for r in results:
            print(
                f"| {r['saved_on']} to {r['restored_on']} | {r['bytes'] / 1e6:,.0f} | {r['peak'] / 1e6:,.0f} "
                f"| {r['bound'] / 1e6:,.0f} | {r['seconds']:.1f} |"
            )
    return int(any(r["peak"] > r["bound"] for r in results))


def child(what: str, directory: pathlib.Path, rows: int, devices: int, index: int, address: str) -> None:
    """One process: saves from all devices, or restores its own share and prints its peak."""
    import jax
    import numpy as np

    if what == "restore" and devices > 1:
        jax.distributed.initialize(address, devices, index)
    from jaxembed import FeatureConfig, TableConfig
    from jaxembed.optimizers import Adagrad
    from jaxembed.train import Checkpointer, ShardedEmbedding

    config = {"x": FeatureConfig(TableConfig(rows, DIM, name="t"))}
    own = ShardedEmbedding(config, Adagrad(0.1), jax.make_mesh((devices,), ("d",)))
    with Checkpointer(directory, own) as checkpointer:
        if what == "save":
            ids = np.arange(rows)
            slots = {"t": {"accumulators": _values(ids, 1)}}
            checkpointer.save(own.from_canonical({"t": _values(ids, 0)}, slots, 1))
            return
        state = checkpointer.restore().state
        jax.block_until_ready(state)
    peak = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    (name, stack), *_ = own.stacks.items()
    for salt, array in enumerate((state.tables[name], state.slots[name]["accumulators"])):
        (shard,) = array.addressable_shards
        first = (shard.index[0].start or 0) // stack.num_rows
        ids = stack.share(stack.placements[0], first)
        found = np.asarray(shard.data)
        for low in range(0, len(ids), 1 << 16):
            part = ids[low : low + (1 << 16)]
            if not np.array_equal(found[low : low + len(part)], _values(np.asarray(part), salt)):
                raise SystemExit(f"array {salt} is not what was saved, from row {part[0]} on.")
    print(json.dumps({"peak": int(peak.split()[1]) * 1024}))


def _values(ids, salt: int):
    """Rows [N, D] that differ for every id, column and array."""
    import numpy as np

    return ((ids[:, None] * DIM + np.arange(DIM)) * 2 + salt).astype(np.uint32).view(np.float32)


def _run(what: str, directory: pathlib.Path, rows: int, devices: int, processes: int) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    local = devices // processes
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={local}",
    }
    command = [sys.executable, __file__, "--rows", str(rows), "--devices", str(devices), "--child", what]
    children = [
        subprocess.Popen([*command, str(directory), str(i), address], stdout=subprocess.PIPE, env=environment)
        for i in range(processes)
    ]
    outputs = [process.communicate()[0] for process in children]
    if any(process.returncode for process in children):
        raise SystemExit(f"{what} on {devices} devices failed.")
    return [json.loads(output.splitlines()[-1])["peak"] for output in outputs if output.strip()]


if __name__ == "__main__":
    sys.exit(main())
