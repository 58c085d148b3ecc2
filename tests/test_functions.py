"""`softplus`, `log_sigmoid` and `sigmoid`: the names of jax.nn, right in every derivative."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
from jax.experimental import pallas as pl
from oracle import EPS

import jaxbce

FUNCTIONS = ["softplus", "log_sigmoid", "sigmoid"]
every_function = pytest.mark.parametrize("name", FUNCTIONS)
EXACT = {
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "log_sigmoid": lambda x: -mpmath.log1p(mpmath.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
}
TAILS = np.array([-80, -30, -17, -5, -1, -1e-3, 1e-3, 1, 5, 17, 30, 80], np.float32)


def values(name, x):
    """The value and two derivatives in float64."""
    p, q = oracle.sigmoid(x), oracle.sigmoid(-x)
    return {
        "softplus": (oracle.softplus(x), p, p * q),
        "log_sigmoid": (-oracle.softplus(-x), q, -p * q),
        "sigmoid": (p, p * q, p * q * np.tanh(-x / 2)),
    }[name]


def derivatives(fn, x):
    for _ in range(3):
        yield jax.jit(jax.vmap(fn))(x)
        fn = jax.grad(fn)


@every_function
def test_within_ulps_with_two_derivatives(name):
    """Over every 1009th logit with 2^-7 <= |x| < 2^7, as the loss."""
    low, high = np.array([2**-7, 2**7], np.float32).view(np.int32)
    positive = np.arange(low, high, 1009, dtype=np.int32).view(np.float32)
    x = np.concatenate([positive, -positive])
    bounds = (2, 2, 4) if name != "sigmoid" else (2, 4, 6)
    got = derivatives(getattr(jaxbce, name), x)
    for bound, got_, expected in zip(bounds, got, values(name, np.float64(x)), strict=True):
        oracle.assert_within_ulp(bound, np.asarray(got_), expected, x)


@every_function
def test_third_derivative_in_the_tails(name):
    fn = getattr(jaxbce, name)
    for _ in range(3):
        fn = jax.grad(fn)
    with mpmath.workdps(60):
        expected = [float(mpmath.diff(EXACT[name], mpmath.mpf(float(x)), 3)) for x in TAILS]
    np.testing.assert_allclose(jax.vmap(fn)(TAILS), expected, rtol=40 * EPS, atol=1e-37)


@every_function
def test_both_modes_and_transformations(name, rng):
    fn, x = getattr(jaxbce, name), rng.normal(0, 3, (2, 3)).astype(np.float32)
    _, expected, curvature = values(name, np.float64(x))
    np.testing.assert_allclose(jax.grad(lambda x: fn(x).sum())(x), expected, rtol=1e-5)
    value, slope = jax.jvp(fn, (x,), (np.ones_like(x),))
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    np.testing.assert_allclose(value, jax.vmap(fn, 1, 1)(x), rtol=1e-6)
    hessian = jax.jacfwd(jax.jacfwd(lambda x: fn(x).sum()))(x[0])
    np.testing.assert_allclose(hessian, np.diag(curvature[0]), rtol=1e-4, atol=1e-7)
    checkpointed = jax.grad(lambda x: jax.checkpoint(fn)(x).sum())(x)
    np.testing.assert_allclose(checkpointed, expected, rtol=1e-5)


@every_function
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once(name, dtype):
    x = oracle.all_finite(dtype)
    got = getattr(jaxbce, name)(x)
    assert got.dtype == dtype
    oracle.assert_within_ulp(0.51, got, values(name, np.asarray(x, np.float64))[0], x)


@every_function
def test_infinite_and_nan(name):
    x = jnp.array([-jnp.inf, jnp.inf, jnp.nan])
    limits = {"softplus": (0, np.inf), "log_sigmoid": (-np.inf, 0), "sigmoid": (0, 1)}[name]
    slopes = {"softplus": (0, 1), "log_sigmoid": (1, 0), "sigmoid": (0, 0)}[name]
    np.testing.assert_array_equal(getattr(jaxbce, name)(x), [*limits, np.nan])
    slope = jax.vmap(jax.grad(getattr(jaxbce, name)))(x)
    np.testing.assert_array_equal(slope, [*slopes, np.nan])


@every_function
def test_float64_integers_and_shapes(name):
    fn = getattr(jaxbce, name)
    assert fn(3).dtype == fn(np.arange(3)).dtype == np.float32
    assert fn(np.zeros((0, 2), np.float32)).shape == (0, 2)
    with jax.enable_x64(True):
        x = np.linspace(-40, 40, 101)
        np.testing.assert_allclose(fn(x), values(name, x)[0], rtol=1e-15)


@pytest.mark.parametrize("transformation", [lambda fn: fn, jax.grad], ids=["value", "gradient"])
@pytest.mark.parametrize("name", ["softplus", "sigmoid_binary_cross_entropy"])
def test_in_an_interpreted_pallas_kernel(name, transformation, rng):
    function = getattr(jaxbce, name)
    count = 1 if name == "softplus" else 2
    scores, labels = jnp.float32(rng.uniform(-9, 9, (8, 128))), jnp.float32(rng.random((8, 128)))
    arrays = (scores, labels)[:count]

    def fn(*arrays):
        return transformation(lambda x: function(x, *arrays[1:]).sum())(arrays[0])

    def kernel(*refs):
        refs[-1][...] = jnp.broadcast_to(fn(*(ref[...] for ref in refs[:-1])), (8, 128))

    like = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    inside = pl.pallas_call(kernel, out_shape=like, interpret=True)(*arrays)
    np.testing.assert_allclose(inside, np.broadcast_to(fn(*arrays), (8, 128)), rtol=1e-6)
