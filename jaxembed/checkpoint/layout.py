"""Where the parts of a checkpoint lie, and what its manifest says.

DIRECTORY/
  STEP/
    manifest/   JSON: format, version, step, feature configuration, metadata, digests, optimizers,
                weights of custom combiners
    tables/     Orbax arrays {table: [V, D]}
    slots/      Orbax arrays {table: {slot: [V, D]}}; absent where no optimizer has slots
    model/      Orbax arrays, any structure: dense parameters, optimizer state; may be absent
    data/       JSON: state of the input pipeline; may be absent
  .deleting/    steps on their way out
  .writer       which process saves here, and its lock
"""

import collections
import contextlib
import json
import math
import pathlib
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from jaxembed.checkpoint.digests import HEX_DIGITS, CheckpointError, block_rows, digest_bytes, num_rows
from jaxembed.checkpoint.files import read_regular, refuse_pointer
from jaxembed.names import UnregisteredError
from jaxembed.optimizers.registry import storable_arguments
from jaxembed.serialization import feature_config_from_json, strict_json

FORMAT = "jaxembed-checkpoint"
VERSION = 1
MANIFEST, TABLES, SLOTS, MODEL, DATA = "manifest", "tables", "slots", "model", "data"
DELETING, UNFINISHED = ".deleting", ".orbax-checkpoint-tmp"
#: In bytes: digests of 1 to 2 TB of tables and slots, by the width of their rows.
MAX_JSON = 64 << 20
#: In bytes, of it for what else a manifest says.
ROOM = 1 << 20
#: In commas and brackets. Without their digests, tables take few; a second goes by while a million are read.
MAX_VALUES = 1 << 20
#: In bytes: Git LFS makes no larger ones.
MAX_POINTER = 1024
_SEAL = 100


def check_files(directory: pathlib.Path) -> None:
    """Whoever reads a pipe or a device waits for ever, and Orbax reads whatever is there.

    Raises:
      CheckpointError: naming what is neither a file nor a folder, or a Git LFS pointer.
    """
    try:
        for path in directory.rglob("*"):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise CheckpointError(f"{path} must be a regular file.")
            if stat.S_ISREG(status.st_mode) and status.st_size < MAX_POINTER:
                refuse_pointer(path, path.read_bytes())
    except OSError as e:
        raise CheckpointError(f"{e.filename} cannot be opened: {e.strerror}; restore another step.") from e


