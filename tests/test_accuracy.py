"""How far the loss and its derivatives are from the truth, in units in the last place (ULP)."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
from oracle import EPS

import jaxbce

BLOCK = 2**22


def total(x, y, **options):
    return jaxbce.bce_with_logits(x, y, reduction="sum", **options)


def unreduced(x, y, **options):
    return jaxbce.bce_with_logits(x, y, reduction="none", **options)


def elementwise(order, x, y, **options):
    """The derivative of that order with respect to each logit."""
    fn = functools.partial(unreduced, **options)
    for _ in range(order):
        fn = jax.grad(lambda x, y, fn=fn: fn(x, y).sum())
    return fn(x, y)


# --- 16-bit logits: all of them ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("q", [1.0, 3.5], ids="pos_weight={}".format)
@pytest.mark.parametrize("label", [0, 1], ids="label={}".format)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_every_16_bit_logit(dtype, label, q, mode):
    x = oracle.all_finite(dtype)
    y = jnp.full(x.shape, label)
    transform = jax.jit if mode == "jit" else lambda fn: fn
    value = transform(functools.partial(unreduced, pos_weight=q))(x, y)
    gradient = transform(jax.grad(functools.partial(total, pos_weight=q)))(x, y)
    expected = oracle.bce_with_logits(np.asarray(x, np.float64), float(label), q)
    # What XLA flushes to 0 in exp(-|x|) is multiplied by pos_weight afterwards.
    oracle.assert_within_ulp(3, value, expected[0], x, flushed=q)
    assert gradient.dtype == dtype
    oracle.assert_within_ulp(0.51, gradient, expected[1], x, flushed=q)


# --- float32 logits: a random 1/256 of all 2^32 ------------------------------------------------

DERIVATIVES = pytest.mark.parametrize(
    ("order", "bound"), [(0, 2), (1, 2), (2, 4)], ids=["loss", "gradient", "second derivative"]
)


@DERIVATIVES
@pytest.mark.parametrize("label", [0, 1], ids="label={}".format)
@pytest.mark.parametrize("forward_mode", [False, True], ids=["reverse_mode", "forward_mode"])
def test_where_it_matters_in_float32(order, bound, label, forward_mode):
    """Every 101st logit with 2^-7 <= |x| < 2^7; beyond, the loss is linear, 0 or constant."""
    low, high = np.array([2**-7, 2**7], np.float32).view(np.int32)
    positive = np.arange(low, high, 101, dtype=np.int32).view(np.float32)
    x = np.concatenate([positive, -positive])
    fn = jax.jit(functools.partial(elementwise, order, forward_mode=forward_mode))
    got = fn(x, np.full_like(x, label))
    oracle.assert_within_ulp(bound, got, oracle.derivative(order, np.float64(x), label), x)


@pytest.mark.thorough
@DERIVATIVES
def test_random_logits_of_all_float32(order, bound):
    """A random 1/256 of the 2^32 bit patterns; `benchmarks/accuracy.py` sweeps all of them."""
    rng = np.random.default_rng(order)
    fn = jax.jit(functools.partial(elementwise, order))
    for label in np.resize([0, 1], 2**32 // 256 // BLOCK):
        x = rng.integers(0, 2**32, BLOCK, dtype=np.uint32).view(np.float32)
        got = np.asarray(fn(x, np.full_like(x, label)))
        with np.errstate(invalid="ignore"):  # signalling NaNs
            expected = oracle.derivative(order, np.float64(x), label)
        oracle.assert_within_ulp(bound, got, expected, x)
        assert not (np.isnan(got) & ~np.isnan(x)).any()


# --- soft labels, third derivatives, gradients of the other arguments --------------------------

mpmath.mp.dps = 50
TAILS = np.array([-80, -30, -17, -5, -1, -1e-3, -1e-7, 1e-7, 1e-3, 1, 5, 17, 30, 80], np.float32)


def exact(formula, *arguments):
    """`formula` of mpmath numbers, element by element, in float64."""
    rows = np.broadcast_arrays(*(np.float64(argument) for argument in arguments))
    values = [float(formula(*map(mpmath.mpf, map(float, row)))) for row in zip(*rows, strict=True)]
    return np.array(values)


def softplus(x):
    return mpmath.log1p(mpmath.exp(x))


def relative_error(got, expected):
    return np.abs(np.float64(got) - expected) / np.abs(expected)


def test_soft_labels_within_their_conditioning(rng):
    """Near y = sigmoid(x) the gradient is a difference of two terms: no method can do better than
    a few roundings of the larger one, (1 - y) sigmoid(x) + y sigmoid(-x)."""
    x = np.float32(rng.normal(0, 6, 200_000))
    y = np.float32(rng.random(x.size))
    got = elementwise(1, x, y)
    exact_x, exact_y = np.float64(x), np.float64(y)
    scale = (1 - exact_y) * oracle.sigmoid(exact_x) + exact_y * oracle.sigmoid(-exact_x)
    error = np.abs(np.float64(got) - oracle.bce_with_logits(exact_x, exact_y)[1])
    assert (error / scale).max() <= 3 * EPS
    value = oracle.bce_with_logits(exact_x, exact_y)[0]
    assert relative_error(unreduced(x, y), value).max() <= 3 * EPS


@pytest.mark.parametrize("label", [0.0, 1.0], ids="label={}".format)
def test_third_derivative_in_the_tails(label):
    """-sigmoid'(x) tanh(x / 2), whatever the label."""

    def third(x):
        e = mpmath.exp(-abs(x))
        return -(e / (1 + e) ** 2) * mpmath.tanh(x / 2)

    got = elementwise(3, TAILS, np.full_like(TAILS, label))
    assert relative_error(got, exact(third, TAILS)).max() <= 4 * EPS


