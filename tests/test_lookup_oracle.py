"""Every recorded answer of TensorFlow, eagerly and under jit, on every path.

Compiling takes far longer than looking up, so that the cases run 25 to a program; eager plain JAX, whose every
operation is a program, runs a part of them in most runs.
"""

import jax
import pytest

from jaxembed import kernel, serving_embedding_lookup, use_backend
from tests import oracle

CASES = oracle.load_cases()
GROUPS = {
    f"{group[0]}..{group[-1]}": group for group in [list(CASES)[i : i + 25] for i in range(0, len(CASES), 25)]
}


@pytest.fixture(params=["xla", "native"])
def path(request):
    if request.param == "native" and not kernel.available():
        pytest.skip(f"no native kernel: {kernel.unavailable_reason()}")
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("group", GROUPS)
def test_eager(group):
    eagerly(group, "native" if kernel.available() else "xla")


@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=pytest.mark.slow) if i % 5 else group for i, group in enumerate(GROUPS)]
)
def test_eager_plain_jax(group):
    eagerly(group, "xla")


def eagerly(group, path):
    case = oracle.merge({id: CASES[id] for id in GROUPS[group]})
    with use_backend(path):
        outputs = serving_embedding_lookup(case.inputs, case.weights, case.tables, case.feature_config)
    oracle.check(case, outputs)


@pytest.mark.parametrize("group", GROUPS)
def test_jit(group, path):
    case = oracle.merge({id: CASES[id] for id in GROUPS[group]})

    @jax.jit
    def lookup(inputs, weights, tables):
        return serving_embedding_lookup(inputs, weights, tables, case.feature_config)

    oracle.check(case, lookup(case.inputs, case.weights, case.tables))


def test_all_cases_are_there():
    assert len(CASES) == 250
    assert sum(len(case.inputs) for case in CASES.values()) == 629


def test_a_wrong_answer_is_reported_with_its_case_and_feature():
    name, case = next(iter(CASES.items()))
    merged = oracle.merge({name: case})
    outputs = serving_embedding_lookup(merged.inputs, merged.weights, merged.tables, merged.feature_config)
    feature = next(iter(outputs))
    outputs[feature] = outputs[feature] + 1
    with pytest.raises(AssertionError, match=f"{feature}: "):
        oracle.check(merged, outputs)
