"""How raw ids become rows of a table: hashed to buckets, or looked up in a vocabulary file."""

import codecs
import dataclasses
import functools
import logging
import operator
import os
import pathlib
import stat
from typing import Any

import numpy as np
import xxhash

from jaxembed.hashing import hash_ints, hash_strings
from jaxembed.raw_ids import BadIdError, checked_integers, checked_strings
from jaxembed.shapes import AnyValues, HostIds

DTYPES = ("int64", "string")


@dataclasses.dataclass(frozen=True)
class HashBuckets:
    """Row = hash(id) modulo `num_buckets`.

    Integers are hashed by SplitMix64, strings by XXH3 of their UTF-8 bytes (`jaxembed.hashing`). Every id has a
    row, so none is out of range; in sparse inputs a negative id is one like others, and not pruned.

    Args:
      num_buckets: rows, from 0 on.
      dtype: of the ids, "int64" or "string".
      seed: in [0, 2**64); other seeds give other collisions.

    Raises:
      ValueError: if an argument is not of the form above.

    Examples:
      >>> HashBuckets(1000, dtype="string").rows(["Heat", "Casino", "Heat"]).tolist()
      [756, 710, 756]

    References:
      `tf.keras.layers.Hashing`, whose hashes are others: rows differ.
    """

    num_buckets: int
    dtype: str = "int64"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_int(self, "num_buckets", 1, 2**31)
        _check_int(self, "seed", 0, 2**64)
        _check_dtype(self.dtype)

    @property
    def num_rows(self) -> int:
        """Rows lie in [0, num_rows)."""
        return self.num_buckets

    @property
    def example_id(self) -> int | str:
        """An id that has a row."""
        return 0 if self.dtype == "int64" else "a"

    def rows(self, ids: AnyValues) -> HostIds:
        """int32 [N] rows of [N] ids of type `dtype`.

        Raises:
          BadIdError: if an id is not of that type.
          ValueError: if `ids` is one id, and no sequence.
        """
        ids = _checked(ids, self.dtype)
        hashed = hash_ints(ids, self.seed) if self.dtype == "int64" else hash_strings(ids, self.seed)
        return (hashed % np.uint64(self.num_buckets)).astype(np.int32)

    def load(self) -> None:
        """There is nothing to read."""


