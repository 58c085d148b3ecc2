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
GAMMAS = [0.0, 0.5, 1.0, 1.5, 2.0, 5.0]
TAILS = np.array([-80, -30.7, -17, -5.3, -1.1, -1e-3, 1e-3, 1.1, 5.3, 17, 30.7, 80], np.float32)

focal, asymmetric = jaxbce.focal_loss, jaxbce.asymmetric_loss
every_gamma = pytest.mark.parametrize("gamma", GAMMAS, ids="gamma={}".format)
every_label = pytest.mark.parametrize("label", [0, 1], ids="label={}".format)
every_16_bit_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, x, y):
    value, pullback = jax.vjp(lambda x: loss(x, y, reduction="none"), x)
    return value, pullback(jnp.ones_like(value))[0]


# --- accuracy ----------------------------------------------------------------------------------


def assert_accurate(got, expected, logits, gamma):
    """24 ULP, or for a fractional gamma 8 + |log expected| units of EPS, wherever above 1e-30.

    That is the conditioning of exp: of a power, the exponent is rounded.
    """
    matters = np.abs(expected) > 1e-30
    assert np.all(np.abs(got[~matters]) < 2e-30)
    got, expected, logits = got[matters], expected[matters], logits[matters]
    if gamma.is_integer():
        oracle.assert_within_ulp(24, got, expected, logits)
        return
    error = np.abs(np.float64(got) / expected - 1) / EPS / (8 + np.abs(np.log(np.abs(expected))))
    worst = np.argmax(error)
    assert error[worst] <= 1, f"{error[worst]:.3g} of the bound at logit {logits[worst]}"


def check_every_16_bit_logit(dtype, loss, exact, gammas):
    """With labels of 0 and 1, of which each has its gamma."""
    x = oracle.all_finite(dtype)
    for label, gamma in enumerate(gammas):
        value, gradient = value_and_gradient(loss, x, jnp.full(x.shape, label))
        expected = exact(np.asarray(x, np.float64), np.full(x.shape, float(label)))
        assert_accurate(np.asarray(value), expected[0], x, gamma)
        oracle.assert_within_ulp(0.51, gradient, expected[1], x, flushed=FLUSHED)


def check_float32_logits(rng, loss, exact, gammas):
    """Everywhere, where the loss bends, and around the kinks of clip = 0.05, 0.1 and 0.2.

    With labels of 0 and 1, of which each has its gamma.
    """
    kinks = [rng.normal(-np.log(1 / clip - 1), 0.1, 2**14) for clip in (0.05, 0.1, 0.2)]
    x = np.concatenate([rng.uniform(-100, 100, 2**17), rng.normal(0, 3, 2**17), *kinks])
    x = x.astype(np.float32)
    for label, gamma in enumerate(gammas):
        got = value_and_gradient(loss, x, np.full_like(x, label))
        expected = exact(np.float64(x), np.full(x.shape, float(label)))
        for got_, expected_ in zip(got, expected, strict=True):
            assert_accurate(np.asarray(got_), expected_, x, gamma)


def focal_cases(gamma):
    return *(functools.partial(fn, gamma=gamma) for fn in (focal, oracle.focal)), (gamma, gamma)


@pytest.mark.thorough
@every_gamma
@every_16_bit_dtype
def test_focal_at_every_16_bit_logit(dtype, gamma):
    check_every_16_bit_logit(dtype, *focal_cases(gamma))


@pytest.mark.parametrize("gamma", [*GAMMAS, 0.7, 4.3], ids="gamma={}".format)
def test_focal_in_float32(gamma, rng):
    check_float32_logits(rng, *focal_cases(gamma))


ASYMMETRIC = [
    {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05},
    {"gamma_neg": 5.0, "gamma_pos": 2.0, "clip": 0.1},
    {"gamma_neg": 1.5, "gamma_pos": 0.7, "clip": 0.05},
    {"gamma_neg": 0.5, "gamma_pos": 0.5, "clip": 0.0},
    {"gamma_neg": 2.0, "gamma_pos": 5.0, "clip": 0.0},
    {"gamma_neg": 0.5, "gamma_pos": 0.0, "clip": 0.2},
    {"gamma_neg": 2.0, "gamma_pos": 1.0, "clip": 0.99},
]
every_setting = pytest.mark.parametrize(
    "options", ASYMMETRIC, ids="{0[gamma_neg]}-{0[gamma_pos]}-{0[clip]}".format
)


