"""RequestPacker: checks and packs what a protocol read, for a signature; needs no table and no model."""

from collections.abc import Mapping
from typing import Any

from jaxembed import raw_ids
from jaxembed.preprocessing import preprocess_leaf
from jaxembed.serve.checks import BadIdError
from jaxembed.serve.dense import DenseInputs
from jaxembed.serve.features import ServedFeature
from jaxembed.serve.layout import pack_alone
from jaxembed.serve.packing import Packer
from jaxembed.serve.rows import Rows

from .errors import RequestError
from .request import Flat
from .signature import Signature


class RequestPacker:
    """Packs requests of a signature.

    Args:
      signature: of the model.
    """

    def __init__(self, signature: Signature):
        self._features, self._dense = signature.features, DenseInputs(signature.dense)
        self._packer = Packer(list(signature.features.values()))

    def pack(
        self, inputs: Mapping[str, Any] | Flat, weights: Mapping[str, Any], dense: Mapping[str, Any]
    ) -> Rows:
        """Checks and packs a request.

        Args:
          inputs: by path of the feature, what a ServingFunction takes; or Flat.
          weights: by path, for some.
          dense: by name, [B, ...].

        Raises:
          RequestError: if it is not what a ServingFunction takes, or a vocabulary cannot be read.
        """
        try:
            if isinstance(inputs, Flat):
                packed = self._packer.pack_flat(inputs.ids, inputs.lengths)
                return Rows(packed, self._dense.read(dense, packed.rows))
            return self._pack_nested(inputs, weights, dense)
        except BadIdError as e:
            raise RequestError(400, str(e), feature=e.feature) from None
        except (ValueError, TypeError, OverflowError) as e:
            raise RequestError(400, str(e)) from None

    def _pack_nested(
        self, inputs: Mapping[str, Any], weights: Mapping[str, Any], dense: Mapping[str, Any]
    ) -> Rows:
        paths = list(self._features)
        for given, what in ((inputs, "input"), (weights, "weight")):
            unknown = given.keys() - self._features.keys()
            if unknown:
                raise RequestError(400, f"{what} {min(unknown)!r} is no feature; features are {paths}.")
        missing = [path for path in paths if path not in inputs]
        if missing:
            raise RequestError(400, f"input {missing[0]!r} is missing; features are {paths}.")
        leaves = [
            inputs[path] if f.config.preprocessing is None else _rows_of(path, f, inputs[path])
            for path, f in self._features.items()
        ]
        request = self._packer.measure(leaves, [weights.get(path) for path in paths] if weights else None)
        arrays = self._dense.read(dense, request.rows)
        return Rows(pack_alone(self._packer, request), arrays)


def _rows_of(path: str, feature: ServedFeature, ids: Any) -> Any:
    if feature.config.preprocessing is not None:
        try:
            feature.config.preprocessing.load()
        except ValueError as e:  # no fault of the request's
            raise RequestError(503, f"the ids of feature {path!r} have no rows: {e}", retry_after=1) from None
    try:
        return preprocess_leaf(path, feature.config, ids)
    except ValueError as e:
        # The error of an id is raised while that of the mapping is handled.
        is_id = isinstance(e.__context__, raw_ids.BadIdError)
        raise RequestError(400, str(e), feature=path if is_id else None) from None