@dataclasses.dataclass(frozen=True)
class VocabularyFile:
    """Row = the line of the id in a file, from 0 on; others hash to the `num_oov_buckets` rows after them.

    The file is UTF-8 text with one id a line, each once, none empty. Two are equal if their contents are, wherever
    they lie. With `digest` and `size` given, as a checkpoint records them, the file is read when it is first
    needed, and must then have them.

    Args:
      file: its path.
      num_oov_buckets: rows for ids that are not in it, by `HashBuckets`; with 0 such an id is an error.
      dtype: of the ids, "int64" (decimal in the file) or "string".
      digest: xxh3-128 of its contents, in hexadecimal; "" takes that of the file.
      size: number of its lines.

    Raises:
      ValueError: if an argument is not of the form above, or the file cannot be read.

    Examples:
      >>> pathlib.Path("genres.txt").write_text("drama\\ncomedy\\n")
      13
      >>> VocabularyFile("genres.txt", num_oov_buckets=0).rows(["comedy", "drama"]).tolist()
      [1, 0]

    References:
      `tf.lookup.StaticVocabularyTable`, `tf.keras.layers.StringLookup`.
    """

    file: str = dataclasses.field(compare=False)
    num_oov_buckets: int = 1
    dtype: str = "string"
    digest: str = ""
    size: int = 0

    def __post_init__(self) -> None:
        _check_int(self, "num_oov_buckets", 0, 2**31)
        _check_int(self, "size", 0, 2**31)
        _check_dtype(self.dtype)
        if not isinstance(self.digest, str):
            raise ValueError(f"digest must be a str, got {self.digest!r:.80}.")
        object.__setattr__(self, "file", os.path.abspath(os.path.expanduser(os.fspath(self.file))))
        if not self.digest:
            content = self.read()
            if content.startswith(codecs.BOM_UTF8):
                raise ValueError(
                    f"vocabulary file {self.file} begins with a byte order mark, which would be a part of its first id; "
                    "write it without one (encoding 'utf-8', not 'utf-8-sig')."
                )
            object.__setattr__(self, "digest", xxhash.xxh3_128_hexdigest(content))
            object.__setattr__(self, "size", len(_parse(content, self.file, self.dtype)))

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read of the file."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def num_rows(self) -> int:
        """Rows lie in [0, num_rows)."""
        return self.size + self.num_oov_buckets

    @property
    def example_id(self) -> int | str:
        """An id that has a row: one of the file, if it holds any."""
        if self.dtype == "int64":
            return int(self._index[0][0]) if self.size else 0
        return next(iter(self._index)).decode() if self.size else "a"

    def rows(self, ids: AnyValues) -> HostIds:
        """int32 [N] rows of [N] ids of type `dtype`.

        Raises:
          BadIdError: if an id is not of that type, or not in the file and there are no buckets for such.
          ValueError: if `ids` is one id, and no sequence.
        """
        ids = _checked(ids, self.dtype)
        shape, ids = np.shape(ids), ids.reshape(-1) if isinstance(ids, np.ndarray) else ids
        rows = self._integers(ids) if self.dtype == "int64" else self._strings(ids)
        missing = np.flatnonzero(rows < 0)
        if missing.size:
            if not self.num_oov_buckets:
                at = int(missing[0])
                wrong = int(ids[at]) if self.dtype == "int64" else ids[at]
                raise BadIdError(
                    at,
                    f"id {wrong!r:.80} is not in the vocabulary of {self.size} ids, which has no out-of-vocabulary "
                    "buckets; drop it, or set num_oov_buckets.",
                )
            others = ids[missing] if isinstance(ids, np.ndarray) else [ids[at] for at in missing]
            rows[missing] = self.size + HashBuckets(self.num_oov_buckets, self.dtype).rows(others)
        return rows.reshape(shape)

    def read(self) -> bytes:
        """The contents of the file.

        Raises:
          ValueError: if it cannot be read, or does not have the digest.
        """
        try:
            if not stat.S_ISREG(os.stat(self.file).st_mode):  # reading a pipe would never end
                raise ValueError(f"vocabulary file {self.file} must be a regular file.")
            content = pathlib.Path(self.file).read_bytes()
        except OSError as e:
            raise ValueError(f"vocabulary file {self.file} cannot be read ({e}); put it there again.") from e
        if self.digest and xxhash.xxh3_128_hexdigest(content) != self.digest:
            raise ValueError(
                f"vocabulary file {self.file} is not the one that was recorded: its digest differs; restore it, "
                "since other lines would mean other rows."
            )
        return content

    def tokens(self) -> list[Any]:
        """The ids of the file, by line: bytes, or ints.

        Raises:
          ValueError: as `read`, or if it is not of the form above.
        """
        content = self.read()
        if content.startswith(codecs.BOM_UTF8):
            # Recorded by a version that took it; its rows stay what they are.
            logging.getLogger("jaxembed").warning(
                "vocabulary file %s begins with a byte order mark, a part of its first id, which is not found without it.",
                self.file,
            )
        return _parse(content, self.file, self.dtype)

    def continues(self, other: "VocabularyFile") -> bool:
        """Whether every id of `other` has the row that it has there, and new ones have the rows after them.

        Raises:
          ValueError: as `read`.
        """
        if self.num_oov_buckets or other.num_oov_buckets or self.dtype != other.dtype:
            return False
        content = self.read()
        lines = content.split(b"\n", other.size)
        begin = content[: len(content) - len(lines[-1])] if len(lines) > other.size else content
        # The last line may end or not.
        endings = (begin, begin.removesuffix(b"\n"), begin + b"\n")
        return other.digest in map(xxhash.xxh3_128_hexdigest, endings)

    def load(self) -> None:
        """Reads the file now, rather than when the first id is looked up.

        Raises:
          ValueError: as `read`.
        """
        _ = self._index

    def _integers(self, ids: np.ndarray) -> np.ndarray:
        ordered, order = self._index
        if not self.size or not ids.size:
            return np.full(ids.shape, -1, np.int32)
        at = np.minimum(np.searchsorted(ordered, ids), self.size - 1)
        return np.where(ordered[at] == ids, order[at], np.int32(-1))

    def _strings(self, ids: Any) -> np.ndarray:
        index = self._index
        encoded = (id_.encode() if isinstance(id_, str) else id_ for id_ in ids)
        return np.fromiter((index.get(id_, -1) for id_ in encoded), np.int32, len(ids))

    @functools.cached_property
    def _index(self) -> Any:
        tokens = self.tokens()
        if len(tokens) != self.size:
            raise ValueError(f"vocabulary file {self.file} has {len(tokens)} ids, recorded were {self.size}.")
        if self.dtype == "string":
            return {token: row for row, token in enumerate(tokens)}
        values = np.array(tokens, np.int64)
        order = np.argsort(values).astype(np.int32)
        return values[order], order


