"""Raw ids to rows of a table in TensorFlow's own operations, to the same rows as `jaxembed.preprocess`."""

import pathlib
from typing import Any

from jaxembed.id_mapping import HashBuckets, Preprocessing, VocabularyFile

MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
STEP = 0x9E3779B97F4A7C15


def check_mapping(path: str, preprocessing: Preprocessing) -> None:
    """Raises ValueError where TensorFlow cannot compute the rows of a feature."""
    if preprocessing.dtype == "string" and (
        isinstance(preprocessing, HashBuckets) or preprocessing.num_oov_buckets
    ):
        raise ValueError(
            f"feature {path!r} hashes strings by XXH3, which TensorFlow has no operation for; a SavedModel can map "
            "integers, and strings of a VocabularyFile with num_oov_buckets=0. Else export with a feature configuration "
            "without its preprocessing (--feature-config), and send rows (jaxembed.preprocess)."
        )
    if isinstance(preprocessing, VocabularyFile) and preprocessing.dtype == "string":
        odd = next((token for token in preprocessing.tokens() if b"\r" in token), None)
        if odd is not None:
            raise ValueError(
                f"feature {path!r}: the vocabulary's {odd!r:.80} holds a carriage return, which TensorFlow drops "
                "when it reads a vocabulary; remove it."
            )


class IdMapping:
    """The preprocessing of one feature, inside of a SavedModel.

    Args:
      tf: TensorFlow.
      path: of the feature, for errors.
      preprocessing: that `check_mapping` lets through.
      scratch: a folder for the vocabulary, which has to be there until the SavedModel is saved.
    """

    def __init__(self, tf: Any, path: str, preprocessing: Preprocessing, scratch: pathlib.Path):
        self._tf, self._path, self._preprocessing = tf, path, preprocessing
        self.vocabulary: Any = None
        if isinstance(preprocessing, VocabularyFile) and preprocessing.size:
            file = scratch / f"{preprocessing.digest}.txt"
            tokens = preprocessing.tokens()
            if preprocessing.dtype == "int64":
                tokens = [b"%d" % token for token in tokens]
            file.write_bytes(b"".join(token + b"\n" for token in tokens))
            initializer = tf.lookup.TextFileInitializer(
                str(file),
                tf.string if preprocessing.dtype == "string" else tf.int64,
                tf.lookup.TextFileIndex.WHOLE_LINE,
                tf.int64,
                tf.lookup.TextFileIndex.LINE_NUMBER,
            )
            self.vocabulary = tf.lookup.StaticHashTable(initializer, -1)

    def rows(self, ids: Any, live: Any) -> Any:
        """int64 [N] rows of [N] ids; those not `live` may have no row."""
        tf, preprocessing = self._tf, self._preprocessing
        if isinstance(preprocessing, HashBuckets):
            return self._hashed(ids, preprocessing)
        found = tf.fill(tf.shape(ids), tf.constant(-1, tf.int64))
        if self.vocabulary is not None:
            found = self.vocabulary.lookup(ids)
        if preprocessing.num_oov_buckets:
            buckets = HashBuckets(preprocessing.num_oov_buckets, preprocessing.dtype)
            return tf.where(found < 0, preprocessing.size + self._hashed(ids, buckets), found)
        missing = live & (found < 0)
        message = f"feature {self._path!r} has an id that is not in its vocabulary"
        with tf.control_dependencies(
            [tf.debugging.Assert(~tf.reduce_any(missing), [message, tf.boolean_mask(ids, missing)])]
        ):
            return tf.identity(found)

    def _hashed(self, ids: Any, buckets: HashBuckets) -> Any:
        tf = self._tf
        hashed = self._splitmix64(tf.bitcast(ids, tf.uint64))
        if buckets.seed:
            hashed = self._splitmix64(tf.bitwise.bitwise_xor(hashed, tf.constant(buckets.seed, tf.uint64)))
        return tf.cast(hashed % tf.constant(buckets.num_buckets, tf.uint64), tf.int64)

    def _splitmix64(self, z: Any) -> Any:
        """As `jaxembed.hashing.hash_ints`."""
        tf = self._tf
        z += tf.constant(STEP, tf.uint64)
        for shift, factor in MIX:
            z = self._shifted(z, shift) * tf.constant(factor, tf.uint64)
        return self._shifted(z, 31)

    def _shifted(self, z: Any, shift: int) -> Any:
        bitwise = self._tf.bitwise
        return bitwise.bitwise_xor(z, bitwise.right_shift(z, self._tf.constant(shift, self._tf.uint64)))
