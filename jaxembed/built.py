"""Files that the build puts into `jaxembed/native`."""

import pathlib
import sys


def find(*names: str) -> pathlib.Path | None:
    """The first file of one of these names; None where it was not built."""
    # An editable install keeps the sources in one place and what was built in site-packages.
    folders = (pathlib.Path(p) / "jaxembed" for p in sys.path if isinstance(p, str) and p)
    for folder in (pathlib.Path(__file__).parent, *folders):
        for name in names:
            if (path := folder / "native" / name).is_file():
                return path
    return None
