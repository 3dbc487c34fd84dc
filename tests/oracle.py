"""The recorded answers of TensorFlow 2.21's `serving_embedding_lookup` (tests/data/README.md)."""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxembed import FeatureConfig, RaggedTensor, SparseTensor, TableConfig

DATA = pathlib.Path(__file__).parent / "data"


class Case(NamedTuple):
    """One recorded call: its arguments, and TensorFlow's outputs by feature as float32."""

    inputs: dict[str, Any]
    weights: dict[str, Any]
    tables: dict[TableConfig, jnp.ndarray]
    feature_config: dict[str, FeatureConfig]
    expected: dict[str, np.ndarray]


def case_ids() -> list[str]:
    """The ids of all 250 cases."""
    return list(_recorded())


def load_case(id: str) -> Case:
    """The case of an id."""
    return _case(_recorded()[id], _arrays())


@functools.cache
def _recorded() -> dict[str, Any]:
    return {case["id"]: case for case in json.loads((DATA / "lookup_oracle.json").read_text())["cases"]}


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    with np.load(DATA / "lookup_oracle.npz") as arrays:
        return dict(arrays)


def _case(case, arrays) -> Case:
    configs = [
        TableConfig(t["vocabulary_size"], t["dim"], combiner=t["combiner"], name=t["name"], dtype=t["dtype"])
        for t in case["tables"]
    ]
    tables = {
        config: jnp.asarray(arrays[t["values"]].astype(config.dtype))
        for config, t in zip(configs, case["tables"], strict=True)
    }
    result = Case({}, {}, tables, {}, {})
    for f in case["features"]:
        path = f["path"]
        result.feature_config[path] = FeatureConfig(
            configs[f["table"]],
            max_sequence_length=f["max_sequence_length"],
            validate_weights_and_indices=f["validate_weights_and_indices"],
            output_shape=f["output_shape"],
        )
        values = arrays[f["values"]]
        weight = None if f["weight"] is None else arrays[f["weight"]]
        if f["kind"] == "ragged":
            splits = arrays[f["row_splits"]]
            ids = RaggedTensor(values, splits)
            weight = weight if weight is None else RaggedTensor(weight, splits)
        elif f["kind"] == "sparse":
            indices = arrays[f["indices"]]
            ids = SparseTensor(indices, values, f["dense_shape"])
            weight = weight if weight is None else SparseTensor(indices.copy(), weight, f["dense_shape"])
        else:
            ids = values
        result.inputs[path], result.weights[path] = ids, weight
        result.expected[path] = arrays[f["expected"]]
    return result


def merge(cases: dict[str, Case]) -> Case:
    """Many cases as one: a feature or table "x" of case "c" is "c/x"."""
    merged = Case({}, {}, {}, {}, {})
    for name, case in cases.items():
        renamed = {table: dataclasses.replace(table, name=f"{name}/{table.name}") for table in case.tables}
        merged.tables.update({renamed[table]: values for table, values in case.tables.items()})
        for path, feature in case.feature_config.items():
            key = f"{name}/{path}"
            merged.inputs[key] = case.inputs[path]
            merged.weights[key] = case.weights[path]
            merged.expected[key] = case.expected[path]
            merged.feature_config[key] = dataclasses.replace(feature, table=renamed[feature.table])
    return merged


def check(case: Case, outputs: dict[str, Any]) -> None:
    """Asserts that a lookup of the case gave what TensorFlow gave, and says for which feature it did not."""
    assert list(outputs) == list(case.inputs)
    wrong = []
    for path in case.expected:
        try:
            _check_feature(case, path, outputs[path])
        except AssertionError as e:
            wrong.append(f"{path}: {e}")
    if wrong:
        raise AssertionError("\n".join(wrong))


def _check_feature(case: Case, path: str, actual: Any) -> None:
    """To 1e-6 relative + absolute for float32 tables, and one unit in the last place for narrower ones.

    TensorFlow sums ragged rows in the table's own type, and so strays from the true value by up to 4
    units in 4 of the features. We sum in float32: there, we must be within one unit of the float64 sum.
    """
    expected = case.expected[path]
    dtype = case.feature_config[path].table.dtype
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    actual = np.asarray(actual, np.float32)
    if dtype == np.float32:
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
        return
    far = ~(np.abs(actual - expected) <= unit_in_the_last_place(expected, dtype))  # NaN is far
    if far.any():
        assert isinstance(case.inputs[path], RaggedTensor), "more than one unit in the last place away"
        exact = ragged_in_float64(case, path).reshape(expected.shape)
        assert (np.abs(actual - exact) <= unit_in_the_last_place(exact, dtype)).all(), "far from float64"


def unit_in_the_last_place(x: np.ndarray, dtype) -> np.ndarray:
    """Spacing of the numbers of a narrow type around x."""
    info = jnp.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(x), float(info.smallest_normal))))
    return np.exp2(exponent) * float(info.eps)


def ragged_in_float64(case: Case, path: str) -> np.ndarray:
    """The [B, D] combination of a ragged feature, from the definition."""
    config = case.feature_config[path].table
    table = np.asarray(case.tables[config], np.float64)
    weights = case.weights[path]
    bags = case.inputs[path].to_lists()
    all_weights = [[1.0] * len(bag) for bag in bags] if weights is None else weights.to_lists()
    out = np.zeros((len(bags), config.dim))
    for b, (bag, w) in enumerate(zip(bags, all_weights, strict=True)):
        total = sum((wi * table[i] for i, wi in zip(bag, w, strict=True)), np.zeros(config.dim))
        divisor = {"sum": 1.0, "mean": sum(w), "sqrtn": np.sqrt(np.sum(np.square(w)))}[config.combiner]
        out[b] = total / divisor if divisor else 0.0
    return out
