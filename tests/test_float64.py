"""float64: how far every loss and its derivatives are from the truth, by mpmath.

The unit is ε (|f| + d |∂f/∂x|), with ε = 2⁻⁵² and d the distance of x from 0, or from the kink of a
clip, at most 1. It is about ε |f| where f does not cross 0.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import mpmath
import numpy as np
import pytest

import jaxbce

EPS = 2.0**-52
RNG = np.random.default_rng(0)
MAGNITUDES = [1e-300, 1e-12, 1e-3, 0.6, 1 - 1e-16, 1, 2.5, 7.3, 17, 40, 300, 700]
LOGITS = [sign * x for x in [*MAGNITUDES, *RNG.uniform(0, 1.5, 4)] for sign in (1, -1)]
LABELS = [0, 1, 0.25, 1e-9]
PROBABILITIES = [1e-11, 1e-6, 1e-3, *RNG.uniform(0, 1, 8), 1 - 1e-3, 1 - 1e-6, 1 - 1e-11]
TO_THE_FOURTH = tuple((order, 0) for order in range(5))
TO_THE_THIRD = TO_THE_FOURTH[:4]
BY_LABEL, TWICE_BY_LABEL = ((0, 1), (1, 1)), (0, 2)
BY_PARAMETER = ((0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2))


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def softplus(x):
    return mpmath.log1p(mpmath.exp(x))


def bce_with_logits(x, y, q=1):
    return (1 - y) * softplus(x) + q * y * softplus(-x)


def bce(p, y):
    return -y * mpmath.log(p) - (1 - y) * mpmath.log1p(-p)


def focal(x, y, gamma, alpha=None):
    balance = 1 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    return balance * ((1 - y) * sigmoid(x) + y * sigmoid(-x)) ** gamma * bce_with_logits(x, y)


def asymmetric(x, y, gamma_neg, gamma_pos, clip):
    m = sigmoid(x) - clip
    cross_entropy = -mpmath.log1p(-m) if m < 0.5 else -mpmath.log(sigmoid(-x) + clip)
    negative = m ** mpmath.mpf(gamma_neg) * cross_entropy if m > 0 else 0
    return y * sigmoid(-x) ** mpmath.mpf(gamma_pos) * softplus(-x) + (1 - y) * negative


class Case(NamedTuple):
    """A function, its truth, the derivatives in question, its arguments, the bound in units."""

    fn: Callable
    truth: Callable
    orders: tuple
    arguments: tuple = (LOGITS, LABELS)
    bound: float = 2
    kink: float = 0.0
    fraction: bool = False  # in an exponent, in which the rounding of log f counts


def focal_case(gamma, alpha=None):
    options = {"gamma": gamma, "alpha": alpha}
    losses = (functools.partial(fn, **options) for fn in (jaxbce.focal_loss, focal))
    orders = (*TO_THE_THIRD, *BY_LABEL, TWICE_BY_LABEL)
    return Case(*losses, orders, bound=8, fraction=gamma % 1 > 0)


def asymmetric_case(gamma_neg, gamma_pos, clip):
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    losses = (functools.partial(fn, **options) for fn in (jaxbce.asymmetric_loss, asymmetric))
    kink = float(np.log(clip / (1 - clip))) if clip else 0.0
    distances = [1e-15, 1e-12, 1e-8, 1e-4, 0.1, 0.59, 0.61, 1.5] if clip else []
    near = [kink + sign * distance for distance in distances for sign in (1, -1)]
    fraction = gamma_neg % 1 > 0 or gamma_pos % 1 > 0
    orders = (*TO_THE_THIRD, *BY_LABEL)
    return Case(*losses, orders, ([*LOGITS, *near], [0, 1]), 24, kink, fraction)


CASES = {
    "softplus": Case(jaxbce.softplus, softplus, TO_THE_FOURTH, (LOGITS,)),
    "log_sigmoid": Case(jaxbce.log_sigmoid, lambda x: -softplus(-x), TO_THE_FOURTH, (LOGITS,)),
    "sigmoid": Case(jaxbce.sigmoid, sigmoid, TO_THE_FOURTH, (LOGITS,)),
    "bce_with_logits": Case(jaxbce.bce_with_logits, bce_with_logits, (*TO_THE_FOURTH, *BY_LABEL)),
    "pos_weight": Case(
        lambda x, y, q: jaxbce.bce_with_logits(x, y, pos_weight=q),
        bce_with_logits,
        (*((*orders, 0) for orders in (*TO_THE_FOURTH, *BY_LABEL)), *BY_PARAMETER[:3]),
        (LOGITS, LABELS, [3.5]),
        12,
    ),
    "bce": Case(jaxbce.bce, bce, (*TO_THE_THIRD, *BY_LABEL, (2, 1)), (PROBABILITIES, LABELS)),
    "focal 2": focal_case(2.0),
    "focal 5": focal_case(5.0),
    "focal 0.5": focal_case(0.5),
    "focal 1.5": focal_case(1.5),
    "focal alpha": focal_case(2.0, 0.3),
    "focal array": Case(
        lambda x, y, gamma: jaxbce.focal_loss(x, y, gamma=gamma),
        focal,
        ((0, 0, 0), (1, 0, 0), (2, 0, 0), *BY_PARAMETER),
        (LOGITS, LABELS, [0.5, 2]),
        12,
        fraction=True,
    ),
    "asymmetric": asymmetric_case(4.0, 1.0, 0.05),
    "asymmetric fractions": asymmetric_case(1.5, 0.7, 0.1),
    "asymmetric square root": asymmetric_case(0.5, 0.0, 0.2),
    "asymmetric large clip": asymmetric_case(2.0, 1.0, 0.99),
    "asymmetric no clip": asymmetric_case(4.0, 1.0, 0.0),
}


@functools.cache
def exact(fn, point, orders):
    """The derivative of these orders at one point of floats."""
    x = abs(point[0])
    # What is as small as e^-|x|, as x, or as a square of either, is a difference of larger terms.
    digits = (1 + sum(orders[1:])) * (x / 2 if x > 1 else -math.log10(x))
    with mpmath.workdps(40 + int(digits)):
        numbers = tuple(map(mpmath.mpf, point))
        return float(mpmath.diff(fn, numbers, orders) if any(orders) else fn(*numbers))


def derivative(fn, orders):
    for argument, order in enumerate(orders):
        for _ in range(order):
            fn = jax.grad(fn, argument)
    return fn


def computed(fn, points, orders):
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.vmap(derivative(fn, orders)))(*np.float64(points).T))


def assert_within(bound, got, expected, slope, points, kink=0.0, fraction=False, where=""):
    """In units, with `slope` for ∂f/∂x; of a power with a fraction, times 1 + |log f| / 8."""
    expected, slope, x = np.array(expected), np.array(slope), np.array(points)[:, 0]
    vanishes = np.abs(expected) < 1e-290
    assert np.all(np.abs(got[vanishes]) < 1e-289)
    unit = np.abs(expected) + np.minimum(np.abs(x - kink), 1) * np.abs(slope)
    if fraction:
        unit *= 1 + np.abs(np.log(np.abs(expected), where=~vanishes, out=np.zeros_like(x))) / 8
    error = np.abs(got - expected) / EPS / np.where(vanishes, np.inf, unit)
    worst = np.argmax(error)
    assert error[worst] <= bound, f"{error[worst]:.3g} units at {points[worst]} {where}"


@pytest.mark.newest
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_within_units(case):
    """By logit up to 700; by other arguments up to 40, which needs fewer digits of mpmath."""
    for orders in case.orders:
        points = list(itertools.product(*(map(float, values) for values in case.arguments)))
        if any(orders[1:]):
            points = [point for point in points if 1e-12 <= abs(point[0]) <= 40]
        further = (orders[0] + 1, *orders[1:])
        expected, slope = (
            [exact(case.truth, point, each) for point in points] for each in (orders, further)
        )
        got = computed(case.fn, points, orders)
        where = f"orders {orders}"
        assert_within(case.bound, got, expected, slope, points, case.kink, case.fraction, where)


@pytest.mark.parametrize("order", [1, 2], ids="order={}".format)
@pytest.mark.parametrize("label", [0, 1], ids="label={}".format)
def test_stop_focus_gradient(label, order):
    """The derivative without a focus, times the focus."""
    kink = CASES["asymmetric"].kink
    points = [(x, float(label)) for x in CASES["asymmetric"].arguments[0]]
    without = functools.partial(asymmetric, gamma_neg=0, gamma_pos=0, clip=0.05)
    focus_of = (lambda x, y: max(sigmoid(x) - 0.05, 0) ** 4, lambda x, y: sigmoid(-x))
    focus = [exact(focus_of[label], point, (0, 0)) for point in points]
    expected, slope = (
        np.array([exact(without, point, (each, 0)) for point in points]) * focus
        for each in (order, order + 1)
    )
    loss = functools.partial(jaxbce.asymmetric_loss, stop_focus_gradient=True)
    assert_within(8, computed(loss, points, (order, 0)), expected, slope, points, kink)
