"""Accuracy where nobody ran it: with the errors that JAX publishes for each backend."""

import functools

import backends
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from losses import LOSSES

import jaxbce
from jaxbce import _math

X = np.concatenate(
    [
        np.asarray(backends.oracle.all_finite("bfloat16"), np.float32)[::8],
        np.random.default_rng(0).uniform(-100, 100, 2**12).astype(np.float32),
        np.random.default_rng(1).normal(0, 3, 2**12).astype(np.float32),
    ]
)
X = X[X != 0]
every_backend = pytest.mark.parametrize("backend", list(backends.TABLE)[:4])
every_label = pytest.mark.parametrize("label", [0.0, 1.0], ids="label={}".format)


@every_backend
@every_label
@pytest.mark.parametrize(
    ("order", "bound"),
    [(0, 5), (1, 5), (2, 7), (3, 10)],
    ids=["loss", "gradient", "second derivative", "third derivative"],
)
def test_the_worst_is_below_what_was_derived(backend, label, order, bound):
    """And that below the bound. The other rows of the table are no worse than these."""
    derived = backends.derived(backend, order, X, label)
    assert derived.max() < bound
    expected = backends.oracle.derivative(order, np.float64(X), label)
    found = backends.worst(
        backend, jaxbce.sigmoid_binary_cross_entropy, order, expected, X, label, rounds=2
    )
    assert (found <= np.maximum(derived, 0.5) + 1e-6).all()
    assert found.max() > 1.5  # an evaluation without errors would find less


@pytest.mark.newest
@every_backend
@pytest.mark.parametrize("gamma", [1.0, 2.0, 5.0], ids="gamma={}".format)
@pytest.mark.parametrize("order", [0, 1], ids=["loss", "gradient"])
def test_focal_loss_of_a_whole_gamma(backend, gamma, order):
    def fn(x, y):
        return jaxbce.focal_loss(x, y, gamma=gamma, reduction="none")

    x = X[np.abs(X) < 60 / (1 + gamma)]
    expected = backends.oracle.focal(np.float64(x), np.zeros(x.shape), gamma)[order]
    assert backends.worst(backend, fn, order, expected, x, 0.0, rounds=1).max() < 48


@pytest.mark.newest
@every_backend
def test_asymmetric_loss_of_a_positive(backend):
    def fn(x, y):
        return jaxbce.asymmetric_loss(x, y, reduction="none")

    x = X[np.abs(X) < 30]
    expected = backends.oracle.asymmetric(np.float64(x), np.ones(x.shape))[1]
    assert backends.worst(backend, fn, 1, expected, x, 1.0, rounds=1).max() < 48


# --- two operations ------------------------------------------------------------------------------

