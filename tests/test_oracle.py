"""The reference itself: float64 formulas against 50 digits."""

import mpmath
import numpy as np
import oracle
import pytest

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
