"""Tables in text of a few columns, whose errors name file and line."""

import csv
import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np

#: Integers up to here have a float of their own.
_EXACT = 2**53


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a file, split.

    Attributes:
      where: file and number of the line, from 1.
      fields: of the line.
    """

    where: str
    fields: list[str]

    def __getitem__(self, at: int) -> str:
        return self.fields[at]

    def whole(self, at: int, what: str, stop: int | None = None) -> int:
        """Field `at` as an integer, below `stop` and not negative where that is given.

        Raises:
          ValueError: if it is none.
        """
        text = self.fields[at].strip()
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or (stop is not None and not 0 <= value < stop):
            allowed = "an integer" if stop is None else f"an integer in [0, {stop})"
            raise ValueError(f"{self.where}: {what} must be {allowed}, got {text!r}.")
        return value


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """All of a file.

    Raises:
      ValueError: if it is not of this encoding.
    """
    try:
        return path.read_text(encoding)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} must be {encoding} text, got {e.reason} at byte {e.start}.") from e


def read_rows(
    path: Path, separator: str, fields: int, *, skip: int = 0, encoding: str = "utf-8", exact: bool = False
) -> list[Row]:
    """The lines after the first `skip` that are not empty.

    Raises:
      ValueError: if one has less than `fields` fields, or others than that where `exact`.
    """
    text = read_text(path, encoding)
    if separator == ",":
        numbered = _quoted(path, text)
    else:
        numbered = [(i, line.split(separator)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [Row(f"{path}, line {number}", found) for number, found in numbered if number > skip]
    for row in rows:
        if len(row.fields) < fields or (exact and len(row.fields) > fields):
            raise ValueError(
                f"{row.where}: {'exactly' if exact else 'at least'} {fields} fields between {separator!r} must be there, "
                f"got {len(row.fields)}."
            )
    return rows


def read_ratings(path: Path, separator: str, skip: int = 0) -> np.ndarray:
    """[E, 4] float64: user, item, rating, seconds.

    Raises:
      ValueError: if there is none, or a line has others than four or more finite numbers, of users and items whole ones.
    """
    found, error = None, "unreadable"
    # np.loadtxt takes delimiters of one character; files of gigabytes, which have them, it reads itself.
    is_short = len(separator) == 1
    source = path if is_short else io.StringIO(read_text(path, "latin-1").replace(separator, "\t"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of empty files
            found = np.loadtxt(
                source,
                delimiter=separator if is_short else "\t",
                skiprows=skip,
                ndmin=2,
                comments=None,
                encoding="latin-1",
            )
    except ValueError as e:
        error = str(e)
    if found is not None and found.size and found.shape[1] >= 4:
        ids = found[:, :2]
        if np.isfinite(found[:, :4]).all() and (ids == np.floor(ids)).all() and (np.abs(ids) < _EXACT).all():
            return found
    lines = read_text(path, "latin-1").split("\n")
    for number, line in enumerate(lines[skip:], skip + 1):
        if line.strip() and not _is_rating(line.split(separator)):
            raise ValueError(
                f"{path}, line {number}: user and item, whole numbers, then rating and seconds, finite numbers, must be "
                f"there between {separator!r}, got {line[:80].split(separator)}."
            )
    if not any(line.strip() for line in lines[skip:]):
        raise ValueError(f"{path} holds no ratings.")
    raise ValueError(f"{path} must hold ratings, as many numbers on every line: {error}")


def _is_rating(fields: list[str]) -> bool:
    try:
        user, item, *others = map(float, fields)
        return len(others) > 1 and bool(np.isfinite(others).all()) and user.is_integer() and item.is_integer()
    except ValueError:
        return False


def _quoted(path: Path, text: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        return [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as e:
        raise ValueError(f"{path}, line {reader.line_num}: {e}.") from e
