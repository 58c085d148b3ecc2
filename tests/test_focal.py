"""What only the focal and the asymmetric loss promise: accuracy, exact cases, hyper-parameters."""

import functools

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import oracle
import pytest
from oracle import EPS

import jaxbce

# A sigmoid that XLA flushes to 0 is multiplied by gamma <= 5 and a softplus <= 88 afterwards.
FLUSHED = 5 * 88
GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]
TAILS = np.array([-80, -30.7, -17, -5.3, -1.1, -1e-3, 1e-3, 1.1, 5.3, 17, 30.7, 80], np.float32)

focal, asymmetric = jaxbce.sigmoid_focal_loss, jaxbce.asymmetric_loss
every_gamma = pytest.mark.parametrize("gamma", GAMMAS, ids="gamma={}".format)
every_label = pytest.mark.parametrize("label", [0, 1], ids="label={}".format)
every_16_bit_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def value_and_gradient(loss, x, y):
    value, pullback = jax.vjp(lambda x: loss(x, y, reduction="none"), x)
    return value, pullback(jnp.ones_like(value))[0]


# --- accuracy ----------------------------------------------------------------------------------


@every_gamma
@every_label
@every_16_bit_dtype
def test_focal_at_every_16_bit_logit(dtype, label, gamma):
    x = oracle.all_finite(dtype)
    y = jnp.full(x.shape, label)
    loss = jax.jit(functools.partial(value_and_gradient, functools.partial(focal, gamma=gamma)))
    value, gradient = loss(x, y)
    expected = oracle.focal(np.asarray(x, np.float64), np.full(x.shape, float(label)), gamma)
    oracle.assert_within_ulp(10, value, expected[0], x, flushed=FLUSHED)
    oracle.assert_within_ulp(0.51, gradient, expected[1], x, flushed=FLUSHED)


ASYMMETRIC = [
    {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05},
    {"gamma_neg": 0.5, "gamma_pos": 0.5, "clip": 0.0},
    {"gamma_neg": 0.5, "gamma_pos": 0.0, "clip": 0.2},
]


@pytest.mark.parametrize(
    "options", ASYMMETRIC, ids="{0[gamma_neg]}-{0[gamma_pos]}-{0[clip]}".format
)
@every_label
@every_16_bit_dtype
def test_asymmetric_at_every_16_bit_logit(dtype, label, options):
    x = oracle.all_finite(dtype)
    y = jnp.full(x.shape, label)
    loss = jax.jit(functools.partial(value_and_gradient, functools.partial(asymmetric, **options)))
    value, gradient = loss(x, y)
    y64 = np.full(x.shape, float(label))
    expected = oracle.asymmetric(np.asarray(x, np.float64), y64, **options)
    # gamma + 1 = 5 times the error of p - clip, which is less than 3 where p was 2 ULP off.
    oracle.assert_within_ulp(24, value, expected[0], x, flushed=FLUSHED)
    oracle.assert_within_ulp(0.51, gradient, expected[1], x, flushed=FLUSHED)


def exact_focal(x, gamma):
    """Of a negative."""
    p = 1 / (1 + mpmath.exp(-x))
    return p**gamma * mpmath.log1p(mpmath.exp(x))


def exact_derivatives(loss, x):
    """Value and two derivatives, by differences of 400 digits."""
    with mpmath.workdps(400):
        step = mpmath.mpf(10) ** -100
        below, at, above = (loss(mpmath.mpf(float(x)) + k * step) for k in (-1, 0, 1))
        return [at, (above - below) / (2 * step), (above - 2 * at + below) / step**2]


@pytest.mark.parametrize("gamma", [*GAMMAS, 0.7], ids="gamma={}".format)
@every_label
def test_focal_in_the_tails(gamma, label):
    """Value, gradient and second derivative, also where p alone would underflow."""
    x = np.concatenate([TAILS, np.float32([-150, 150])])

    def loss(x):
        return focal(x, label, gamma=gamma)

    first = jax.grad(loss)
    got = np.transpose([jax.vmap(fn)(x) for fn in (loss, first, jax.grad(first))])
    sign = 1 - 2 * label
    for x_, row in zip(x, got, strict=True):
        exact = exact_derivatives(lambda z: exact_focal(sign * z, gamma), x_)
        for value, expected in zip(row, map(float, exact), strict=True):
            # Below 2^-110, a factor of the product is flushed before the product is.
            assert value == pytest.approx(expected, rel=8 * EPS, abs=2**-110)


