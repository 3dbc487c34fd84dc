"""Gets MovieLens-100K onto this machine."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# recbole ships the data set as an example inside its wheel.
_WHEEL = "recbole==1.2.1"
_FOLDER = "recbole/dataset_example/ml-100k/"
_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}


def fetch(directory: str | os.PathLike[str] = "data/ml-100k") -> Path:
    """Puts MovieLens-100K into `directory` and returns it; does nothing where it lies there already.

    The files come from the recbole wheel, by pip. Each is checked against its digest and moved into
    place whole, so an interrupted call leaves nothing half-written.

    Raises:
      OSError: if pip cannot get the wheel, or its files are not the expected ones.
    """
    directory = Path(directory)
    if all((directory / name).is_file() for name in _SHA256) or (directory / "u.data").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as temporary:
        files = _extract(_download(temporary, directory))
        for name, content in files.items():
            part = Path(temporary) / name
            part.write_bytes(content)
            os.replace(part, directory / name)
    return directory


def _download(temporary: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", temporary, _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(temporary).glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise OSError(
            f"MovieLens-100K: `{' '.join(command[2:])}` failed with exit status {done.returncode}:\n"
            f"{done.stderr.strip()}\n{_by_hand(directory)}"
        )
    return wheels[0]


def _extract(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(_FOLDER + name) for name in _SHA256}
    for name, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != _SHA256[name]:
            raise OSError(f"{wheel.name}: {name} must have sha256 {_SHA256[name]}, got {digest}.")
    return files


def _by_hand(directory: Path) -> str:
    return (
        f"Without a network, place the files by hand: either {', '.join(_SHA256)} from the folder {_FOLDER} of "
        f"the wheel {_WHEEL}, or u.data, u.item and u.user of GroupLens's ml-100k.zip, into {directory}."
    )
