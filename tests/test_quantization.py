"""Quantization: the same bits in every program, codes served as they were trained, and what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxembed as je
from jaxembed import kernel
from jaxembed.buckets import Buckets
from jaxembed.quantization import (
    UnquantizableError,
    quantization_error,
    quantize,
    quantize_as_trained,
    row_codec,
    simulate_on_host,
    simulate_quantization,
)

CONFIGS = (
    je.QuantizationConfig(2, -1.0, 1.0),
    je.QuantizationConfig(16, -0.3, 0.7),
    je.QuantizationConfig(255, 0.0, 0.1),
    je.QuantizationConfig(256, -1.0, 1.0),
    je.QuantizationConfig(65536, -3.3, 1e2),
)
HOWS = ("int8", "int4", CONFIGS[1], CONFIGS[3])
V, D = 23, 7
simulate = jax.jit(simulate_quantization, static_argnums=1)


@pytest.fixture(params=["xla", "native"])
def path(request):
    if request.param == "native" and not kernel.available():
        pytest.skip(f"no native kernel: {kernel.unavailable_reason()}")
    with je.use_backend(request.param):
        yield request.param


def table(seed=0, shape=(V, D), spread=0.6):
    return (np.random.default_rng(seed).normal(size=shape) * spread).astype(np.float32)


def tensorflow_values(x, config):
    """The formula that TensorFlow documents, in float64."""
    lower, upper = float(np.float32(config.lower)), float(np.float32(config.upper))
    quantum = (upper - lower) / (config.num_buckets - 1)
    return np.floor((np.clip(x.astype(np.float64), lower, upper) - lower) / quantum + 0.5) * quantum + lower


def near_borders(config):
    """Values at, one float above and one below each of some borders, and far outside."""
    steps = np.unique(np.linspace(0, 2 * config.num_buckets - 2, 200).round()).astype(np.float32)
    at = Buckets(config).at(steps)
    extremes = np.float32([-3e38, 3e38, -np.inf, np.inf, 0.0, -0.0, 1e-40, -1e-40, config.lower, config.upper])
    return np.concatenate([at, np.nextafter(at, np.float32(9e9)), np.nextafter(at, np.float32(-9e9)), extremes])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_program_gives_the_same_bits(config):
    """Host, compiled, op by op and inside of a larger fused expression, even one float beside a border."""
    x = near_borders(config)
    expected = simulate_on_host(x, config)
    with jax.disable_jit():
        np.testing.assert_array_equal(simulate_quantization(x, config), expected)
    np.testing.assert_array_equal(simulate(x, config), expected)
    fused = jax.jit(lambda x: simulate_quantization(x * 2 - x, config) * 4)
    finite = x[np.abs(x) < 1e37]
    np.testing.assert_array_equal(fused(finite), simulate_on_host(finite, config) * 4)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_values_are_those_that_tensorflow_documents(config):
    width = config.upper - config.lower
    x = (
        np.random.default_rng(1)
        .uniform(config.lower - width / 4, config.upper + width / 4, 5000)
        .astype(np.float32)
    )
    quantum, wanted = width / (config.num_buckets - 1), tensorflow_values(x, config)
    found = np.asarray(simulate(x, config))
    # Ties that float32 decides otherwise apart, within one rounding.
    away = np.abs((x - config.lower) / quantum % 1 - 0.5) > 0.02
    np.testing.assert_allclose(found[away], wanted[away], rtol=0, atol=2 * np.spacing(np.float32(width)))
    assert np.abs(found - wanted).max() <= 1.01 * quantum
    values = Buckets(config).values(np.arange(config.num_buckets, dtype=np.float32))
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose(values[[0, -1]], [config.lower, config.upper], rtol=1e-6)
    np.testing.assert_array_equal(simulate(values, config), values)


@settings(max_examples=60)
@given(
    st.integers(2, 300),
    st.floats(-100, 100, width=32),
    st.floats(2**-6, 1000, width=32),
    st.integers(0, 2**32 - 1),
)
@example(256, 100.0, 0.25, 0)
def test_codes_are_nearest(num_buckets, lower, width, seed):
    config = je.QuantizationConfig(num_buckets, lower, lower + width)
    if width / (num_buckets - 1) < 9 * np.spacing(np.float32(max(abs(lower), abs(lower + width)))):
        return  # too fine, or nearly
    buckets = Buckets(config)
    x = (lower + width * np.random.default_rng(seed).uniform(-0.2, 1.2, 300)).astype(np.float32)
    values = buckets.values(np.arange(num_buckets, dtype=np.float32))
    found = buckets.values(buckets.codes(x))
    clipped = np.clip(x, config.lower, config.upper).astype(np.float64)
    best = np.abs(clipped[:, None] - values).min(axis=1)
    assert (np.abs(clipped - found) <= best + 2 * np.spacing(np.float32(abs(lower) + width))).all()


def test_gradients_pass_straight_through():
    config, x = CONFIGS[1], jnp.asarray([-5.0, -0.3, 0.0, 0.31, 9.0])
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(simulate_quantization(x, config) ** 2)))(x)
    np.testing.assert_array_equal(gradient, 2 * simulate(x, config))
    assert jax.jvp(lambda x: simulate_quantization(x, config), (x,), (x,))[1].tolist() == x.tolist()
    assert np.isnan(simulate(jnp.asarray(np.nan), config))
    half = simulate(jnp.asarray([0.1], jnp.bfloat16), config)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (je.QuantizationConfig(65537, 0, 1), "num_buckets must be at most 65536 to quantize, got 65537"),
        (je.QuantizationConfig(256, 1000, 1000.01), "cannot tell apart; use fewer buckets or a wider range"),
        (je.QuantizationConfig(2, 0, 1e39), "has an end beyond float32; use a narrower range"),
        (
            je.QuantizationConfig(16, -1e-30, 1e-30),
            r"values 1.33\d+e-31 apart, but they must be at least 2\*\*-90",
        ),
    ],
)
def test_ranges_that_float32_cannot_hold(config, message):
    with pytest.raises(ValueError, match=message):
        simulate_quantization(jnp.ones(3), config)


@pytest.mark.parametrize("dim", [1, 7, 8])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_codes_and_their_errors(how, dim):
    rows = table(shape=(V, dim))
    rows[3], rows[4] = 0, 0.25
    made = quantize(rows, how)
    assert (made.shape, made.dtype) == ((V, dim), np.float32)
    values = np.asarray(made.dequantize())
    np.testing.assert_array_equal(values, made.host_rows(0, V))
    np.testing.assert_array_equal(values[2:9], made.host_rows(2, 9))
    if isinstance(how, str):
        steps = (rows.max(axis=1) - rows.min(axis=1)) / (255 if how == "int8" else 15)
        assert (np.abs(values - rows) <= 0.501 * steps[:, None] + 1e-6).all()
        np.testing.assert_array_equal(values[3:5], rows[3:5])
    else:
        np.testing.assert_array_equal(values, simulate_on_host(rows, how))
    error = quantization_error(rows, made)
    assert error.max == np.abs(values - rows).max()
    assert error.mean == pytest.approx(np.abs(values - rows).mean(), rel=1e-6)
    packed = 2 if made.kind in ("int4", "codes4") else 1
    assert made.codes.nbytes == V * (-(-dim // packed) + (8 if isinstance(how, str) else 0))


def test_of_two_codes_the_even_column_is_low():
    made = quantize(np.float32([[0, 1, 2], [15, 14, 13]]), je.QuantizationConfig(16, 0, 15))
    assert made.codes.tolist() == [[0x10, 0x02], [0xEF, 0x0D]]


def test_codes_of_other_libraries():
    codes = np.random.default_rng(0).integers(0, 256, (V, D)).astype(np.uint8)
    scale, bias = np.full(V, 2.0**-7, np.float32), np.full(V, -1, np.float32)
    made = je.QuantizedTable.from_codes(codes, scale, bias)
    np.testing.assert_array_equal(made.dequantize(), codes * scale[:, None] + bias[:, None])
    shifted = (codes.astype(np.int16) - 128).astype(np.int8)
    signed = je.QuantizedTable.from_codes(shifted, scale, bias + 128 * scale)
    np.testing.assert_array_equal(signed.codes, made.codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": np.zeros((V, D), np.int32)}, r"codes must be uint8 or int8 \[V, D\], got int32\[23, 7\]"),
        ({"codes": np.zeros(V, np.uint8)}, r"codes must be uint8 or int8 \[V, D\], got uint8\[23\]"),
        ({"scale": np.ones(1, np.float32)}, r"scale must be float32 \[V\] = \[23\], got float32\[1\]"),
        ({"bias": np.ones((V, 1), np.float32)}, r"bias must be float32 \[V\] = \[23\], got float32\[23, 1\]"),
    ],
)
def test_codes_that_do_not_fit(arguments, message):
    fitting = {
        "codes": np.zeros((V, D), np.uint8),
        "scale": np.ones(V, np.float32),
        "bias": np.ones(V, np.float32),
    }
    with pytest.raises(ValueError, match=message):
        je.QuantizedTable.from_codes(**fitting | arguments)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("path", ["xla", "native"])
def test_requests_without_ids(how, path):
    made = quantize(table(), how)
    config = je.TableConfig(V, D, combiner="sum", name="t")
    with je.use_backend(path):
        out = je.serving_embedding_lookup(
            {"f": je.RaggedTensor.from_lists([[], []])}, None, {config: made}, {"f": je.FeatureConfig(config)}
        )
    np.testing.assert_array_equal(out["f"], np.zeros((2, D)))
    assert made.host_rows(2, 2).shape == (0, D)


def test_int8_rows_are_those_of_torch():
    torch = pytest.importorskip("torch")
    rows = np.linspace(-2, 2, V * D, dtype=np.float32).reshape(V, D)
    packed = torch.ops.quantized.embedding_bag_byte_prepack(torch.from_numpy(rows)).numpy()
    made = je.QuantizedTable("int8", D, packed)
    expected = torch.ops.quantized.embedding_bag_byte_unpack(torch.from_numpy(packed)).numpy()
    np.testing.assert_allclose(made.host_rows(0, V), expected, rtol=1e-6, atol=1e-6)
    assert made.codes.shape == quantize(rows, "int8").codes.shape


def test_refusals():
    rows = table()
    rows[2, 1] = np.nan
    for how in HOWS:
        with pytest.raises(
            ValueError, match=r"holds NaN.*, first at row 2, column 1, which no code stands for"
        ):
            quantize(rows, how)
    with pytest.raises(ValueError, match=r"must be one of .*'int4'.* or a QuantizationConfig, got 'int3'"):
        quantize(table(), "int3")
    of_many_buckets = je.TableConfig(V, D, name="t", quantization_config=je.QuantizationConfig(257, 0, 1))
    with pytest.raises(ValueError, match="num_buckets must be at most 256, got 257"):
        row_codec(je.QuantizationConfig(257, 0, 1))
    for wrong in (np.zeros(3), np.zeros((3, 0)), np.zeros((3, 3), int), [1.0, 2.0]):
        for call in (quantize, lambda t, _: quantize_as_trained(t, of_many_buckets)):
            with pytest.raises(ValueError, match=r"table must be a floating point array of \[V, D\] with D"):
                call(wrong, "int8")
    with pytest.raises(ValueError, match=r"codes must be an array, got list; convert it with numpy\.asarray"):
        je.QuantizedTable("int8", 3, [[1, 2, 3]])
    with pytest.raises(ValueError, match="codebook must be an array, got list"):
        je.QuantizedTable("codes8", 3, np.zeros((1, 3), np.uint8), [0.0] * 256)
    with pytest.raises(ValueError, match=r"codes of int8 rows must be uint8\[0, 11\], got uint8\[\]"):
        je.QuantizedTable("int8", 3, np.uint8(1))
    made = quantize(table(), "int8")
    with pytest.raises(ValueError, match=r"codebook of codes8 rows must be float32\[256\], got None"):
        je.QuantizedTable("codes8", D, np.zeros((V, D), np.uint8))
    with pytest.raises(ValueError, match=r"codes of int4 rows must be uint8\[23, 12\], got uint8\[23, 15\]"):
        dataclasses.replace(made, kind="int4")
    with pytest.raises(ValueError, match="kind must be one of"):
        dataclasses.replace(made, kind="int2")
    with pytest.raises(ValueError, match="dim must be an int of at least 1, got 0"):
        dataclasses.replace(made, dim=0)
    with pytest.raises(ValueError, match="dtype must be a floating point type, got int8"):
        dataclasses.replace(made, dtype=np.int8)
    with pytest.raises(ValueError, match=r"table must be \[23, 7\], got \[22, 7\]"):
        quantization_error(table()[1:], made)


@pytest.mark.parametrize("how", ["int8", "int4"])
@pytest.mark.parametrize(
    "row", [[-3e38, 1e38, 3e38], [1e38, np.finfo(np.float32).max, 2e38], [0, np.finfo(np.float32).max, 0]]
)
def test_rows_too_wide_for_float32_are_refused(how, row):
    rows = np.float32([[-1.6e38, 0, 1.6e38], row])
    with pytest.raises(UnquantizableError, match=r"row 1 of the table ranges from .*; clip or scale the rows"):
        quantize(rows, how)
    made = quantize(rows[:1], how)
    assert quantization_error(rows[:1], made).max < 3.2e38 / (255 if how == "int8" else 15)


def features(config, rows):
    """A table looked up in all three layouts, and as a sequence."""
    feature, sequence = je.FeatureConfig(config), je.FeatureConfig(config, max_sequence_length=3)
    bags = je.RaggedTensor.from_lists([[1, 2, 2, 22], [], [5], [0, 9]])
    inputs = {
        "dense": np.array([[3, 0], [V - 1, 3]]),
        "ragged": bags,
        "sparse": je.SparseTensor.from_lists([[4, -1, 6], [7]]),
        "sequence": bags,
    }
    return inputs, {"dense": feature, "ragged": feature, "sparse": feature, "sequence": sequence}


@pytest.mark.parametrize(
    ("how", "dtype"),
    [*((how, np.float32) for how in HOWS), (HOWS[0], jnp.bfloat16), (HOWS[2], jnp.bfloat16)],
    ids=str,
)
def test_lookups_equal_those_of_the_values(path, how, dtype):
    """Bit for bit, since both sum the same float32 values in the same order."""
    config = je.TableConfig(V, D, combiner="sum", name="t", dtype=dtype)
    made = quantize(table().astype(dtype), how)
    values = made.host_rows(0, V)
    inputs, feature_config = features(config, values)
    found = je.serving_embedding_lookup(inputs, None, {config: made}, feature_config)
    with je.use_backend("xla"):
        expected = je.serving_embedding_lookup(inputs, None, {"t": values}, feature_config)
    for name, out in found.items():
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, np.asarray(expected[name]).astype(dtype), err_msg=name)
    jitted = jax.jit(lambda t: je.serving_embedding_lookup(inputs, None, {"t": t}, feature_config))(made)
    np.testing.assert_array_equal(jitted["ragged"], found["ragged"])


@pytest.mark.parametrize(
    ("how", "combiner"), list(zip(HOWS, ["sum", "mean", "sqrtn", "mean"], strict=True)), ids=str
)
def test_weights_and_their_gradients(path, how, combiner):
    config = je.TableConfig(V, D, combiner=combiner, name="t")
    made = quantize(table(), how)
    ids = je.RaggedTensor.from_lists([[1, 2, 2, 22], [], [5]])

    def loss(values, rows):
        weights = je.RaggedTensor(values, ids.row_splits)
        out = je.serving_embedding_lookup(ids, weights, {"t": rows}, je.FeatureConfig(config))
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    weights = np.float32([0.5, 2, -1, 0.25, 3])
    found = jax.value_and_grad(loss)(weights, made)
    expected = jax.value_and_grad(loss)(weights, made.dequantize())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_bad_ids_and_wrong_shapes(path):
    config = je.TableConfig(V, D, name="t")
    made = quantize(table(), "int4")
    with pytest.raises(ValueError, match="is outside of table 't'"):
        je.serving_embedding_lookup(np.array([V]), None, {"t": made}, je.FeatureConfig(config))
    out, count = je.serving_embedding_lookup(
        np.array([V, -1, 2]), None, {"t": made}, je.FeatureConfig(config), count_bad_ids=True
    )
    assert int(count) == 2
    np.testing.assert_array_equal(out, [[0] * D, [0] * D, made.host_rows(2, 3)[0]])
    other = je.FeatureConfig(je.TableConfig(V, D + 1, name="t"))
    with pytest.raises(ValueError, match=r"table 't' must be \[23, 8\] .* got shape \[23, 7\]"):
        je.serving_embedding_lookup(np.array([1]), None, {"t": made}, other)


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_tables_of_64_bits_are_looked_up_in_32(path, how):
    rows = table().astype(np.float64)
    made = quantize(rows, how)
    assert made.dtype == made.dequantize().dtype == np.float32
    config, ids = je.TableConfig(V, D, combiner="sum", name="t"), je.RaggedTensor.from_lists([[0, 1], [2]])
    outs = [
        je.serving_embedding_lookup(ids, None, {"t": t}, je.FeatureConfig(config))
        for t in (made, quantize(table(), how))
    ]
    assert outs[0].dtype == np.float32
    np.testing.assert_array_equal(*outs)
    if isinstance(how, je.QuantizationConfig):
        trained = dataclasses.replace(config, quantization_config=how)
        out = je.serving_embedding_lookup(
            ids, None, {"t": quantize_as_trained(rows, trained)}, je.FeatureConfig(trained)
        )
        np.testing.assert_array_equal(out, outs[0])


def test_as_trained():
    config = je.TableConfig(V, D, name="t")
    rows = table()
    assert quantize_as_trained(rows, config) is rows
    for quantization in CONFIGS:
        made = quantize_as_trained(
            jnp.asarray(rows), dataclasses.replace(config, quantization_config=quantization)
        )
        assert isinstance(made, je.QuantizedTable) == (quantization.num_buckets <= 256)
        values = made.dequantize() if isinstance(made, je.QuantizedTable) else made
        np.testing.assert_array_equal(values, simulate(rows, quantization))
    config = dataclasses.replace(config, quantization_config=CONFIGS[-1])
    assert quantize_as_trained(values, config) is values
