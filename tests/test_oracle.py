"""The reference itself: float64 formulas against 50 digits and more."""

import jax
import mpmath
import numpy as np
import oracle
import pytest
from losses import distinct_losses

mpmath.mp.dps = 50

LOGITS = [-700.0, -100.0, -17.0, -1.0, -1e-8, 0.0, 1e-8, 0.5, 17.0, 100.0, 700.0]


@pytest.mark.parametrize("q", [1.0, 3.5], ids="q={}".format)
@pytest.mark.parametrize("y", [0.0, 0.3, 1.0], ids="y={}".format)
@pytest.mark.parametrize("x", LOGITS, ids="x={}".format)
def test_bce_with_logits_matches_50_digits(x, y, q):
    def exact(z):
        softplus = mpmath.log1p(mpmath.exp(z)), mpmath.log1p(mpmath.exp(-z))
        return (1 - mpmath.mpf(y)) * softplus[0] + mpmath.mpf(q) * y * softplus[1]

    sigmoid = 1 / (1 + mpmath.exp(-mpmath.mpf(x))), 1 / (1 + mpmath.exp(mpmath.mpf(x)))
    slope = (1 - mpmath.mpf(y)) * sigmoid[0] - mpmath.mpf(q) * y * sigmoid[1]
    value, derivative = oracle.bce_with_logits(np.float64(x), np.float64(y), q)
    assert float(value) == pytest.approx(float(exact(mpmath.mpf(x))), rel=1e-15, abs=0)
    assert float(derivative) == pytest.approx(float(slope), rel=2e-15, abs=0)


@pytest.mark.parametrize("y", [0.0, 0.3, 1.0], ids="y={}".format)
@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.99], ids="p={}".format)
def test_bce_matches_50_digits(p, y):
    exact = -(mpmath.mpf(y) * mpmath.log(p) + (1 - mpmath.mpf(y)) * mpmath.log1p(-mpmath.mpf(p)))
    slope = (mpmath.mpf(p) - y) / (mpmath.mpf(p) * (1 - mpmath.mpf(p)))
    value, derivative = oracle.bce(np.float64(p), np.float64(y))
    assert float(value) == pytest.approx(float(exact), rel=1e-14)
    assert float(derivative) == pytest.approx(float(slope), rel=1e-4)


def exact_focal(x, y, gamma, alpha):
    p, q = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
    balance = 1 if alpha is None else y * alpha + (1 - y) * (1 - alpha)
    entropy = -(1 - y) * mpmath.log(q) - y * mpmath.log(p)
    return balance * (y * q + (1 - y) * p) ** gamma * entropy


def exact_asymmetric(x, y, gamma_neg, gamma_pos, clip):
    p, q = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
    m = max(p - clip, mpmath.mpf(0))
    return -y * q**gamma_pos * mpmath.log(p) - (1 - y) * m**gamma_neg * mpmath.log(1 - m)


@pytest.mark.parametrize("y", [0.0, 0.3, 1.0], ids="y={}".format)
@pytest.mark.parametrize("x", [-60.0, -17.0, -2.9, -1e-3, 0.0, 0.7, 17.0, 60.0], ids="x={}".format)
@pytest.mark.parametrize(
    ("reference", "exact", "options"),
    [
        (oracle.focal, exact_focal, (2.0, None)),
        (oracle.focal, exact_focal, (0.5, 0.25)),
        (oracle.asymmetric, exact_asymmetric, (4.0, 1.0, 0.05)),
        (oracle.asymmetric, exact_asymmetric, (0.5, 0.25, 0.0)),
    ],
    ids=["focal", "focal-alpha", "asymmetric", "asymmetric without clip"],
)
def test_a_product_of_functions_matches_400_digits(reference, exact, options, x, y):
    with mpmath.workdps(400):
        step = mpmath.mpf(10) ** -100
        below, at, above = (exact(mpmath.mpf(x) + k * step, y, *options) for k in (-1, 0, 1))
        expected = float(at), float((above - below) / (2 * step))
    got = reference(np.float64(x), np.float64(y), *options)
    # At x = -2.9 and clip = 0.05, p - clip has lost two digits and its fourth power a third.
    assert got == pytest.approx(expected, rel=1e-12, abs=0)


@distinct_losses
def test_an_oracle_is_its_formula(loss, rng):
    """In float64, where nothing cancels: a slip is in one of the two."""
    scores, labels = loss.draw(rng, (100,), np.float64)
    scores = np.clip(scores, -4, 4)

    def formula(score, label):
        return loss.formula(score, label, **loss.numbers)

    with jax.enable_x64(True):
        expected = jax.vmap(jax.value_and_grad(formula))(scores, np.float64(labels))
    np.testing.assert_allclose(loss.oracle(scores, np.float64(labels)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        (np.float32(1), 1.0, 0),
        (np.nextafter(np.float32(1), np.float32(2)), 1.0, 1),
        (np.float32(0), 1e-39, 0),
        (np.float32(np.inf), np.inf, 0),
        (np.float32(np.nan), np.nan, 0),
        (np.float32(np.nan), 1.0, np.inf),
        (np.float32(1), np.nan, np.inf),
    ],
    ids=["equal", "next", "flushed", "infinite", "nan", "unexpected nan", "missing nan"],
)
def test_ulp_error(got, expected, error):
    assert oracle.ulp_error(got, np.float64(expected)) == pytest.approx(error, abs=1e-6)
