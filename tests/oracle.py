"""The losses in plain float64, each with its derivative, and the distance between floats in ULP.

Written for reading and checked against mpmath at 50 digits in `test_oracle.py`. Arrays in, arrays
out; a coefficient of 0 gives 0, also times infinity; NaN stays.
"""

import jax
import jax.numpy as jnp
import numpy as np

EPS = float(np.finfo(np.float32).eps)


def times(coefficient, value):
    with np.errstate(invalid="ignore"):
        return np.where((coefficient == 0) & ~np.isnan(value), 0.0, coefficient * value)


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    t = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, t) / (1 + t)


def bce_value(x, y, q=1.0):
    return times(1 - y, softplus(x)) + times(q * y, softplus(-x))


def bce_slope(x, y, q=1.0):
    return (1 - y) * sigmoid(x) - q * y * sigmoid(-x)


def bce_with_logits(x, y, q=1.0):
    """(value, derivative with respect to x)"""
    return bce_value(x, y, q), bce_slope(x, y, q)


def derivative(order, x, y):
    """The derivative of that order, from 0 to 3, of `bce_with_logits` with respect to x."""
    if order < 2:
        return (bce_value, bce_slope)[order](x, y)
    second = sigmoid(x) * sigmoid(-x)
    return second if order == 2 else -second * np.tanh(x / 2)


def bce(p, y):
    with np.errstate(divide="ignore"):
        log_p = np.maximum(np.log(p), -100)
        log_1mp = np.maximum(np.log1p(-p), -100)
    return -(y * log_p + (1 - y) * log_1mp), (p - y) / np.maximum(p * (1 - p), 1e-12)


def focal(x, y, gamma, alpha=None):
    """(value, derivative with respect to x); m = 1 - p_t, and slope is that of log m"""
    p, q = sigmoid(x), sigmoid(-x)
    balance = 1.0 if alpha is None else y * alpha + (1 - y) * (1 - alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_m = np.select(
            [y == 0, y == 1], [-softplus(-x), -softplus(x)], np.log(y * q + p - y * p)
        )
        slope = np.select([y == 0, y == 1], [q, -p], (1 - 2 * y) * p * q / np.exp(log_m))
    value, derivative = bce_with_logits(x, y)
    factor = balance * np.exp(gamma * log_m)
    return times(factor, value), times(factor, gamma * times(slope, value) + derivative)


def asymmetric(x, y, gamma_neg=4.0, gamma_pos=1.0, clip=0.05):
    """(value, derivative with respect to x); m = max(p - clip, 0), and slope is that of log m"""
    p, q = sigmoid(x), sigmoid(-x)
    positive = np.exp(-gamma_pos * softplus(x))
    if clip:
        m = np.maximum(p - clip, np.finfo(np.float64).tiny)
        factor, slope = np.where(p > clip, m**gamma_neg, 0), p * q / m
        negative, negative_slope = -np.log1p(-m), np.where(p > clip, p * q / (q + clip), 0)
    else:
        factor, slope = np.exp(-gamma_neg * softplus(-x)), q
        negative, negative_slope = softplus(x), p
    value = times(y * positive, softplus(-x)) + times((1 - y) * factor, negative)
    positive_slope = times(positive, gamma_pos * times(p, softplus(-x)) + q)
    negative_slope = np.where(
        factor > 0, factor * (gamma_neg * times(slope, negative) + negative_slope), 0
    )
    return value, (1 - y) * negative_slope - y * positive_slope


def all_finite(dtype):
    """Every finite number of a 16-bit dtype."""
    values = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.dtype(dtype))
    return values[jnp.isfinite(values)]


def ulp(values, dtype):
    """One unit in the last place of `dtype` at a float64."""
    info = jnp.finfo(dtype)
    magnitude = np.maximum(np.abs(values), float(info.smallest_normal))
    return np.exp2(np.floor(np.log2(magnitude))) * float(info.eps)


def ulp_error(got, expected, flushed=1.0):
    """|got - expected| in units in the last place of the dtype of `got` at `expected` (float64).

    Two numbers below `flushed` times the smallest normal one are equal: XLA on a CPU flushes to 0.
    Beyond the largest number, infinity is exact.
    """
    info = jnp.finfo(got.dtype)
    smallest = float(info.smallest_normal)
    dtype, got = got.dtype, np.asarray(got, np.float64)
    expected = np.where(np.abs(expected) > float(info.max), np.copysign(np.inf, expected), expected)
    with np.errstate(invalid="ignore"):
        error = np.abs(got - expected) / ulp(expected, dtype)
        equal = (got == expected) | (np.isnan(got) & np.isnan(expected))
        equal |= np.maximum(np.abs(got), np.abs(expected)) <= smallest * flushed
    return np.where(equal, 0.0, np.where(np.isnan(error), np.inf, error))


def assert_within_ulp(bound, got, expected, logits, flushed=1.0):
    """The largest `ulp_error` is at most `bound`; the failure names the logit."""
    error = ulp_error(got, expected, flushed)
    worst = int(np.argmax(error))
    assert error[worst] <= bound, (
        f"{error[worst]:.3g} ULP at logit {logits[worst]}: got {got[worst]}, not {expected[worst]}"
    )