def check_digests(arrays: Iterable[tuple[Sequence[int], Any]]) -> None:
    """Before arrays of these shapes and types are written: whether one manifest has room for their digests.

    Raises:
      ValueError: if it has none, so that nothing could read it.
    """
    count = num_bytes = 0
    for shape, dtype in arrays:
        count += -(-num_rows(shape) // block_rows(shape, dtype))
        num_bytes += math.prod(shape) * np.dtype(dtype).itemsize
    limit = (MAX_JSON - ROOM) // HEX_DIGITS
    if count > limit:
        raise ValueError(
            f"{num_bytes:,} bytes of tables and slots have {count:,} digests, one for each megabyte or less, and a manifest "
            f"has room for {limit:,}; spread the tables over several, leave slots out or take an optimizer with fewer, or take "
            "a smaller type (in a conversion --dtype, of a bundle --quantize)."
        )


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a digest of itself.

    Raises:
      ValueError: as `readable_digest`.
    """
    return {**manifest, "digest": readable_digest(manifest, "the manifest, with its metadata,")}


def readable_digest(content: Any, what: str) -> str:
    """`digest` of what is to be written.

    Raises:
      ValueError: naming `what`, if it is more than readers take, or holds what JSON has not: NaN or infinity, or keys
        that are equal as text.
    """
    try:
        # Keys that are numbers come back as text, which sorts otherwise.
        text = json.dumps(strict_json(json.dumps(content, allow_nan=False)), sort_keys=True).encode()
    except (ValueError, RecursionError) as e:
        flaw = None
        with contextlib.suppress(RecursionError, TypeError):
            flaw = _flaw(content)
        raise ValueError(f"{what} could not be read back: {flaw or str(e).rstrip('.')}.") from e
    values = _num_values(text)
    if len(text) > MAX_JSON - _SEAL or values > MAX_VALUES - _SEAL:
        raise ValueError(
            f"{what} has {len(text):,} bytes and {values:,} values; at most {MAX_JSON:,} and {MAX_VALUES:,} can be read "
            "back. Keep what is large in the model."
        )
    return digest_bytes(text)


def _flaw(content: Any, where: str = "") -> str | None:
    """What JSON has not in what is to be written, and what to do about it; None if nothing is found."""
    if isinstance(content, float) and not math.isfinite(content):
        return f"{where} is {float(content)}, which is no number of JSON; pass None or text in its place"
    if isinstance(content, dict):
        keys = [next(iter(json.loads(json.dumps({key: None})))) for key in content]
        key, count = collections.Counter(keys).most_common(1)[0] if keys else ("", 0)
        if count > 1:
            return f"{where or 'it'} has {count} keys that are {key!r:.80} as text; rename all but one"
        children = zip(keys, content.values(), strict=True)
    elif isinstance(content, list | tuple):
        children = enumerate(content)
    else:
        return None
    found = (_flaw(child, f"{where}.{key}" if where else str(key)) for key, child in children)
    return next((flaw for flaw in found if flaw is not None), None)


def read_manifest(
    directory: pathlib.Path, file: str = f"{MANIFEST}/metadata", format: str = FORMAT
) -> dict[str, Any]:
    """The manifest of a step, or of another folder.

    Raises:
      CheckpointError: if it is not one that this version can read, or not what was written.
    """
    manifest = _read_json(directory, file)
    if manifest.get("format") != format:
        raise CheckpointError(f"{directory} is not a {format}; its manifest does not say so.")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{directory} has format version {str(manifest.get('version'))[:40]!r}, this jaxembed reads {VERSION}; "
            "upgrade jaxembed."
        )
    if manifest.pop("digest", None) != digest(manifest):
        raise CheckpointError(
            f"{directory / file} is damaged: it does not have the digest it was saved with; restore another step."
        )
    return manifest


def read_feature_config(manifest: dict[str, Any], directory: pathlib.Path) -> Any:
    """The feature configuration in a manifest; optimizers and initializers that are not registered are kept as stored.

    Raises:
      CheckpointError: if it is none.
      UnregisteredError: if a combiner is not registered.
    """
    try:
        return feature_config_from_json(manifest["feature_config"], keep_unregistered=True)
    except UnregisteredError as e:
        raise UnregisteredError(f"{directory}: {e}") from e
    except ValueError as e:
        raise CheckpointError(f"{directory}: {e}") from e


def read_data(directory: pathlib.Path, saved: str) -> Any:
    """The state of the input pipeline, whose digest is `saved`.

    Raises:
      CheckpointError: if it cannot be read, or is not what was saved with this step.
    """
    content = _read_json(directory, f"{DATA}/metadata")
    if digest(content) != saved or "state" not in content:
        raise CheckpointError(
            f"{directory / DATA}/metadata is damaged, or of another step: it does not have the digest it was saved with; "
            "restore another step."
        )
    return content["state"]


def _read_json(directory: pathlib.Path, file: str) -> dict[str, Any]:
    try:
        text = read_regular(directory / file, MAX_JSON)
        values = _num_values(text)
        if values > MAX_VALUES:
            raise ValueError(f"it has {values:,} values, of at most {MAX_VALUES:,}")
        content = strict_json(text)
    except ValueError as e:
        raise CheckpointError(f"{directory} has no readable {file} ({e}); restore another step.") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{directory / file} must be a JSON object, got {type(content).__name__}.")
    return content


def _num_values(text: bytes) -> int:
    return sum(map(text.count, (b",", b"[", b"{")))


def digest(content: Any) -> str:
    """Digest of a JSON-able value, whatever the order of its keys."""
    return digest_bytes(json.dumps(content, sort_keys=True).encode())


def table_digest(rows: Any, quantized: Any = None) -> str:
    """The one digest of a table or slot, made of those of its blocks: what conversions report, inspection shows, a
    bundle has, and anyone can make of a manifest.

    Args:
      rows: JSON of the Digests of its rows or codes, as a manifest has it.
      quantized: kind and digests of the other arrays of codes, as in the manifest of a bundle.
    """
    return digest({"rows": rows, "quantized": quantized})


def encode_name(name: str) -> str:
    """A table's name as a key of Orbax, which gives '.' and '/' a meaning of their own."""
    return quote(name, safe="").replace(".", "%2E")


def decode_name(key: str) -> str:
    """The inverse of `encode_name`."""
    return unquote(key)


def combiner_weights_to_json(weights: Mapping[str, Any]) -> dict[str, str]:
    """The float32 weights of custom combiners by table, as bytes in hexadecimal: few, so kept in the manifest."""
    return {name: np.asarray(values, "<f4").tobytes().hex() for name, values in weights.items()}


def combiner_weights(manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights that a manifest holds; older ones hold none.

    Raises:
      CheckpointError: if they are not what `combiner_weights_to_json` gives.
    """
    try:
        stored = manifest.get("combiner_weights", {})
        return {
            name: np.frombuffer(bytes.fromhex(content), "<f4").astype(np.float32)
            for name, content in stored.items()
        }
    except (AttributeError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"the combiner_weights of a manifest must be float32 in hexadecimal: {e}; restore another step."
        ) from e


def optimizers_to_json(optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """Optimizers by table, without arguments that JSON has not, or that are callables without a name."""
    stored: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        try:
            stored[name] = optimizer.to_dict()
        except ValueError:
            stored[name] = {"name": optimizer.name, "arguments": storable_arguments(optimizer)}
    return stored


def optimizers(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What trained each table, as `optimizers_to_json` gives it; older manifests do not say.

    Raises:
      CheckpointError: if it is not what `optimizers_to_json` gives.
    """
    stored = manifest.get("optimizers", {})
    if not isinstance(stored, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in stored.values()
    ):
        raise CheckpointError("the optimizers of a manifest must have names; restore another step.")
    return stored