ARITHMETIC = {*backends.ROUNDED, *backends.CALLS, "integer_pow", "select_n", "clamp"}
ARITHMETIC |= {"convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "platform_index"}
ARITHMETIC |= {"pvary", "expand_dims", "optimization_barrier"}


def inexact(jaxpr, inside=False):
    """Names of what is neither arithmetic, nor an accurate exponential, nor inside `quotient`."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        accurate = equation.params.get("accuracy") is jax.lax.AccuracyMode.HIGHEST
        if name == "cond":
            for branch in equation.params["branches"]:
                yield from inexact(branch.jaxpr, True)
        elif name in backends.CALLS:
            inner = backends.inner(equation)
            yield from inexact(getattr(inner, "jaxpr", inner), inside)
        elif (name == "exp" and accurate) or (name == "div" and inside):
            continue
        elif name not in ARITHMETIC:
            yield f"accurate {name}" if accurate else name


KERNELS = [loss for loss in LOSSES if loss.own_kernel]
WITHOUT_LOGARITHM = {loss.name: loss.unreduced for loss in KERNELS if not loss.logarithm} | {
    "focal, whole": lambda x, y: jaxbce.focal_loss(x, y, alpha=0.25, reduction="none"),
    "asymmetric, no clip": lambda x, y: jaxbce.asymmetric_loss(x, y, clip=0, reduction="none"),
    "softplus": lambda x, y: jaxbce.softplus(x),
    "sigmoid": lambda x, y: jaxbce.sigmoid(x),
    "head": lambda x, y: jaxbce.linear_bce_with_logits(x, jnp.eye(3), labels=y),
    "linear_loss": lambda x, y: jaxbce.linear_loss(
        functools.partial(jaxbce.focal_loss, reduction="none"), x, jnp.eye(3), labels=y
    ),
}
WITH_LOGARITHM = {loss.name: loss.unreduced for loss in KERNELS if loss.logarithm}


def four_jaxprs(fn):
    """Of the loss and its first three derivatives, by scores and labels together."""

    def summed(fn):
        return lambda x, y: sum(part.sum() for part in jax.tree.leaves(fn(x, y)))

    x = jnp.full((2, 3), 0.3)
    for _ in range(4):
        fn = summed(fn)
        yield jax.make_jaxpr(fn)(x, x)
        fn = jax.grad(fn, (0, 1))


@pytest.mark.newest
@pytest.mark.parametrize("name", [*WITHOUT_LOGARITHM, *WITH_LOGARITHM])
def test_nothing_is_inexact_but_two_operations(name):
    """Some losses also take a logarithm, as accurate as the backend has one."""
    found = {
        op
        for jaxpr in four_jaxprs((WITHOUT_LOGARITHM | WITH_LOGARITHM)[name])
        for op in inexact(jaxpr.jaxpr)
    }
    found -= {"reduce_sum", "dot_general", "transpose", "dynamic_slice", "iota", "scan", "while"}
    found -= {"dynamic_update_slice", "empty2", "slice", "pad"}
    allowed = {"accurate log", "accurate log1p"} if name in WITH_LOGARITHM else set()
    assert found <= allowed


@pytest.mark.parametrize("off", [0.0, 2**-12, -(2**-12)], ids="{:.2g}".format)
def test_a_quotient_mends_a_division_that_is_right_to_12_bits(off, monkeypatch, rng):
    n, d = (np.float32(rng.uniform(0.5, 4, 10_000)) for _ in range(2))

    class Approximate(np.ndarray):
        def __truediv__(self, other):
            return np.divide(np.asarray(self), np.asarray(other)) * np.float32(1 + off)

    with np.errstate(all="ignore"):
        got = _math.corrected_quotient(n.view(Approximate), d)
    error = backends.oracle.ulp_error(np.asarray(got, np.float32), np.float64(n) / d)
    assert error.max() < (1.6 if off == 0 else 2.3)


def test_a_quotient_of_infinite_and_zero():
    n, d = jnp.array([jnp.inf, 1.0, 0.0, jnp.nan]), jnp.array([2.0, 0.0, 3.0, 1.0])
    np.testing.assert_array_equal(_math.corrected_quotient(n, d), n / d)


def test_the_constants_of_log1p():
    """The polynomial of z = s² in log(1 + t) = t - s (t - z S(z)), s = t / (2 + t), on [0, 1]."""
    with mpmath.workdps(30):
        worst = 0
        for i in range(1, 2001):
            t = mpmath.mpf(i) / 2000
            s = t / (2 + t)
            z = s * s
            got = t - s * (t - z * _math.log1p_series(z))
            worst = max(worst, abs(got / mpmath.log1p(t) - 1))
    assert worst < 4.6e-9


@pytest.mark.parametrize(
    ("fraction", "bound"),
    [(_math.short_fraction, 1e-10), (_math.long_fraction, 2e-19)],
    ids=["float32", "float64"],
)
def test_the_continued_fraction_of_tanh(fraction, bound):
    with mpmath.workdps(30):
        worst = 0
        for i in range(1, 1001):
            x = mpmath.mpf(i) / 1000
            n, d = fraction(x)
            worst = max(worst, abs(n / d / mpmath.tanh(x / 2) - 1))
    assert worst < bound
