"""jaxembed's own: a canonical checkpoint, both ways, and a serving bundle to be read."""

import pathlib

from jaxembed.checkpoint import layout
from jaxembed.checkpoint.bundle_reading import is_bundle, open_bundle
from jaxembed.checkpoint.reading import open_checkpoint
from jaxembed.checkpoint.writing import write_step
from jaxembed.convert.interface import Contents, Options, Source
from jaxembed.serialization import feature_config_to_json


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
        return Source(
            bundle.stored(), {}, bundle.step, bundle.feature_config, bundle.metadata, bundle.combiner_weights
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
