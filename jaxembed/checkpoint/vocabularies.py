"""The vocabulary files of a bundle, each named by its digest."""

import dataclasses
import pathlib
from typing import Any

from jaxembed import structure
from jaxembed.checkpoint.digests import CheckpointError
from jaxembed.checkpoint.files import sync_folder, write_file
from jaxembed.features import flat_features
from jaxembed.id_mapping import VocabularyFile

FOLDER = "vocabularies"


def copy_vocabularies(feature_config: Any, directory: pathlib.Path) -> None:
    """Copies the files that a configuration names into a bundle.

    Raises:
      ValueError: if one cannot be read, or is not the one that was recorded.
    """
    files = {vocabulary.digest: vocabulary for vocabulary in _vocabularies(feature_config)}
    if not files:
        return
    (directory / FOLDER).mkdir()
    for digest, vocabulary in files.items():
        write_file(directory / FOLDER / _name(digest), [vocabulary.read()])
    sync_folder(directory / FOLDER)


def read_vocabularies(feature_config: Any) -> None:
    """Reads the files that a configuration names, and leaves them where they are.

    Raises:
      ValueError: as `copy_vocabularies`.
    """
    for vocabulary in _vocabularies(feature_config):
        vocabulary.read()


def locate_vocabularies(feature_config: Any, directory: pathlib.Path) -> Any:
    """The configuration of a bundle with its own files, which are read and compared when they are needed."""
    if not any(_vocabularies(feature_config)):
        return feature_config
    if (directory / FOLDER).is_symlink():
        raise CheckpointError(f"{directory / FOLDER} is a symbolic link; a bundle holds its own files.")

    def locate(_, feature):
        vocabulary = feature.preprocessing
        if not isinstance(vocabulary, VocabularyFile):
            return feature
        file = directory / FOLDER / _name(vocabulary.digest)
        return dataclasses.replace(feature, preprocessing=dataclasses.replace(vocabulary, file=str(file)))

    return structure.map_leaves(locate, feature_config)


def load_vocabularies(feature_config: Any) -> None:
    """Reads all of them now.

    Raises:
      CheckpointError: if one cannot be read, or is not the one that was recorded.
    """
    for vocabulary in _vocabularies(feature_config):
        try:
            vocabulary.load()
        except ValueError as e:
            raise CheckpointError(str(e)) from e


def _vocabularies(feature_config: Any) -> list[VocabularyFile]:
    found = [feature.preprocessing for feature in flat_features(feature_config).values()]
    return [item for item in found if isinstance(item, VocabularyFile)]


def _name(digest: str) -> str:
    if len(digest) != 32 or not set(digest) <= set("0123456789abcdef"):
        raise CheckpointError(f"the digest of a vocabulary must be 32 hexadecimal digits, got {digest!r:.80}.")
    return f"{digest}.txt"