def asymmetric_cases(options):
    losses = [functools.partial(fn, **options) for fn in (asymmetric, oracle.asymmetric)]
    return *losses, (options["gamma_neg"], options["gamma_pos"])


@pytest.mark.thorough
@every_setting
@every_16_bit_dtype
def test_asymmetric_at_every_16_bit_logit(dtype, options):
    check_every_16_bit_logit(dtype, *asymmetric_cases(options))


@every_setting
def test_asymmetric_in_float32(options, rng):
    check_float32_logits(rng, *asymmetric_cases(options))


def exact_focal(x, y, gamma):
    p, q = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
    cross_entropy = -(1 - y) * mpmath.log(q) - y * mpmath.log(p)
    return ((1 - y) * p + y * q) ** mpmath.mpf(gamma) * cross_entropy


# The weights of central differences: order -> {steps from the middle: weight}
DIFFERENCES = [{0: 1}, {-1: -0.5, 1: 0.5}, {-1: 1, 0: -2, 1: 1}, {-2: -0.5, -1: 1, 1: -1, 2: 0.5}]


@functools.cache
def exact_derivative(x, y, gamma, by_x, by_y):
    """Of the focal loss, by differences of 700 digits; as float, of which many would overflow."""
    with mpmath.workdps(700):
        step = mpmath.mpf(10) ** -160
        total = mpmath.fsum(
            weight_x * weight_y * exact_focal(x + i * step, y + k * step, gamma)
            for i, weight_x in DIFFERENCES[by_x].items()
            for k, weight_y in DIFFERENCES[by_y].items()
        )
        return float(total / step ** (by_x + by_y))


@pytest.mark.parametrize("gamma", [*GAMMAS, 0.7], ids="gamma={}".format)
def test_focal_in_the_tails(gamma):
    """Value, gradient and second derivative, also where p alone would underflow."""
    x = np.concatenate([TAILS, np.float32([-150, 150])])
    first = jax.grad(functools.partial(focal, gamma=gamma))
    orders = (functools.partial(focal, gamma=gamma), first, jax.grad(first))
    derivatives = jax.jit(jax.vmap(lambda x, y: [fn(x, y) for fn in orders]))
    for label in (0, 1):
        for order, got in enumerate(derivatives(x, np.full_like(x, label))):
            expected = [exact_derivative(float(x_), label, gamma, order, 0) for x_ in x]
            assert_accurate(np.asarray(got), np.array(expected), x, gamma)


HARD = [(x, 0) for x in (-300, -100, -60, -17, -1, 0, 1, 17, 100, 300)]
POINTS = [*HARD, (-100, 1), (17, 1), (60, 1), (300, 1), (-100, 0.25), (-5, 0.25), (40, 0.25)]


@pytest.mark.newest
@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5, 2.0, 5.0], ids="gamma={}".format)
def test_every_derivative_up_to_the_third(gamma):
    """By logit and label in every order: finite and right wherever the true one is a float32."""
    second = jax.jacfwd(jax.grad(functools.partial(focal, gamma=gamma), (0, 1)), (0, 1))

    def second_twice(*point):
        derivatives = second(*point)
        return derivatives, derivatives

    third_and_second = jax.jit(jax.vmap(jax.jacfwd(second_twice, (0, 1), has_aux=True)))
    for derivatives in third_and_second(*np.float32(POINTS).T):
        leaves, _ = jax.tree_util.tree_flatten_with_path(derivatives)
        for path, got in leaves:
            by_y = sum(key.idx for key in path)
            by_x = len(path) - by_y
            expected = np.array([exact_derivative(*point, gamma, by_x, by_y) for point in POINTS])
            fits = np.abs(expected) < 3e38
            np.testing.assert_allclose(got[fits], expected[fits], rtol=3e-5, atol=1e-18)


