"""Time and memory of conversions between formats, each in a process of its own.

python benchmarks/convert.py                  # a table of 1 GiB: from a checkpoint into each format, and back
python benchmarks/convert.py --rows 100000    # smaller

Memory is the peak of the process's own pages, without those of mapped files, above what it had before.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

DIM = 128
FORMATS = {
    "npy": "arrays",
    "npz": "a.npz",
    "safetensors": "a.safetensors",
    "torchrec": "a.pt",
    "tensorflow": "tf",
    "saved-model": "model",
}


def main() -> int:
    """Converts a made-up table into every format and back, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2**21, help="of the table, of 128 float32 each")
    parser.add_argument("--formats", nargs="*", choices=[*FORMATS], default=[*FORMATS])
    parser.add_argument("--child", nargs=4, metavar=("SOURCE", "OUT", "FROM", "TO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(convert_here(*options.child)))
        return 0
    size = options.rows * DIM * 4
    print("| from | to | seconds | GB/s | peak MB |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_table(folder / "t.npy", options.rows)
        show("npy", "jaxembed", size, run(folder / "t.npy", folder / "ckpt", "npy", "jaxembed"))
        (folder / "t.npy").unlink()
        for form in options.formats:
            out = folder / FORMATS[form]
            show("jaxembed", form, size, run(folder / "ckpt", out, "jaxembed", form))
            if form != "saved-model":
                show(form, "jaxembed", size, run(out, folder / "back", form, "jaxembed"))
            shutil.rmtree(folder / "back", ignore_errors=True)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    return 0


def make_table(file: pathlib.Path, rows: int) -> None:
    """Writes [rows, DIM] random float32."""
    table = np.lib.format.open_memmap(file, "w+", np.float32, (rows, DIM))
    rng = np.random.default_rng(0)
    for start in range(0, rows, 1 << 14):
        table[start : start + (1 << 14)] = rng.normal(size=table[start : start + (1 << 14)].shape)


def show(source: str, target: str, size: int, found: dict[str, float]) -> None:
    """Prints one row of the table."""
    rate = size / found["seconds"] / 1e9
    print(
        f"| {source} | {target} | {found['seconds']:.1f} | {rate:.2f} | {found['peak'] / 1e6:.0f} |", flush=True
    )


def run(source: pathlib.Path, out: pathlib.Path, source_format: str, target_format: str) -> dict[str, float]:
    """Converts in a process of its own."""
    command = [sys.executable, __file__, "--child", str(source), str(out), source_format, target_format]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def convert_here(source: str, out: str, source_format: str, target_format: str) -> dict[str, float]:
    """Converts, and says how long it took and how much memory."""
    from jaxembed.convert import convert

    # What the libraries take by themselves is no part of it.
    for package in {"torchrec": ["torch"], "tensorflow": ["tensorflow"], "saved-model": ["tensorflow"]}.get(
        target_format if source_format == "jaxembed" else source_format, []
    ):
        __import__(package)
    before, peak, done = own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    since = time.perf_counter()
    convert(source, out, source_format=source_format, target_format=target_format)
    seconds = time.perf_counter() - since
    done.set()
    watcher.join()
    return {"seconds": seconds, "peak": peak - before}


def own_bytes() -> int:
    """Resident memory of this process that is of no file."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this needs Linux's /proc")


if __name__ == "__main__":
    sys.exit(main())
