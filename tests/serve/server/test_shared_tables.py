"""Tables in memory: one copy for all workers and versions, given back with the last who uses it."""

import fcntl
import gc
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("uvicorn")

from jaxembed.serve.server.config import ServerConfig
from jaxembed.serve.server.shared_memory import HUGE_PAGE, SharedMemory, is_available
from jaxembed.serve.server.shared_tables import SharedTables
from jaxembed.serve.server.workers import Supervisor

pytestmark = pytest.mark.skipif(not is_available(), reason="needs Linux's memfd_create")

ROWS = HUGE_PAGE // 256
_HOLD = """
import pathlib, sys
import numpy as np
from jaxembed.serve.server.shared_tables import SharedTables
rows = np.zeros((int(sys.argv[2]), 64), np.float32)  # what another process has by now is taken, not these
found = SharedTables(pathlib.Path(sys.argv[1])).copy("digest", {"rows": rows})
print(found["rows"][1, 0], flush=True)
sys.stdin.read()
"""


def table(seed=0, rows=ROWS):
    return {"rows": np.random.default_rng(seed).normal(size=(rows, 64)).astype(np.float32)}


def ledger(folder):
    return json.loads((folder / "tables.json").read_bytes())


def test_contents_of_several_arrays(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "codes": rng.integers(0, 256, (HUGE_PAGE // 8 + 3, 9)).astype(np.uint8),
        "codebook": rng.normal(size=256).astype(np.float32),
    }
    copies = SharedTables(tmp_path).copy("digest", arrays)
    for part, array in arrays.items():
        assert copies[part].dtype == array.dtype
        assert copies[part].ctypes.data % 64 == 0
        assert not copies[part].flags.writeable
        np.testing.assert_array_equal(copies[part], array)


def test_what_was_held_before_the_machine_was_started_anew_is_forgotten(tmp_path):
    """Then another process may hold another table by the same numbers."""
    (tmp_path / "bundles").mkdir()
    held = SharedTables(tmp_path).copy("new", table(1))
    found = ledger(tmp_path)
    (tmp_path / "tables.json").write_text(json.dumps({"old": found["new"]}))
    config = ServerConfig(str(tmp_path / "bundles"), http_port=0, grpc_port=None, state=str(tmp_path))
    supervisor = Supervisor(config)
    copies = SharedTables(tmp_path).copy("old", table(2))
    np.testing.assert_array_equal(copies["rows"], table(2)["rows"])
    np.testing.assert_array_equal(held["rows"], table(1)["rows"])
    supervisor._end()
    supervisor._state.close()


def test_small_tables_are_not_shared(tmp_path):
    copies = SharedTables(tmp_path).copy("digest", table(rows=4))
    np.testing.assert_array_equal(copies["rows"], table(rows=4)["rows"])
    assert not (tmp_path / "tables.json").exists()


def test_versions_share_what_is_equal(tmp_path):
    tables = SharedTables(tmp_path)
    first, again, other = (tables.copy(digest, table(i)) for i, digest in enumerate("aab"))
    assert np.shares_memory(first["rows"], again["rows"])
    assert not np.shares_memory(first["rows"], other["rows"])
    np.testing.assert_array_equal(other["rows"], table(2)["rows"])


def test_is_given_back_with_the_last_array(tmp_path):
    tables = SharedTables(tmp_path)
    rows = tables.copy("a", table())["rows"]
    size, rows = rows.nbytes, rows[5:]
    (descriptor,) = [holder[1] for holder in ledger(tmp_path)["a"]["holders"]]
    assert os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:")
    mapped = rows.ctypes.data
    del rows
    gc.collect()
    assert not os.path.exists(f"/proc/self/fd/{descriptor}")
    with open("/proc/self/maps") as maps:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    assert not any(low <= mapped < high for low, high in ranges if high - low == size)
    tables.copy("b", table(1))
    assert list(ledger(tmp_path)) == ["b"]


def test_other_processes_take_what_is_there_and_outlive_who_made_it(tmp_path):
    command = [sys.executable, "-c", _HOLD, str(tmp_path), str(ROWS)]
    maker = SharedTables(tmp_path).copy("digest", table())
    value = str(maker["rows"][1, 0])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline().strip() == value
        assert len(ledger(tmp_path)["digest"]["holders"]) == 2
        del maker
        gc.collect()
        with subprocess.Popen(command, **pipes) as second:
            assert second.stdout.readline().strip() == value
            first.send_signal(signal.SIGKILL)
            first.wait()
            with subprocess.Popen(command, **pipes) as third:
                assert third.stdout.readline().strip() == value
                third.kill()
            second.kill()
    # Nobody has it any more, so what is given now is taken.
    assert SharedTables(tmp_path).copy("digest", table(9))["rows"][1, 0] == table(9)["rows"][1, 0]


def test_other_files_of_a_process_are_not_taken(tmp_path):
    with open(tmp_path / "file", "wb+") as file:
        file.truncate(HUGE_PAGE)
        inode = os.fstat(file.fileno()).st_ino
        assert SharedMemory.open(os.getpid(), file.fileno(), inode, HUGE_PAGE) is None
    memory = SharedMemory.create({0: table()["rows"]}, table()["rows"].nbytes)
    mine = os.getpid(), memory.descriptor
    assert SharedMemory.open(*mine, memory.inode + 1, memory.size) is None
    assert SharedMemory.open(*mine, memory.inode, memory.size + 1) is None
    assert SharedMemory.open(*mine, memory.inode, memory.size) is not None
    # Older systems map it only so.
    assert fcntl.fcntl(memory.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with (
        open(f"/proc/self/fd/{memory.descriptor}", "rb+", 0) as file,
        pytest.raises(OSError, match="not permitted"),
    ):
        file.write(b"x")


def test_a_ledger_that_is_damaged_is_begun_anew(tmp_path):
    (tmp_path / "tables.json").write_text("{")
    SharedTables(tmp_path).copy("a", table())
    assert list(ledger(tmp_path)) == ["a"]