@pytest.mark.newest
@pytest.mark.parametrize("gamma_neg", [0, 1, 2], ids="gamma_neg={}".format)
def test_derivatives_of_a_negative_of_the_asymmetric_loss(gamma_neg):
    """To the third, in which m^gamma_neg has become a constant, then 0."""

    def textbook(x):
        m = 1 / (1 + jnp.exp(-x)) - 0.05
        return -(m**gamma_neg) * jnp.log1p(-m)

    def derivatives(fn, x):
        orders = [fn, jax.grad(fn)]
        for _ in range(2):
            orders.append(jax.jacfwd(orders[-1]))
        return [jax.vmap(each)(x) for each in orders]

    x = np.linspace(-2, 6, 50)
    with jax.enable_x64(True):
        expected = derivatives(textbook, x)
    loss = functools.partial(asymmetric, gamma_neg=gamma_neg)
    got = derivatives(lambda x: loss(x, jnp.float32(0)), np.float32(x))
    for order in range(4):
        np.testing.assert_allclose(got[order], expected[order], rtol=1e-4, atol=1e-5)


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

    def derivatives(fn):
        return jax.jit(lambda *point: [d(fn)(*point) for d in (jax.value_and_grad, jax.hessian)])

    chex.assert_trees_all_equal(derivatives(loss)(x, y), derivatives(jaxbce.bce_with_logits)(x, y))


@pytest.mark.parametrize(
    ("gamma", "alpha"),
    [(0.0, 0.25), (0.5, None), (1.0, 0.25), (1.5, 0.25), (2.0, None), (2.0, 0.25), (5.0, None)],
    ids="{}".format,
)
def test_agrees_with_optax_where_optax_is_right(gamma, alpha, rng):
    x = rng.normal(0, 3, 200).astype(np.float32)

    def value_and_gradients(fn):
        def total(*point):
            value = fn(*point, gamma=gamma, alpha=alpha)
            return value.sum(), value

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))

    ours = value_and_gradients(functools.partial(focal, reduction="none"))
    with jax.numpy_dtype_promotion("standard"):
        theirs = value_and_gradients(optax.sigmoid_focal_loss)
        for kind, y in (("soft", rng.uniform(0.01, 0.99, 200)), ("hard", rng.integers(0, 2, 200))):
            y = y.astype(np.float32)
            (slopes, value), (their_slopes, their_value) = ours(x, y), theirs(x, y)
            np.testing.assert_allclose(value, their_value, rtol=1e-4, atol=1e-7, err_msg=kind)
            for argument in (0, 1) if kind == "soft" else (0,):
                got, expected = slopes[argument], their_slopes[argument]
                np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5, err_msg=kind)


@every_gamma
def test_gradient_of_hard_labels(gamma):
    """At y = 0: p^gamma (gamma (1 - 2 p) softplus(x) / p - x), where optax has NaN in the tails."""
    p = oracle.sigmoid(np.float64(TAILS))
    focused = gamma * np.tanh(-TAILS / 2) * oracle.softplus(np.float64(TAILS)) / p - TAILS
    for label, sign in ((0, 1), (1, -1)):
        x, labels = sign * TAILS, np.full_like(TAILS, label)
        got = jax.grad(lambda y, x=x: focal(x, y, gamma=gamma, reduction="sum"))(labels)
        np.testing.assert_allclose(got, sign * p**gamma * focused, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0], ids="gamma={}".format)
def test_every_second_derivative_is_finite_at_hard_labels(gamma):
    """Of logits and labels; by label twice it is beyond float32 where gamma < 1."""
    x, y = np.float32([(x, y) for x in (-300, 300) for y in (0, 1)]).T
    hessian = jax.hessian(functools.partial(focal, gamma=gamma), argnums=(0, 1))
    (by_x, mixed), (_, by_y) = jax.jit(jax.vmap(hessian))(x, y)
    assert np.isfinite([by_x, mixed]).all()
    assert not np.isnan(by_y).any()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, gamma: focal(x, y, gamma=gamma),
        lambda x, y, gamma: asymmetric(x, y, gamma_neg=gamma, gamma_pos=gamma, clip=0),
        lambda x, y, gamma: asymmetric(x, y, gamma_neg=gamma, gamma_pos=gamma),
    ],
    ids=["focal", "asymmetric", "with clip"],
)
def test_infinite_logits_two_derivatives(loss):
    """By logit twice 0, by logit and label finite: there the loss is linear or constant."""

    @jax.jit
    @jax.vmap
    def second_derivatives(x, y):
        """By gamma."""
        slopes = {g: jax.grad(functools.partial(loss, gamma=g)) for g in (0.5, 1.0, 2.0)}
        return {g: jax.grad(slope, (0, 1))(x, y) for g, slope in slopes.items()}

    x, y = np.float32([(x, y) for x in (np.inf, -np.inf) for y in (0, 1, 0.25)]).T
    for gamma, (by_logit, by_label) in second_derivatives(x, y).items():
        assert np.isfinite(by_label).all(), gamma
        np.testing.assert_array_equal(by_logit, 0, err_msg=f"gamma={gamma}")