# --- exact cases -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(focal, gamma=0),
        functools.partial(asymmetric, gamma_neg=0, gamma_pos=0, clip=0),
    ],
    ids=["focal", "asymmetric"],
)
def test_without_focus_is_bce_bit_for_bit(loss, rng):
    x = np.concatenate([rng.normal(0, 8, 500), [18.5, 25, 90, -90, np.inf]]).astype(np.float32)
    y = np.concatenate([rng.random(500), [0, 0, 0, 1, 1]]).astype(np.float32)
    for fn in (lambda f: f, jax.grad, jax.hessian):
        chex.assert_trees_all_equal(fn(loss)(x, y), fn(jaxbce.bce_with_logits)(x, y))


@every_gamma
@pytest.mark.parametrize("alpha", [None, 0.25], ids="alpha={}".format)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_agrees_with_optax_where_optax_is_right(gamma, alpha, soft, rng):
    x = rng.normal(0, 3, 200).astype(np.float32)
    y = rng.uniform(0.01, 0.99, 200) if soft else rng.integers(0, 2, 200)
    y = y.astype(np.float32)
    ours = functools.partial(focal, gamma=gamma, alpha=alpha, reduction="none")
    with jax.numpy_dtype_promotion("standard"):
        theirs = functools.partial(optax.sigmoid_focal_loss, gamma=gamma, alpha=alpha)
        np.testing.assert_allclose(ours(x, y), theirs(x, y), rtol=1e-4, atol=1e-7)
        for argument in (0, 1) if soft else (0,):
            slopes = [jax.grad(lambda *a, f=f: f(*a).sum(), argument)(x, y) for f in (ours, theirs)]
            np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-5)


@every_gamma
def test_gradient_of_hard_labels(gamma):
    """At y = 0: p^gamma (gamma (1 - 2 p) softplus(x) / p - x), where optax has NaN in the tails."""
    p = oracle.sigmoid(np.float64(TAILS))
    focused = gamma * np.tanh(-TAILS / 2) * oracle.softplus(np.float64(TAILS)) / p - TAILS
    for label, sign in ((0, 1), (1, -1)):
        x, labels = sign * TAILS, np.full_like(TAILS, label)
        got = jax.grad(lambda y, x=x: focal(x, y, gamma=gamma, reduction="sum"))(labels)
        np.testing.assert_allclose(got, sign * p**gamma * focused, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("x", [-300.0, 300.0], ids="x={}".format)
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0], ids="gamma={}".format)
def test_every_second_derivative_is_finite_at_hard_labels(gamma, x):
    """Of logits and labels; by label twice it is beyond float32 where gamma < 1."""
    for label in (0.0, 1.0):
        hessian = jax.hessian(functools.partial(focal, gamma=gamma), argnums=(0, 1))
        (by_x, mixed), (_, by_y) = hessian(jnp.float32(x), jnp.float32(label))
        assert np.isfinite([by_x, mixed]).all()
        assert not np.isnan(by_y)


def test_a_derivative_that_is_constant():
    """Without focus, by label twice and by logit once: 2 (1 - 2 alpha), whatever they are."""
    fn = functools.partial(focal, gamma=0, alpha=0.25)
    third = jax.grad(jax.grad(jax.grad(fn, 1), 1), 0)
    for x, y in ((-3.0, 0.0), (0.5, 0.3), (40.0, 1.0)):
        assert third(x, y) == pytest.approx(1, rel=4 * EPS)
        assert jax.grad(third)(x, y) == 0


def test_a_clip_alone(rng):
    """With gamma_neg = gamma_pos = 0 the shift of the probability is all that is left."""
    options = {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.05}
    x, y = rng.normal(0, 3, 200).astype(np.float32), rng.integers(0, 2, 200).astype(np.float32)
    value, gradient = value_and_gradient(functools.partial(asymmetric, **options), x, y)
    expected = oracle.asymmetric(np.float64(x), np.float64(y), **options)
    np.testing.assert_allclose(value, expected[0], rtol=2e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=2e-6)


def test_negatives_below_the_clip_leave_no_trace():
    x = np.linspace(-20, -2.95, 50, dtype=np.float32)  # p < 0.05
    for fn in (asymmetric, jax.grad(asymmetric), jax.hessian(asymmetric)):
        assert not np.any(fn(x, np.zeros_like(x)))


