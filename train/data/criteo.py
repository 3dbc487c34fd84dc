"""Criteo's click logs: 13 counts and 26 hashed categories an example, in text of up to a terabyte."""

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxembed.checkpoint.scratch import publish, scratch_folder
from jaxembed.config import FeatureConfig, TableConfig

from .criteo_origin import check_sizes, check_texts, describe_texts
from .examples import Examples

NUM_DENSE, NUM_FEATURES = 13, 26
FEATURES = tuple(f"c{i}" for i in range(1, NUM_FEATURES + 1))
_META = "criteo.json"
_FIELDS = 1 + NUM_DENSE + NUM_FEATURES
_BLOCK = 1 << 16


def convert_criteo(
    paths: Sequence[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    vocabulary_sizes: int | Sequence[int],
    *,
    chunk_bytes: int = 1 << 20,
) -> Path:
    """Turns Criteo's text into flat binary columns that `load_criteo` maps into memory.

    A line is a label, 13 integer counts and 26 categories of up to 8 hexadecimal digits, separated by
    tabs and ended by LF or CR LF; any of the counts and categories may be empty. That is the layout of
    Kaggle's `train.txt` and of the terabyte's `day_0` to `day_23`, plain or `.gz`. With x a count and h a
    category:

        dense = log(1 + max(x, 0)), 0 where empty
        id = 1 + h mod (V - 1), 0 where empty

    Args:
      paths: text files, in order.
      directory: where to put the columns, about 157 bytes an example. It appears whole or not at all.
      vocabulary_sizes: V of every feature, or one for all; at least 2.
      chunk_bytes: how much text is parsed at once.

    Returns:
      `directory`.

    Raises:
      ValueError: if a line is not of the form above, there is none, a `.gz` is damaged, or a size is below 2.
      FileExistsError: if `directory` exists.
      FileNotFoundError: if one of the texts does not.
    """
    sizes = _sizes(vocabulary_sizes)
    directory = Path(directory)
    taken = FileExistsError(f"{directory} exists; remove it, or load it with load_criteo.")
    if directory.exists():
        raise taken
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no click log is at {Path(path).absolute()}; Criteo's train.txt (Kaggle) or day_0 to day_23 (terabyte) "
                "must be downloaded first."
            )
    texts = describe_texts(paths)
    with scratch_folder(directory.parent, directory.name) as temporary:
        count = 0
        with (
            open(temporary / "ids", "wb") as ids,
            open(temporary / "dense", "wb") as dense,
            open(temporary / "labels", "wb") as labels,
        ):
            for path in paths:
                for text in _chunks(Path(path), chunk_bytes):
                    columns = parse_criteo(text, sizes, f"{path}, from example {count} on")
                    for file, column in zip((ids, dense, labels), columns, strict=True):
                        file.write(column.tobytes())
                    count += columns[2].shape[0]
        if not count:
            raise ValueError(
                f"no examples are in {', '.join(map(str, paths)) or 'no texts'}; see that they are whole."
            )
        meta = {"examples": count, "vocabulary_sizes": sizes, "texts": texts, "version": 1}
        (temporary / _META).write_text(json.dumps(meta))
        publish(temporary, directory, taken)
    return directory


@dataclasses.dataclass(frozen=True, eq=False)
class Criteo:
    """Converted click logs.

    Attributes:
      examples: features "c1" to "c26", 13 dense features and labels, mapped from disk. They shuffle in
        blocks of 65,536 neighbours, so that a file larger than memory is read block by block.
      vocabulary_sizes: V of every feature.
    """

    examples: Examples
    vocabulary_sizes: tuple[int, ...]