Preprocessing = HashBuckets | VocabularyFile


def preprocessing_to_dict(preprocessing: Preprocessing) -> dict[str, Any]:
    """JSON-able; `preprocessing_from_dict` gives it back."""
    kind = "hash" if isinstance(preprocessing, HashBuckets) else "vocabulary"
    return {"kind": kind, **dataclasses.asdict(preprocessing)}


def preprocessing_from_dict(data: dict[str, Any]) -> Preprocessing:
    """The inverse of `preprocessing_to_dict`; reads no file.

    Raises:
      ValueError: if `data` is of another form.
    """
    arguments = dict(data)
    kind = arguments.pop("kind", None)
    if kind == "hash":
        return HashBuckets(**arguments)
    if kind != "vocabulary" or not arguments.get("digest") or not isinstance(arguments.get("file"), str):
        raise ValueError(
            f"preprocessing must be of kind hash, or vocabulary with file and digest, got {data!r:.200}."
        )
    return VocabularyFile(**arguments)


def _parse(content: bytes, file: str, dtype: str) -> list[Any]:
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()  # the last line ends like the others
    lines = [line.removesuffix(b"\r") for line in lines]
    if dtype == "string":
        try:
            content.decode()
        except UnicodeDecodeError as e:
            raise ValueError(f"vocabulary file {file} is not UTF-8: {e}.") from None
        tokens: list[Any] = lines
    else:
        tokens = [_integer(line, at, file) for at, line in enumerate(lines)]
    if len(set(tokens)) != len(tokens) or b"" in lines:
        seen: set[Any] = set()
        for at, token in enumerate(tokens):
            if token in seen or token == b"":
                what = "is empty" if token == b"" else f"repeats {token!r:.80}"
                raise ValueError(f"vocabulary file {file}, line {at + 1} {what}; each id must be there once.")
            seen.add(token)
    return tokens


def _integer(line: bytes, at: int, file: str) -> int:
    try:
        value = int(line)
    except ValueError:
        value = None
    if value is None or not -(2**63) <= value < 2**63:
        raise ValueError(f"vocabulary file {file}, line {at + 1} must be an int64, got {line!r:.80}.")
    return value


def _checked(ids: Any, dtype: str) -> Any:
    return checked_integers(ids) if dtype == "int64" else checked_strings(ids)


def _check_int(config: Any, name: str, low: int, high: int) -> None:
    value = getattr(config, name)
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number < high:
        raise ValueError(f"{name} must be an int in [{low}, {high}), got {value!r:.80}.")
    object.__setattr__(config, name, number)


def _check_dtype(dtype: Any) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r:.80}.")
