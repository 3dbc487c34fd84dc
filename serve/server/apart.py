"""Apart: a process that reads large requests in Python, which would hold the interpreter of a worker for seconds.

A thread does not help there: `json` and `protobuf` let go of the interpreter only once they are done, and so does what
frees a list of millions.

    python -m jaxembed.serve.server.apart FD
"""

import contextlib
import gc
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from io import BufferedRWPair
from typing import Any

from .errors import RequestError, out_of_memory
from .reading import READERS
from .request_packer import RequestPacker
from .signature import Signature

_PROTOCOL = 5  # large arrays and bytes are written and read in place
_NICE = 10


class Apart:
    """Starts the process when there is something to read, and again if it died. Used by one thread at a time."""

    def __init__(self):
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: BufferedRWPair | None = None
        self._known: Signature | None = None
        self._pickled: tuple[Signature, bytes] | None = None
        self._unreadable: Signature | None = None
        self._ended = False

    def read(self, reader: str, signature: Signature, *arguments: Any) -> Any:
        """What the reader of that name, of READERS, makes of the arguments; ids are checked and packed, too.

        Signatures that cannot be sent, as of combiners without a name to import them by, are read for here, and so are
        those whose vocabularies are held here, but gone from the disk.

        Raises:
          RequestError: if it refuses the request, or the process dies.
        """
        if signature is self._unreadable:
            return _read_here(reader, signature, *arguments)
        try:
            content = self._content(signature)
        except (pickle.PicklingError, AttributeError, TypeError):
            return _read_here(reader, signature, *arguments)
        try:
            if self._process is None or self._process.poll() is not None:
                self.stop()
                self._start()
            if self._ended:
                raise EOFError
            assert self._stream is not None
            known, self._known = self._known, signature
            changed = content if signature is not known else None
            pickle.dump((changed, reader, arguments), self._stream, _PROTOCOL)
            self._stream.flush()
            outcome, value = pickle.load(self._stream)
        except MemoryError:  # what is left of the answer would be taken for the next one
            self.stop()
            raise
        except (EOFError, OSError, pickle.UnpicklingError):
            self.stop()
            raise RequestError(
                503, "the process that reads large requests died, perhaps as memory was short.", retry_after=1
            ) from None
        if outcome == "unreadable":
            self._unreadable = signature
            return _read_here(reader, signature, *arguments)
        if outcome == "refused":
            raise RequestError(**value)
        if outcome == "failed":
            raise RuntimeError(f"a large request could not be read:\n{value}")
        return value

    def end(self) -> None:
        """Ends the process for good while another thread reads; that one finds it dead."""
        self._ended = True
        self.abandon()

    def abandon(self) -> None:
        """Ends the process while another thread reads, which finds it dead; what is read next starts another."""
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._stream is not None:
            with contextlib.suppress(OSError):  # what was not written yet
                self._stream.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._stream = self._known = self._unreadable = None

    def _content(self, signature: Signature) -> bytes:
        if self._pickled is None or self._pickled[0] is not signature:
            self._pickled = signature, pickle.dumps(signature, _PROTOCOL)
        return self._pickled[1]

    def _start(self) -> None:
        mine, theirs = socket.socketpair()
        with mine, theirs:
            command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            self._stream = stream = mine.makefile("rwb")
        pickle.dump(sys.path, stream, _PROTOCOL)


def _read_here(reader: str, signature: Signature, *arguments: Any) -> Any:
    return READERS[reader](RequestPacker(signature), signature, *arguments)


def _answer(packer: RequestPacker, signature: Signature, reader: str, arguments: Any) -> tuple[str, Any]:
    try:
        if not _vocabularies_are_read(signature):
            return "unreadable", None
        return "read", READERS[reader](packer, signature, *arguments)
    except RequestError as e:
        return "refused", vars(e)
    except MemoryError:
        return "refused", vars(out_of_memory())
    except Exception:
        return "failed", traceback.format_exc()


def _vocabularies_are_read(signature: Signature) -> bool:
    """Whether every vocabulary is in memory, now at the latest: they were sent as their files, which may be gone."""
    try:
        for feature in signature.features.values():
            if feature.config.preprocessing is not None:
                feature.config.preprocessing.load()
    except ValueError:
        return False
    return True


def main() -> None:
    """Answers until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    os.nice(_NICE)
    with contextlib.suppress(OSError):  # of all processes here, this is the one to end if memory runs out
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
    stream = socket.socket(fileno=int(sys.argv[1])).makefile("rwb")
    gc.disable()  # looks at all lists again and again, and JSON has no cycles
    signature = packer = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        sys.path[:] = pickle.load(stream)
        while True:
            changed, reader, arguments = pickle.load(stream)
            if changed is not None:
                signature = pickle.loads(changed)
                packer = RequestPacker(signature)
            assert signature is not None
            assert packer is not None
            pickle.dump(_answer(packer, signature, reader, arguments), stream, _PROTOCOL)
            stream.flush()
            del arguments
            gc.collect()


if __name__ == "__main__":
    main()
