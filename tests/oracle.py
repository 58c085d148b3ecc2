"""The losses in plain float64, each with its derivative, and the distance between floats in ULP.

Written for reading and checked against mpmath at 50 digits in `test_oracle.py`. Arrays in, arrays out;
a zero coefficient annihilates.
"""

import numpy as np


def times(coefficient, value):
    with np.errstate(invalid="ignore"):
        return np.where(coefficient == 0, 0.0, coefficient * value)


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    t = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, t) / (1 + t)


def bce_with_logits(x, y, q=1.0):
    """(value, derivative with respect to x)"""
    value = times(1 - y, softplus(x)) + times(q * y, softplus(-x))
    return value, (1 - y) * sigmoid(x) - q * y * sigmoid(-x)


def bce(p, y):
    with np.errstate(divide="ignore"):
        log_p = np.maximum(np.log(p), -100)
        log_1mp = np.maximum(np.log1p(-p), -100)
    return -(y * log_p + (1 - y) * log_1mp), (p - y) / np.maximum(p * (1 - p), 1e-12)


def ulp_error(got, expected, smallest=None):
    """|got - expected| in units in the last place of the dtype of `got` at `expected` (float64).

    Below `smallest`, by default the smallest normal number, an ULP does not shrink further: XLA on a
    CPU flushes subnormal numbers to 0.
    """
    info = np.finfo(got.dtype) if got.dtype.kind == "f" else _finfo(got.dtype)
    floor = float(info.smallest_normal if smallest is None else smallest)
    magnitude = np.maximum(np.abs(np.asarray(expected, np.float64)), floor)
    ulp = np.exp2(np.floor(np.log2(magnitude))) * float(info.eps)
    got = np.asarray(got, np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(got - expected) / ulp
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))


def _finfo(dtype):
    import jax.numpy as jnp

    return jnp.finfo(dtype)
