"""Asymmetric loss: formula, derivatives, value, and its public function."""

from __future__ import annotations

import decimal
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxbce import _checks, _math
from jaxbce._loss import Loss, Options, evaluate
from jaxbce._losses import bce
from jaxbce._math import WHOLE, multiply_no_nan, multiply_saturated
from jaxbce._reduce import Reduction

# Asymmetric loss, with p = sigmoid(x), q = sigmoid(-x), m = max(p - clip, 0) and n = -log(1 - m):
#
#   loss = y q^gamma_pos softplus(-x) + (1 - y) m^gamma_neg n
#
# p^k has the derivative k q p^k. Where m > 0, m^k has k p q m^(k - 1) and n has p q / (1 - m), with
# 1 - m = q + clip. At the kink m = 0 and below, m^k and its derivatives are 0, also for k = 0, and
# so is the loss of a negative. Without clip, m is p and n is softplus(x).


@functools.cache
def sigmoid_power(k: float) -> _math.ScalarFn:
    """p^k"""

    def value(x: jax.Array) -> jax.Array:
        if k in WHOLE:
            return lax.integer_pow(_math.sigmoid(x), int(k))
        return _math.exp(-k * _math.softplus(-x))

    def partials(x: jax.Array) -> tuple[jax.Array | None]:
        return (k * _math.sigmoid(-x) * sigmoid_power(k)(x) if k else None,)

    return _math.with_jvp(value, partials)


def kink(clip: float, dtype: Any) -> tuple[float, float]:
    """Where p = clip, x0 = log(clip / (1 - clip)): the nearest number of `dtype`, and the rest.

    Near the kink x - x0 cancels, so x0 needs more digits than `dtype` has.
    """
    # In float64 the rest is below the arithmetic's own precision.
    digits, p = decimal.Context(prec=50), decimal.Decimal(clip)
    x0 = digits.ln(digits.divide(p, digits.subtract(1, p)))
    rounded = float(np.asarray(float(x0), dtype))
    return rounded, float(digits.subtract(x0, decimal.Decimal(rounded)))


def clipped(x: jax.Array, clip: float) -> tuple[jax.Array, jax.Array]:
    """m and 1 - m; m to a few ULP also near the kink."""
    p, q = _math.sigmoid(x), _math.sigmoid(-x)
    x0, rest = kink(clip, x.dtype)
    # p - clip = clip q (exp(x - x0) - 1), where x - x0 is exact and the rest of x0 follows.
    beyond = x - x0
    n, d = _math.tanh_fraction(jnp.clip(beyond, -1, 1))
    growth = _math.quotient(2 * n, d - n)  # exp(beyond) - 1, also near 0
    growth = growth - rest * (1 + growth)
    far = p - clip if clip < 0.5 else (1 - clip) - q  # the smaller two, which cancel less
    return jnp.maximum(jnp.where(beyond < 0.6, clip * q * growth, far), 0), q + clip


@functools.cache
def clipped_power(k: float, clip: float) -> _math.ScalarFn:
    """m^k"""

    def value(x: jax.Array) -> jax.Array:
        m, _ = clipped(x, clip)
        base = jnp.where(m > 0, m, 1)
        power = lax.integer_pow(base, int(k)) if k in WHOLE else _math.exp(k * _math.log(base))
        return jnp.where(m > 0, power, 0)

    def partials(x: jax.Array) -> tuple[jax.Array | None]:
        return (k * _math.sigmoid_slope(x) * clipped_power(k - 1, clip)(x) if k else None,)

    return _math.with_jvp(value, partials)


@functools.cache
def clipped_softplus(clip: float) -> _math.ScalarFn:
    """n"""

    def value(x: jax.Array) -> jax.Array:
        m, rest = clipped(x, clip)
        # log(1 + m / (1 - m)) does not cancel where m is small.
        near = _math.log1p_unit(jnp.minimum(_math.quotient(m, rest), 1))
        return jnp.where(m < 0.5, near, -_math.log(rest))

    def partials(x: jax.Array) -> tuple[jax.Array]:
        return (_math.sigmoid_slope(x) * _math.reciprocal(_math.sigmoid(-x) + clip),)

    return _math.with_jvp(value, partials)