def test_a_derivative_that_is_constant():
    """Without focus, by label twice and by logit once: 2 (1 - 2 alpha), whatever they are."""
    fn = functools.partial(focal, gamma=0, alpha=0.25)
    third_and_fourth = jax.jit(jax.value_and_grad(jax.grad(jax.grad(jax.grad(fn, 1), 1), 0)))
    for x, y in ((-3.0, 0.0), (0.5, 0.3), (40.0, 1.0)):
        third, fourth = third_and_fourth(x, y)
        assert third == pytest.approx(1, rel=4 * EPS)
        assert fourth == 0


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
    orders = (asymmetric, jax.grad(asymmetric), jax.hessian(asymmetric))
    derivatives = jax.jit(lambda x, y: [fn(x, y) for fn in orders])
    for got in derivatives(x, np.zeros_like(x)):
        assert not np.any(got)


@pytest.mark.parametrize("clip", [0.0, 0.05], ids="clip={}".format)
def test_stop_focus_gradient(clip, rng):
    """The value stays; the derivatives are those of the loss with its weights for constants."""
    x, y = rng.normal(0, 3, 50).astype(np.float32), rng.random(50).astype(np.float32)
    fn = functools.partial(asymmetric, clip=clip, reduction="sum")
    stopped = functools.partial(fn, stop_focus_gradient=True)

    def by_hand(x, y):
        p = jax.nn.sigmoid(x)
        shifted = jnp.maximum(p - clip, 0)
        weights = jax.lax.stop_gradient((1 - p, shifted**4))
        return jnp.sum(-y * weights[0] * jnp.log(p) - (1 - y) * weights[1] * jnp.log1p(-shifted))

    @jax.jit
    def ours(x, y):
        return fn(x, y), stopped(x, y), jax.grad(stopped)(x, y), jax.hessian(stopped)(x, y)

    value, *got = ours(x, y)
    np.testing.assert_allclose(got.pop(0), value, rtol=1e-6)
    expected = jax.jit(lambda x, y: [jax.grad(by_hand)(x, y), jax.hessian(by_hand)(x, y)])(x, y)
    for derivative, expected_ in zip(got, expected, strict=True):
        np.testing.assert_allclose(derivative, expected_, rtol=1e-3, atol=1e-5)


# --- hyper-parameters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (focal, {"gamma": -1}, "focal_loss: gamma must be finite and at least 0, got -1"),
        (focal, {"gamma": np.inf}, "gamma must be finite"),
        (focal, {"gamma": np.nan}, "gamma must be finite"),
        (focal, {"alpha": 1.5}, r"focal_loss: alpha must be in \[0, 1\], got 1.5"),
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


def test_a_traced_gamma_of_the_asymmetric_loss_says_how_to_make_it_static():
    message = r"gamma_neg must be a Python number.*static_argnames='gamma_neg'"
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda gamma: asymmetric(TAILS, TAILS, gamma_neg=gamma))(2.0)


def two_derivatives(gamma, x, y):
    first = jax.grad(lambda x, y: focal(x, y, gamma=gamma, alpha=0.25))
    return jax.vmap(jax.value_and_grad(first))(x, y)


of_any_gamma = jax.jit(two_derivatives)


@every_gamma
def test_an_array_for_gamma_is_as_its_number(gamma):
    """With two derivatives; within the rounding of the exponent, |log result| units of EPS."""
    x = np.concatenate([TAILS, np.float32([-np.inf, np.inf])])
    x, y = np.tile(x, 2), np.repeat(np.float32([0, 1]), len(x))
    expected = jax.jit(functools.partial(two_derivatives, gamma))(x, y)
    for got, expected_ in zip(of_any_gamma(np.float32(gamma), x, y), expected, strict=True):
        np.testing.assert_allclose(got, expected_, rtol=100 * EPS, atol=1e-30)