@pytest.mark.parametrize("clip", [0.0, 0.05], ids="clip={}".format)
def test_stop_focus_gradient(clip, rng):
    """The value stays; the derivatives are those of the loss with its weights for constants."""
    x, y = rng.normal(0, 3, 50).astype(np.float32), rng.random(50).astype(np.float32)
    fn = functools.partial(asymmetric, clip=clip, reduction="sum")
    stopped = functools.partial(fn, stop_focus_gradient=True)
    np.testing.assert_allclose(stopped(x, y), fn(x, y), rtol=1e-6)

    def by_hand(x, y):
        p = jax.nn.sigmoid(x)
        shifted = jnp.maximum(p - clip, 0)
        weights = jax.lax.stop_gradient((1 - p, shifted**4))
        return jnp.sum(-y * weights[0] * jnp.log(p) - (1 - y) * weights[1] * jnp.log1p(-shifted))

    for derivative in (jax.grad, jax.hessian):
        expected = derivative(by_hand)(x, y)
        np.testing.assert_allclose(derivative(stopped)(x, y), expected, rtol=1e-3, atol=1e-5)


# --- hyper-parameters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (focal, {"gamma": -1}, "sigmoid_focal_loss: gamma must be finite and at least 0, got -1"),
        (focal, {"gamma": np.inf}, "gamma must be finite"),
        (focal, {"gamma": np.nan}, "gamma must be finite"),
        (focal, {"alpha": 1.5}, r"sigmoid_focal_loss: alpha must be in \[0, 1\], got 1.5"),
        (asymmetric, {"gamma_neg": -0.1}, "asymmetric_loss: gamma_neg must be finite and at least"),
        (asymmetric, {"gamma_pos": -0.1}, "asymmetric_loss: gamma_pos must be finite and at least"),
        (asymmetric, {"clip": 1.0}, r"asymmetric_loss: clip must be in \[0, 1\), got 1.0"),
        (asymmetric, {"clip": -0.1}, r"asymmetric_loss: clip must be in \[0, 1\), got -0.1"),
    ],
    ids=[
        "gamma < 0",
        "infinite gamma",
        "nan gamma",
        "alpha > 1",
        "gamma_neg < 0",
        "gamma_pos < 0",
        "clip = 1",
        "clip < 0",
    ],
)
def test_hyper_parameters_out_of_range(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(TAILS, TAILS, **options)


def test_a_traced_hyper_parameter_says_how_to_make_it_static():
    with pytest.raises(TypeError, match=r"gamma must be a Python number.*static_argnames='gamma'"):
        jax.jit(lambda gamma: focal(TAILS, TAILS, gamma=gamma))(2.0)


def test_alpha_of_one_and_numpy_numbers_are_fine():
    options = {"gamma": np.float32(2), "alpha": 1}
    assert focal(np.float32(1), 0, **options) == 0
    assert focal(np.float32(1), 1, **options) == focal(np.float32(1), 1)


# --- missing labels ----------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", [np.nan, -1.0], ids=["NaN", "minus one"])
@pytest.mark.parametrize(
    "loss", [jaxbce.bce_with_logits, focal, asymmetric], ids=["bce", "focal", "asymmetric"]
)
def test_training_through_unknown_labels(loss, unknown, rng):
    """A linear model gets, at each of 20 steps, exactly the gradient of the known labels."""
    features = rng.normal(size=(16, 5)).astype(np.float32)
    labels = rng.integers(0, 2, (16, 3)).astype(np.float32)
    known = rng.random((16, 3)) < 0.5
    partial = np.where(known, labels, unknown).astype(np.float32)
    where = ~np.isnan(partial) if np.isnan(unknown) else partial != unknown

    def of(labels, where):
        return jax.jit(jax.value_and_grad(lambda k: loss(features @ k, labels, where=where)))

    with_unknown, with_known = of(partial, where), of(labels, known)
    kernel = np.zeros((5, 3), np.float32)
    values = []
    for _ in range(20):
        value, gradient = with_unknown(kernel)
        chex.assert_trees_all_equal((value, gradient), with_known(kernel))
        kernel = kernel - 0.5 * gradient
        values.append(value)
    assert values[-1] < 0.8 * values[0]
