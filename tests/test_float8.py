"""Parameters of 8 bits: multiplied in bfloat16, updated in float32, rounded at random."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composing import draw_head, split
from flax import nnx
from heads import assert_close, draw_arguments, head, value_and_gradients
from test_docs import blocks

import jaxbce
from jaxbce.nnx import MultiLabelHead

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("compile_fast")]

every_float8 = pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
ROOT = pathlib.Path(__file__).parents[1]
SGD = optax.sgd(0.5)


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)


def in_float8(arguments, dtype):
    """The kernel in float8, and the same numbers in float32."""
    kernel = arguments["kernel"].astype(dtype)
    return arguments | {"kernel": kernel}, arguments | {"kernel": kernel.astype(jnp.float32)}


def step(optimizer, arguments, state_of=None, **options):
    features, params, given = split(arguments)
    update = jax.jit(functools.partial(jaxbce.linear_update, optimizer, **options))
    return update(features, params, optimizer.init(state_of or params), **given)


def units(kernel, dtype):
    """The distance of neighbours in float8 about each number."""
    info, (_, exponent) = jnp.finfo(dtype), np.frexp(np.asarray(kernel, np.float64))
    return np.maximum(2.0 ** (exponent - 1 - info.nmant), float(info.smallest_subnormal))


LAYOUTS = {
    "at once": {},
    "in chunks": {"chunk_size": 5},
    "a table": {"chunk_size": 5, "transpose_kernel": True},
    "on a mesh": {"chunk_size": 5, "batch_axis": "data", "label_axis": "model"},
}


@every_float8
@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_a_step_is_that_in_float32_and_rounded(options, dtype, mesh, rng):
    """Features in float32 are multiplied so: only the last rounding differs."""
    narrow, wide = in_float8(draw_head(rng, 8, 24, ("bias", "positives", "ignored")), dtype)
    if options.get("transpose_kernel"):
        narrow, wide = ({**each, "kernel": each["kernel"].T} for each in (narrow, wide))
    options = options | ({"mesh": mesh} if "label_axis" in options else {})
    got = step(SGD, narrow, rounding_key=jax.random.key(0), **options)
    expected = step(SGD, wide, **options)
    assert {name: array.dtype for name, array in got.params.items()} == {
        "kernel": jnp.dtype(dtype),
        "bias": jnp.float32,
    }
    assert_close(got.loss, expected.loss)
    assert_close(got.features_gradient, expected.features_gradient)
    assert_close(got.params["bias"], expected.params["bias"])
    moved = np.asarray(expected.params["kernel"], np.float64)
    kernel = np.asarray(got.params["kernel"], np.float64)
    assert (np.abs(kernel - moved) < units(moved, dtype)).all()
    assert (kernel != np.asarray(narrow["kernel"], np.float64)).any()
    assert not (kernel == np.asarray(jnp.asarray(moved, jnp.float32).astype(dtype))).all()


@every_float8
@pytest.mark.parametrize("features", ["bfloat16", "own"], ids=["bfloat16", "float8"])
def test_products_are_in_bfloat16(features, dtype, rng):
    """And no operand is rounded to float8 on the way."""
    given = draw_arguments(rng, 6, 16, 40, jnp.float32, dense=False)
    given = {name: given[name] for name in ("features", "kernel", "bias")}
    given |= {"positives": jnp.asarray(rng.integers(0, 40, (6, 3)), jnp.int32)}
    narrow, wide = in_float8(given, dtype)
    narrow["features"] = given["features"].astype(dtype if features == "own" else features)
    wide["features"] = narrow["features"].astype(jnp.float32)
    layer = [narrow[name] for name in ("features", "kernel", "bias")]
    wide_layer = [wide[name] for name in ("features", "kernel", "bias")]

    top_k = functools.partial(jaxbce.linear_top_k, k=3)
    programs = {
        "loss": (lambda given: head(given), narrow),
        "top k": (lambda layer: top_k(*layer), layer),
        "update": (lambda given: step(SGD, given, rounding_key=jax.random.key(0)), narrow),
    }
    for name, (program, arguments) in programs.items():
        text = str(jax.make_jaxpr(program)(arguments))
        products = re.findall(r"preferred_element_type=\w+\s*\] (\w+) (\w+)", text)
        types = {re.search(rf"\b{each}:(\w+)\[", text)[1] for pair in products for each in pair}
        assert types == {"bf16"}, name
    assert_close(head(narrow), head(wide), 2e-3)
    (values, ids), (expected, wide_ids) = top_k(*layer), top_k(*wide_layer)
    assert_close(values, expected, 1e-5)  # products of two short numbers are exact
    np.testing.assert_array_equal(ids, wide_ids)
    got = step(SGD, narrow, rounding_key=jax.random.key(0))
    expected = step(SGD, wide)
    assert_close(got.loss, expected.loss, 2e-3)
    assert got.features_gradient.dtype == narrow["features"].dtype
    assert_close(np.asarray(got.features_gradient, np.float64), expected.features_gradient, 2.0**-2)


@every_float8
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_every_binade_moves_as_far_as_in_float32(state, dtype):
    """Decay by a 64th, an eighth of a unit or less: to the nearest nothing would move."""
    info = jnp.finfo(dtype)
    exponents = np.arange(np.log2(float(info.smallest_subnormal)), np.log2(float(info.max)))
    values = np.concatenate([sign * 1.25 * 2.0**exponents for sign in (1, -1)])
    start = jnp.asarray(np.tile(values[:, None], 2**11), jnp.float32).astype(dtype)
    features, positives = jnp.zeros((1, len(values)), jnp.bfloat16), jnp.array([[-1]])
    optimizer = optax.chain(optax.add_decayed_weights(2.0**-6), optax.sgd(1.0, momentum=0.0))

    def after(key):
        params = {"kernel": start}
        opt_state = optimizer.init(jax.tree.map(lambda array: array.astype(state), params))
        update = jax.jit(functools.partial(jaxbce.linear_update, optimizer, chunk_size=300))
        for i in range(4):
            rounding = {} if key is None else {"rounding_key": jax.random.fold_in(key, i)}
            got = update(features, params, opt_state, positives=positives, **rounding)
            params, opt_state = got.params, got.opt_state
        assert {leaf.dtype for leaf in jax.tree.leaves(opt_state)} == {jnp.dtype(state)}
        return np.asarray(params["kernel"], np.float64)

    before = np.asarray(start, np.float64)
    np.testing.assert_array_equal(after(None), before)
    got, expected = after(jax.random.key(0)), before * (1 - 2.0**-6) ** 4
    deviation = 0.5 * np.sqrt(4 / before.shape[1]) * units(before, dtype)[:, 0]
    # Moments of bfloat16 are rounded at random too, by less than a 128th of a decay.
    assert (np.abs(got.mean(1) - expected[:, 0]) < 4 * deviation).all()
    assert (np.abs(got.mean(1) - before[:, 0]) > 0).all()


@every_float8
def test_what_cannot_be_rounded(dtype):
    """NaN stays with its label, and growth ends at the largest number."""
    largest = float(jnp.finfo(dtype).max)
    kernel = jnp.array([[np.nan, largest, -largest, 0, -0.0]], jnp.float32).astype(dtype)
    features, positives = jnp.zeros((1, 1)), jnp.array([[-1]])
    grow = optax.chain(optax.add_decayed_weights(-3.0), optax.sgd(1.0))
    params, ignored = {"kernel": kernel}, jnp.array([[0]])
    got = jaxbce.linear_update(
        *(grow, features, params, grow.init(params)),
        positives=positives,
        ignored=ignored,
        rounding_key=jax.random.key(0),
    )
    assert np.isfinite(got.loss)
    assert np.isfinite(got.features_gradient).all()
    np.testing.assert_array_equal(
        np.asarray(got.params["kernel"], np.float32), [[np.nan, largest, -largest, 0, 0]]
    )


@every_float8
def test_moments_in_float8_are_refused(dtype, rng):
    narrow, wide = in_float8(draw_head(rng, names=("positives",)), dtype)
    optimizer = optax.adam(0.1)
    with pytest.raises(TypeError, match=rf"opt_state must be of 16 bits .* got {dtype}.*astype"):
        step(optimizer, narrow, rounding_key=jax.random.key(0))
    _, in_float32, _ = split(wide)  # the remedy
    got = step(optimizer, narrow, in_float32, rounding_key=jax.random.key(0))
    assert got.opt_state[0].nu["kernel"].dtype == jnp.float32
    assert_close(got.opt_state, step(optimizer, wide).opt_state)


OTHERS = ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz"]


@pytest.mark.parametrize("dtype", OTHERS)
def test_other_formats_are_not_rounded_at_random(dtype, rng):
    """Their negative 0 is NaN."""
    narrow, _ = in_float8(draw_head(rng, names=("positives",)), dtype)
    with pytest.raises(
        TypeError, match=rf"rounding_key rounds to .*float8_e5m2, got .* in {dtype}"
    ):
        step(SGD, narrow, rounding_key=jax.random.key(0))


@every_float8
def test_a_loss_scale_saves_the_gradient(dtype, rng):
    """It is multiplied before it is rounded to float8."""
    given = draw_arguments(rng, 6, 16, 40, jnp.float32, dense=True)
    narrow, wide = in_float8(given, dtype)
    narrow["features"] = wide["features"] = narrow["features"] * 2.0**-12
    loss, scale = functools.partial(head, chunk_size=16), 2.0**23
    _, got = value_and_gradients(loss, narrow, scale)
    _, expected = value_and_gradients(loss, wide, scale)
    assert got["kernel"].dtype == dtype
    rounded = expected["kernel"].astype(dtype).astype(jnp.float32)
    assert_close(got["kernel"].astype(jnp.float32), rounded, 2.0**-4)
    assert (rounded != 0).mean() > 0.9
    least = float(jnp.finfo(dtype).smallest_subnormal)
    assert (abs(expected["kernel"]) / scale < least / 2).all()


def temporaries(dtype, labels, width=64, batch=32):
    """Of a step in chunks with donated parameters."""
    update = functools.partial(jaxbce.linear_update, SGD, chunk_size=512)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def donating(params, features, positives, key):
        state = SGD.init(params)
        return update(features, params, state, positives=positives, rounding_key=key).params

    arrays = [((batch, width), jnp.bfloat16), ((batch, 4), jnp.int32)]
    rows = [jax.ShapeDtypeStruct(*each) for each in arrays]
    params = {"kernel": jax.ShapeDtypeStruct((width, labels), dtype)}
    program = jax.jit(donating, donate_argnums=0).lower(params, *rows, key).compile()
    assert not re.search(rf"(f16|f32)\[{width},{labels}\]", program.as_text())
    return program.memory_analysis().temp_size_in_bytes


@every_float8
def test_the_memory_of_a_step_on_a_cpu(dtype):
    """A copy of the kernel as bits: XLA on a CPU cannot write into float8."""
    few, many = (temporaries(dtype, labels) for labels in (2**14, 2**16))
    assert many - few <= 1.01 * 64 * (2**16 - 2**14)


@every_float8
@pytest.mark.parametrize("transposed", [False, True], ids=["kernel", "table"])
@pytest.mark.parametrize("features_dtype", ["float32", "bfloat16"])
def test_as_a_layer(features_dtype, transposed, dtype, rng):
    made = MultiLabelHead(
        16,
        4096,
        prior=1e-4,
        param_dtype=dtype,
        transpose_kernel=transposed,
        chunk_size=600,
        rngs=nnx.Rngs(0),
    )
    assert made.kernel.dtype == dtype
    kernel = np.asarray(made.kernel[...], np.float64)
    np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.25], atol=0.005)
    np.testing.assert_allclose(made.bias[...], np.log(1e-4 / (1 - 1e-4)), rtol=1e-6)

    features = jnp.asarray(rng.normal(size=(4, 16)), features_dtype)
    positives = jnp.asarray(rng.integers(0, 4096, (4, 3)), jnp.int32)
    axes = kernel.T if transposed else kernel
    logits = np.asarray(features, np.float64) @ axes + np.asarray(made.bias[...], np.float64)
    assert_close(made(features), logits)
    values, ids = made.top_k(features, 2)
    assert_close(values, np.sort(logits)[:, :-3:-1])
    np.testing.assert_array_equal(ids, np.argsort(logits)[:, :-3:-1])
    loss = functools.partial(made.loss, positives=positives)
    before = loss(features)
    optimizer = nnx.Optimizer(made, optax.sgd(100.0), wrt=nnx.Param)
    for i in range(20):
        found, slope = made.update(
            optimizer, features, positives=positives, rounding_key=jax.random.key(i)
        )
        if not i:
            assert_close(found, before)
    assert (made.kernel.dtype, slope.dtype) == (jnp.dtype(dtype), jnp.dtype(features_dtype))
    assert made.bias[...].dtype == jnp.float32
    assert loss(features) < before


@functools.cache
def recipe():
    """The transformation of the page on mixed precision."""
    page = (ROOT / "docs" / "how-to" / "mixed-precision.md").read_text()
    (block,) = (block for block in blocks("python", page) if "def compensated" in block)
    names = {}
    exec(block, names)
    return names["compensated"]


def losses_after_training(dtype, way, seeds, width=32, labels=128, batch=64, steps=1500):
    """On new data, of one layer for each seed that learns noisy labels from another one."""
    truth = 2 * jax.random.normal(jax.random.key(7), (width, labels)) / np.sqrt(width)
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    optimizer = recipe()(adam) if way == "compensated" else adam

    def draw(of_features, of_labels, rows):
        features = jax.random.normal(of_features, (rows, width), jnp.bfloat16)
        rates = jax.nn.sigmoid(4 * (features.astype(jnp.float32) @ truth) - 3)
        return features, jax.random.bernoulli(of_labels, rates)

    @jax.jit
    def loss_after(seed):
        def train(i, carry):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), 3)
            features, given = draw(keys[0], keys[1], batch)
            rounding = {"rounding_key": keys[2]} if way == "at random" else {}
            return jaxbce.linear_update(optimizer, features, *carry, labels=given, **rounding)[2:]

        start = {"kernel": jnp.zeros((width, labels))}
        carry = jax.tree.map(lambda array: array.astype(dtype), start), optimizer.init(start)
        params, _ = jax.lax.fori_loop(0, steps, train, carry)
        features, given = draw(jax.random.key(8), jax.random.key(9), 4096)
        kernel = params["kernel"].astype(jnp.float32)
        features = features.astype(jnp.float32)
        return jaxbce.linear_bce_with_logits(features, kernel, labels=given)

    return [loss_after(seed) for seed in seeds]


# The table of that page.
TRAINED = {
    ("float32", "to the nearest"): 0.309,
    ("bfloat16", "to the nearest"): 0.361,
    ("bfloat16", "at random"): 0.309,
    ("bfloat16", "compensated"): 0.309,
    ("float8_e4m3fn", "to the nearest"): 0.605,
    ("float8_e4m3fn", "at random"): 0.312,
    ("float8_e5m2", "at random"): 0.316,
}


@pytest.mark.parametrize("case", TRAINED, ids=", ".join)
def test_what_rounding_costs(case):
    losses = losses_after_training(*case, seeds=range(2))
    np.testing.assert_allclose(np.mean(losses), TRAINED[case], atol=7e-4)