def load_criteo(
    directory: str | os.PathLike[str],
    *,
    paths: Sequence[str | os.PathLike[str]] | None = None,
    vocabulary_sizes: int | Sequence[int] | None = None,
) -> Criteo:
    """Maps what `convert_criteo` wrote into memory.

    Args:
      directory: where it is.
      paths: texts that it must have been made from: of the same names, and where they are still there, of the same
        sizes, and of the same times of change or else the same first and last MiB. None takes the columns as they are.
      vocabulary_sizes: V that it must have been made for, as in `convert_criteo`. None takes any.

    Raises:
      FileNotFoundError: if `directory` does not hold it.
      ValueError: if files are not as long as they must be, or were made from other texts or for other sizes.
    """
    directory = Path(directory)
    if not (directory / _META).is_file():
        raise FileNotFoundError(f"{directory} must hold {_META}; write it with convert_criteo.")
    meta = json.loads((directory / _META).read_text())
    if paths is not None:
        check_texts(directory, meta, paths)
    if vocabulary_sizes is not None:
        check_sizes(directory, meta, _sizes(vocabulary_sizes))
    count = meta["examples"]
    ids = _map(directory / "ids", np.int32, (count, NUM_FEATURES))
    dense = _map(directory / "dense", np.float32, (count, NUM_DENSE))
    labels = _map(directory / "labels", np.uint8, (count,))
    splits = (*range(0, count, _BLOCK), count)
    examples = Examples({name: ids[:, i] for i, name in enumerate(FEATURES)}, dense, labels, splits)
    return Criteo(examples, tuple(meta["vocabulary_sizes"]))


def criteo_feature_config(vocabulary_sizes: int | Sequence[int], dim: int = 64) -> dict[str, FeatureConfig]:
    """Features "c1" to "c26", each with a table of its own name."""
    sizes = _sizes(vocabulary_sizes)
    return {
        name: FeatureConfig(TableConfig(size, dim, name=name))
        for name, size in zip(FEATURES, sizes, strict=True)
    }


