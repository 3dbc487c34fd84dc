"""jaxembed's own: a canonical checkpoint, both ways, and a serving bundle to be read."""

import pathlib

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.bundle_reading import is_bundle, open_bundle
from jaxembed.checkpoint.reading import open_checkpoint
from jaxembed.checkpoint.writing import write_step
from jaxembed.convert.arrays import refuse_types
from jaxembed.convert.interface import Contents, Options, Source
from jaxembed.convert.sidecar import sidecar_of
from jaxembed.serialization import feature_config_to_json

#: Of the names of a table and slot; the store takes 65,535, with what is appended.
MAX_NAME = 65_000


def matches(path: pathlib.Path) -> bool:
    """Whether it is a checkpoint, one step of one, a bundle, or the folder of its versions."""
    if not path.is_dir():
        return False
    steps = [path, *(p for p in path.iterdir() if p.name.isdecimal())]
    return is_bundle(path) or any((step / layout.MANIFEST / "metadata").is_file() for step in steps)


def read(path: pathlib.Path, options: Options) -> Source:
    """Opens it; what is read is verified."""
    if is_bundle(path):
        bundle = open_bundle(path, options.step)
        parts = {"the dense model": bundle.model is not None, "the exported model": bundle.has_exported}
        return Source(
            bundle.stored(),
            {},
            bundle.step,
            bundle.feature_config,
            bundle.metadata,
            bundle.combiner_weights,
            notes=tuple(f"left out: {part}" for part, is_there in parts.items() if is_there),
        )
    opened = open_checkpoint(path, options.step)
    notes = ()
    if layout.MODEL in opened.manifest["digests"]:
        notes = ("left out: the dense model",)
    manifest = opened.manifest
    return Source(
        opened.tables,
        opened.slots,
        manifest["step"],
        opened.feature_config,
        manifest["metadata"],
        layout.combiner_weights(manifest),
        layout.optimizers(manifest),
        notes,
    )


def check(out: pathlib.Path, contents: Contents) -> None:
    """Of types, those that Orbax reads back; of names, those that its store takes; of sizes, those that a manifest has digests
    for."""
    del out
    refuse_types(contents, "a canonical checkpoint", ("float32", "float16", "bfloat16", "float64"))
    sidecar_of(contents)
    layout.check_digests((stream.shape, stream.dtype) for stream in contents.streams)
    for stream in contents.streams:
        length = sum(len(layout.encode_name(name)) + 1 for name in (stream.table, stream.slot or ""))
        if length > MAX_NAME:
            raise ValueError(
                f"table {stream.table[:40]!r}... has too long a name for a checkpoint: {length} characters of at most {MAX_NAME}."
            )


def write(out: pathlib.Path, contents: Contents) -> list[str]:
    """Writes a step."""
    out.mkdir()
    slots: dict = {}
    for stream in contents.slots:
        slots.setdefault(stream.table, {})[stream.slot] = (stream.shape, stream.dtype, stream.blocks())
    write_step(
        out,
        contents.step,
        feature_config_to_json(contents.feature_config),
        {stream.table: (stream.shape, stream.dtype, stream.blocks()) for stream in contents.tables},
        slots,
        contents.metadata,
        contents.combiner_weights,
        contents.optimizers,
    )
    return []