@pytest.mark.parametrize("forward_mode", [False, True], ids=["reverse_mode", "forward_mode"])
@pytest.mark.parametrize("q", [None, 1.0, 0.25, 3.5], ids="pos_weight={}".format)
def test_gradients_of_the_other_arguments(q, forward_mode):
    q_ = 1.0 if q is None else q
    y = np.full_like(TAILS, 0.75)
    weight = np.full_like(TAILS, 2)

    def loss(y, q, weight):
        options = {"pos_weight": q, "weight": weight, "forward_mode": forward_mode}
        return total(TAILS, y, **options)

    if q is None:
        by_label, by_weight = jax.grad(loss, argnums=(0, 2))(y, None, weight)
    else:
        arguments = (y, np.full_like(TAILS, q), weight)
        by_label, by_q, by_weight = jax.grad(loss, argnums=(0, 1, 2))(*arguments)
        expected = exact(lambda x: 2 * 0.75 * softplus(-x), TAILS)
        assert relative_error(by_q, expected).max() <= 4 * EPS
    expected = exact(lambda x: 2 * (-x + (q_ - 1) * softplus(-x)), TAILS)
    assert relative_error(by_label, expected).max() <= 4 * EPS
    expected = exact(lambda x: 0.25 * softplus(x) + q_ * 0.75 * softplus(-x), TAILS)
    assert relative_error(by_weight, expected).max() <= 4 * EPS


@pytest.mark.parametrize("label", [0.0, 1.0, 0.25], ids="label={}".format)
def test_curvature_of_probabilities(label, rng):
    """(1 - y) / (1 - p)² + y / p², also where p is near its hard label."""
    p = np.concatenate([rng.random(2**16), 10 ** rng.uniform(-10, -1, 2**10)]).astype(np.float32)
    p = np.concatenate([p, 1 - p])
    p = p[(p > 0) & (p < 1)]
    curvature = jax.grad(lambda p, y: jax.grad(jaxbce.bce)(p, y))
    got = jax.jit(jax.vmap(curvature, (0, None)))(p, label)
    exact_p = np.float64(p)
    expected = (1 - label) / (1 - exact_p) ** 2 + label / exact_p**2
    assert relative_error(got, expected).max() <= 4 * EPS


@pytest.mark.thorough
def test_the_mean_of_many(rng):
    """The sum of 2^23 losses keeps its accuracy."""
    x = np.float32(rng.normal(0, 3, (8192, 1024)))
    y = np.float32(rng.random(x.shape) < 0.1)
    expected = oracle.bce_with_logits(np.float64(x), np.float64(y))[0].mean()
    assert relative_error(jaxbce.bce_with_logits(x, y), expected) <= 4 * EPS
    where = x > -10
    expected = oracle.bce_with_logits(np.float64(x), np.float64(y))[0][where].mean()
    assert relative_error(jaxbce.bce_with_logits(x, y, where=where), expected) <= 4 * EPS