def parse_criteo(
    text: bytes, vocabulary_sizes: Sequence[int], where: str = "text"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole lines of Criteo's text as [E, 26] int32 ids, [E, 13] float32 dense and [E] uint8 labels.

    Raises:
      ValueError: if a line is not of Criteo's form.
    """
    text = text if not text or text.endswith(b"\n") else text + b"\n"
    text = text.replace(b"\r\n", b"\n") if b"\r" in text else text
    data = np.frombuffer(text + bytes(8), np.uint8)
    ends = np.flatnonzero((data == ord("\t")) | (data == ord("\n")))
    lines = data[ends] == ord("\n")
    fields = np.diff(np.flatnonzero(lines), prepend=-1)
    if (fields != _FIELDS).any():
        at = int(np.argmax(fields != _FIELDS))
        raise ValueError(
            f"{where}: a line must have a label, {NUM_DENSE} counts and {NUM_FEATURES} categories, {_FIELDS} "
            f"fields between tabs, got {fields[at]} in line {at} (test files without labels are not read)."
        )
    starts = np.concatenate([[0], ends[:-1] + 1])[: ends.size].reshape(-1, _FIELDS)
    ends = ends.reshape(-1, _FIELDS)
    labels, empty = _numbers(data, starts[:, 0], ends[:, 0], 10, where)
    if empty.any():
        raise ValueError(
            f"{where}: labels must be 0 or 1, got none in line {int(np.argmax(empty))} (test files without labels are not "
            "read)."
        )
    if (labels > 1).any():
        raise ValueError(f"{where}: labels must be 0 or 1, got {labels.max()}.")
    counts = slice(1, 1 + NUM_DENSE)
    minus = (data[starts[:, counts]] == ord("-")) & (starts < ends)[:, counts]
    values, empty = _numbers(data, starts[:, counts] + minus, ends[:, counts], 10, where)
    if (minus & empty).any():
        at = int(np.argmax((minus & empty).any(1)))
        raise ValueError(f"{where}: a count must be an integer or empty, got '-' in line {at}.")
    hashes, empty = _numbers(data, starts[:, 1 + NUM_DENSE :], ends[:, 1 + NUM_DENSE :], 16, where)
    ids = np.where(empty, 0, 1 + hashes % (np.asarray(vocabulary_sizes) - 1))
    dense = np.log1p(np.where(minus, 0, values))
    return ids.astype(np.int32), dense.astype(np.float32), labels.astype(np.uint8)


def _numbers(
    data: np.ndarray, starts: np.ndarray, ends: np.ndarray, base: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of up to 16 digits written at data[start:end], and where there were none."""
    lengths = ends - starts
    longest = int(lengths.max(initial=0))
    if longest > (8 if base == 16 else 16):
        raise ValueError(f"{where}: a field of {longest} characters is too long for Criteo's.")
    cut = np.maximum(starts, ends - 8)
    values = _eight_digits(data, cut, ends - cut, base, where)
    if longest > 8:
        values += 10**8 * _eight_digits(data, starts, cut - starts, base, where)
    return values, lengths == 0


# Of a field of up to 8 characters, read into one word with its first character on top.
_LENGTHS = np.arange(9)
_SHIFT = np.minimum(8 * (8 - _LENGTHS), 63).astype(np.uint64)
_KEEP = np.asarray([2 ** (8 * n) - 1 for n in range(9)], np.uint64)
_EACH = 0x0101010101010101
_ZEROS = ~_KEEP & np.uint64(0x30 * _EACH)


def _eight_digits(
    data: np.ndarray, starts: np.ndarray, lengths: np.ndarray, base: int, where: str
) -> np.ndarray:
    """The numbers written in up to 8 characters from `starts` on, all of a number's digits in one word.

    `data` has 8 bytes more than the last number needs.
    """
    words = np.ndarray((data.size - 7,), ">u8", data, strides=(1,))[starts].astype(np.uint64)
    words = ((words >> _SHIFT[lengths]) & _KEEP[lengths]) | _ZEROS[lengths]
    letters = (words >> np.uint64(6)) & np.uint64(_EACH)
    digits = (words & np.uint64(0x0F * _EACH)) + np.uint64(9) * letters
    above_nine = ((digits + np.uint64(6 * _EACH)) >> np.uint64(4)) & np.uint64(_EACH)
    # Written again, digits must give the word they were read from, and exactly letters be above 9.
    again = digits + np.uint64(0x30 * _EACH) + np.uint64(0x27) * letters
    wrong = (again ^ words) | (above_nine ^ letters) | (digits & np.uint64(0xF0 * _EACH))
    if wrong.any() or (base == 10 and letters.any()):
        raise ValueError(f"{where}: fields must be digits of base {base} (lower case), got others.")
    for bits, mask in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
        digits = (digits & np.uint64(mask)) + np.uint64(base ** (bits // 8)) * (
            (digits >> np.uint64(bits)) & np.uint64(mask)
        )
    return digits.astype(np.int64)


def _chunks(path: Path, chunk_bytes: int) -> Iterator[bytes]:
    """Whole lines, about `chunk_bytes` of them at a time."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        rest = b""
        try:
            while block := file.read(chunk_bytes):
                rest += block
                cut = rest.rfind(b"\n") + 1
                if cut:
                    yield rest[:cut]
                    rest = rest[cut:]
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f"{path} is damaged or cut off: {e}. Get it again.") from e
        if rest:
            yield rest


def _sizes(vocabulary_sizes: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(vocabulary_sizes, int):
        sizes = (vocabulary_sizes,) * NUM_FEATURES
    else:
        sizes = tuple(int(size) for size in vocabulary_sizes)
    if len(sizes) != NUM_FEATURES or min(sizes) < 2 or max(sizes) >= 2**31:
        raise ValueError(
            f"vocabulary_sizes must be {NUM_FEATURES} ints from 2 to below 2**31, or one, got {vocabulary_sizes}."
        )
    return sizes


def _map(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise ValueError(f"{path} must have {expected} bytes, got {path.stat().st_size}; convert it again.")
    # A plain array on the map: np.memmap's own type would slow every gather down.
    return np.asarray(np.memmap(path, dtype, "r", shape=shape)) if expected else np.zeros(shape, dtype)
