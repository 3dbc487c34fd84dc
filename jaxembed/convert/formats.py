"""The formats by name, and what a path looks like."""

import importlib
import pathlib
from types import ModuleType
from typing import NamedTuple


class Format(NamedTuple):
    """A module of this package; `extra` is the extra of jaxembed that it needs."""

    module: str
    about: str
    suffixes: tuple[str, ...] = ()
    extra: str | None = None


#: In the order in which a path is compared with them.
FORMATS = {
    "jaxembed": Format("canonical", "a canonical checkpoint"),
    "jax-tpu-embedding": Format(
        "jax_tpu_embedding", "embedding variables of jax-tpu-embedding, saved by Orbax", (), "sparsecore"
    ),
    "keras-rs": Format("keras_rs", "a keras-rs model's weights file", (".h5",), "keras"),
    "npz": Format("npz", "one .npz file of arrays", (".npz",)),
    "torchrec": Format(
        "torchrec",
        "a TorchRec state dict, .pt or .safetensors, or torch.distributed.checkpoint's folder",
        (".pt", ".pth"),
        "torch",
    ),
    "safetensors": Format("safetensors", "one safetensors file", (".safetensors",)),
    "tensorflow": Format(
        "tensorflow", "a TPUEmbedding's object checkpoint of TensorFlow, stacked or not", (), "tensorflow"
    ),
    "saved-model": Format(
        "saved_model",
        "a SavedModel for TensorFlow Serving that looks features up",
        (),
        "tensorflow",
    ),
    "npy": Format("npy", "a folder of .npy files"),
}


def load(name: str) -> ModuleType:
    """The module of a format.

    Raises:
      ValueError: if there is none of that name.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}.")
    return importlib.import_module(f"jaxembed.convert.{FORMATS[name].module}")


def needed(package: str, name: str) -> ModuleType:
    """The package that a format needs, imported.

    Raises:
      ValueError: naming the extra that has it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise ValueError(
            f"the format {name} needs the package {package!r}; install it with "
            f"pip install 'jaxembed[{FORMATS[name].extra}]'."
        ) from e


def guess_source(path: pathlib.Path) -> str:
    """The format that `path` looks like.

    Raises:
      FileNotFoundError: if there is nothing, beside or below it.
      ValueError: if it looks like none.
    """
    for name in FORMATS:
        if load(name).matches(path):
            return name
    if not path.exists():
        raise FileNotFoundError(f"nothing is at {path}.")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{path} is an empty folder.")
    raise ValueError(
        f"{path} looks like none of {', '.join(FORMATS)}; say which one it is (source_format, or --from of convert)."
    )


def guess_target(path: pathlib.Path) -> str:
    """The format that a name asks for; without a suffix that says so, a checkpoint.

    Raises:
      ValueError: if it is that of one array.
    """
    if path.suffix == ".npy":
        raise ValueError(
            f"{path} would be one array; pass a name without {path.suffix}, with target_format (--to) npy for a folder of "
            ".npy files, or one that ends in .npz."
        )
    for name, form in FORMATS.items():
        if path.suffix and path.suffix in form.suffixes:
            return name
    return "jaxembed"