def test_gamma_and_alpha_are_mapped_and_differentiable(rng):
    """By central differences in float64."""
    x, y = rng.normal(0, 3, (4, 3)), rng.random((4, 3))
    gamma, alpha = rng.uniform(0.2, 3, 3), rng.random((4, 1))

    def of_all(gamma, alpha):
        return jaxbce.sigmoid_focal_loss(x, y, gamma=gamma, alpha=alpha).sum()

    with jax.enable_x64(True):
        slopes = jax.grad(of_all, (0, 1))
        first, total = jax.jit(slopes), jax.jit(of_all)
        got, hessian = first(gamma, alpha), jax.jit(jax.jacfwd(slopes))(gamma, alpha)
        assert [slope.shape for slope in got] == [(3,), (4, 1)]
        step = 1e-6
        for i in range(3):
            above, below = gamma + step * np.eye(3)[i], gamma - step * np.eye(3)[i]
            slope = (total(above, alpha) - total(below, alpha)) / (2 * step)
            np.testing.assert_allclose(got[0][i], slope, rtol=1e-6)
            mixed = [
                (a - b) / (2 * step)
                for a, b in zip(first(above, alpha), first(below, alpha), strict=True)
            ]
            np.testing.assert_allclose(hessian[0][:, i], mixed[0], rtol=1e-5, atol=1e-8)
        gammas = np.stack([gamma, gamma / 2])
        mapped = jax.vmap(total, (0, None))(gammas, alpha)
        np.testing.assert_allclose(mapped, [total(each, alpha) for each in gammas], rtol=1e-12)


@every_gamma
@every_label
def test_the_gradient_of_gamma_is_finite_in_the_tails(gamma, label):
    """∂ loss / ∂ gamma = loss · log(1 - p_t), also where p_t rounds to 1 and at infinite logits."""
    for x in (-300.0, -20.0, 0.0, 20.0, 300.0, np.inf, -np.inf):
        slope = jax.grad(lambda gamma, x=x: focal(np.float32(x), label, gamma=gamma))
        got = slope(jnp.float32(gamma))
        near = x < 0 if label == 0 else x > 0
        assert np.isfinite(got) or not near
        if np.isfinite(x):
            p = oracle.sigmoid(np.float64(x if label == 0 else -x))
            expected = p**gamma * oracle.softplus(np.float64(x if label == 0 else -x)) * np.log(p)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-30)


def test_the_gradient_of_gamma_for_nearly_hard_labels():
    """Of a hard example 1 - p_t rounds to 1; its logarithm is still -p_t, to all digits."""
    x, y = np.float32([(x, y) for x in (5, 16, 40, 80) for y in (1e-3, 1e-6, 1e-9)]).T
    x, y = np.concatenate([x, -x]), np.concatenate([y, 1 - y])
    got = jax.vmap(jax.grad(lambda gamma, x, y: focal(x, y, gamma=gamma)), (None, 0, 0))(2.0, x, y)
    x, y = np.float64(x), np.float64(y)
    p_t = (1 - y) * oracle.sigmoid(-x) + y * oracle.sigmoid(x)
    expected = (1 - p_t) ** 2 * oracle.bce_value(x, y) * np.log1p(-p_t)
    np.testing.assert_allclose(got, expected, rtol=8 * EPS)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0], ids="gamma={}".format)
def test_an_infinite_loss_does_not_move_gamma(gamma):
    """There log(1 - p_t) is 0."""
    x, y = np.float32([np.inf, -np.inf, 1]), np.float32([0, 1, 0])
    slope = jax.grad(lambda gamma, x, y: focal(x, y, gamma=gamma, reduction="sum"))
    got = slope(jnp.float32(gamma), x, y)
    np.testing.assert_allclose(got, slope(jnp.float32(gamma), x[2:], y[2:]), rtol=1e-6)


def test_hyper_parameters_by_label(rng):
    """A gamma and an alpha for each label are as that many calls."""
    x, y = rng.normal(0, 3, (5, 3)).astype(np.float32), rng.integers(0, 2, (5, 3))
    gamma, alpha = np.float32([0.5, 1, 2]), np.float32([0.25, 0.5, 0.9])
    got = jaxbce.sigmoid_focal_loss(x, y, gamma=gamma, alpha=alpha)
    for i in range(3):
        column = jaxbce.sigmoid_focal_loss(x[:, i], y[:, i], gamma=float(gamma[i]), alpha=alpha[i])
        np.testing.assert_allclose(got[:, i], column, rtol=50 * EPS)


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
