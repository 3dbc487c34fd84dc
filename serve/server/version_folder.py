"""VersionFolder: what is in a folder of versions."""

import dataclasses
import os
import pathlib
import re

_MANIFEST = "manifest.json"
# As `jaxembed convert` writes them: 5 and 0000000005 would be one version in two folders.
_NAME = re.compile(r"0|[1-9][0-9]{0,17}")
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class VersionFolder:
    """What is in a folder of versions.

    Attributes:
      versions: in rising order, and what tells a version from another of its number.
      misnamed: names of folders that hold a bundle, and are none that are looked for.
      rest: names of what holds no bundle, or none that is whole.
      problems: what the system said where something could not be read.
    """

    versions: dict[int, tuple[int, ...]]
    misnamed: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: pathlib.Path) -> "VersionFolder":
        """Looks at `path`; what cannot be read is among the problems."""
        try:
            names = os.listdir(path)
        except OSError as e:
            return cls({}, problems=(str(e),))
        versions, misnamed, rest, problems = {}, [], [], []
        for name in names:
            if name.startswith("."):  # it is still written
                continue
            try:
                stat = os.stat(path / name / _MANIFEST)
            except (FileNotFoundError, NotADirectoryError):
                rest.append(name)
                continue
            except OSError as e:
                problems.append(str(e))
                continue
            if _NAME.fullmatch(name):
                versions[int(name)] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            else:
                misnamed.append(name)
        return cls(dict(sorted(versions.items())), *(tuple(sorted(x)) for x in (misnamed, rest, problems)))

    def troubles(self) -> str:
        """What to tell whoever fills the folder; empty if there is nothing to tell."""
        found = list(self.problems[:_SHOWN])
        if self.misnamed:
            found.append(
                f"bundles in {_some(self.misnamed)} are passed over: versions are looked for in folders named by their "
                "number, without zeros in front, such as 5; rename them"
            )
        return "; ".join(found)

    def why_none(self) -> str:
        """Why there is no version."""
        return self.troubles() or (
            "versions are looked for in folders named by their number, such as 5, with a manifest.json; "
            + (f"there are {_some(self.rest)}, without one" if self.rest else "the folder is empty")
        )


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name[:100]) for name in names[:_SHOWN]) + more