@functools.cache
def asymmetric(
    gamma_neg: float, gamma_pos: float, clip: float, stop_focus_gradient: bool
) -> _math.ScalarFn:
    def loss(x: jax.Array, y: jax.Array) -> jax.Array:
        focus = sigmoid_power(gamma_pos)(-x)
        if clip:
            focus_neg = clipped_power(gamma_neg, clip)(x)
            cross_entropy_neg = clipped_softplus(clip)(x)
        else:
            focus_neg, cross_entropy_neg = sigmoid_power(gamma_neg)(x), _math.softplus(x)
        if stop_focus_gradient:
            focus, focus_neg = lax.stop_gradient((focus, focus_neg))
        positive = multiply_saturated(focus, _math.softplus(-x))
        return multiply_no_nan(y, positive) + multiply_no_nan(
            1 - y, multiply_saturated(focus_neg, cross_entropy_neg)
        )

    return _math.rematerialised(loss, _math.hidden_identity)


def asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    stop_focus_gradient: bool = False,
    weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """Focal loss with a focus for each class, that leaves out the easiest negatives altogether.

    Use it for many labels of which few are positive and some positives are not annotated. It trains
    scores that rank well; sigmoid(logits) is then no calibrated probability.

    Formula, with x a logit, y its label, w its weight, p = sigmoid(x) and pₘ = max(p − clip, 0):

      loss = −w · [y (1 − p)^gamma_pos log p + (1 − y) pₘ^gamma_neg log(1 − pₘ)]

    Args:
      logits: float array of any shape.
      labels: float, integer or bool array of the same shape, in [0, 1]; the loss is linear in it.
      gamma_neg: Python number ≥ 0, how much less easy negatives count.
      gamma_pos: Python number ≥ 0, how much less easy positives count. With gamma_neg = gamma_pos =
        clip = 0 it is exactly `bce_with_logits`. Each set of values compiles once.
      clip: Python number in [0, 1); negatives with p ≤ clip give no loss and no gradient.
      stop_focus_gradient: True takes (1 − p)^gamma_pos and pₘ^gamma_neg for constants in every
        derivative, as most published training recipes do.
      weight: real array that broadcasts to the shape of logits and multiplies the loss; None is 1.
        One value per row of a (batch, labels) array is `weight[:, None]`.
      label_smoothing: number a in [0, 1]; labels become y (1 − a) + a / 2.
      where: bool array that broadcasts to the shape of logits; False leaves an element out. None
        keeps everything.
      axis: int or tuple of ints, the axes that are reduced; None reduces all of them.
      reduction: "mean", "weighted_mean", "sum", "batchmean" or "none", as for `bce_with_logits`.
        The original is "sum".

    Returns:
      The loss in float32 (float64 for float64 logits): a scalar, with `axis` an array of the axes
      that stay, for "none" one of the shape of logits.

    Raises:
      TypeError: logits are not floating-point, where is not bool, an argument is not an array,
        gamma_neg, gamma_pos or clip is traced or an array.
      ValueError: labels have another shape than logits, weight or where does not broadcast to it,
        or gamma_neg, gamma_pos, clip, label_smoothing, axis or reduction is not valid.

    Edge values: a coefficient of 0 gives 0, also times ∞. (+∞, 1) and (−∞, 0) give loss 0 and
    gradient 0; (−∞, 1) gives loss ∞ and gradient −1; (+∞, 0) gives loss ∞ and gradient 1 with clip
    0, else loss −(1 − clip)^gamma_neg log(clip) and gradient 0. At p = clip every derivative is 0,
    as below: a bias that starts there, from a rare prior, leaves negatives nothing to learn. NaN
    gives NaN. Where masked, or where weight is 0, anything gives 0.

    Differentiable: with respect to logits, float labels and weight, each in its own dtype and
    shape, in reverse mode and forward over reverse (`jax.hessian`) to any order; finite wherever
    the true derivative is.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> logits, labels = jnp.array([2.0, -1.0, 0.5]), jnp.array([1, 0, 0])
      >>> print(round(float(jaxbce.asymmetric_loss(logits, labels)), 4))
      0.0357

    Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification" (2021).
    """
    name = "asymmetric_loss"
    gammas = [
        _checks.static_number(name, argument, value, "finite and at least 0", 0, math.inf)
        for argument, value in (("gamma_neg", gamma_neg), ("gamma_pos", gamma_pos))
    ]
    clip = _checks.static_number(name, "clip", clip, "in [0, 1)", 0, math.nextafter(1, 0))
    loss = bce.BCE
    if clip or any(gammas):
        loss = Loss(asymmetric(*gammas, clip, bool(stop_focus_gradient)))
    options = Options(weight, label_smoothing, where, axis, reduction)
    return evaluate(name, loss, logits, labels, options)
