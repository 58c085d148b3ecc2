"""Focal loss: formula, derivatives, value, and its public functions."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbce import _checks, _math
from jaxbce._loss import Loss, Options, evaluate, size_bound, undefined_outside
from jaxbce._losses import bce
from jaxbce._math import WHOLE, multiply_no_nan, multiply_no_nan_value, multiply_saturated
from jaxbce._reduce import Reduction

# Focal loss with p = sigmoid(x), q = sigmoid(-x), m = 1 - p_t = (1 - y) p + y q and c the binary
# cross-entropy:
#
#   loss = alpha_t m^gamma c,  alpha_t = (1 - alpha) (1 - y) + alpha y
#
# With s = p - y, m^gamma c and its derivatives are sums of terms m^k (p q)^j f, in which f is c, s,
# x or 1:
#
#   ∂m/∂x = (1 - 2 y) p q   ∂(p q)/∂x = -(p - q) p q   ∂c/∂x = s    ∂s/∂x = p q
#   ∂m/∂y = -(p - q)        ∂(p q)/∂y = 0              ∂c/∂y = -x   ∂s/∂y = -1

FACTORS: dict[str, _math.ScalarFn] = {
    "c": bce.value,
    "s": _math.sigmoid_minus_value,
    "x": lambda x, y: x,
    "1": lambda x, y: jnp.ones_like(x),
}
# How a factor differentiates: D_X["s"] = (1, "1") reads ∂s/∂x = (p q)^1 · 1, and MINUS_D_Y["c"] =
# "x" reads ∂c/∂y = -x. A factor that a table lacks has the derivative 0.
D_X = {"c": (0, "s"), "s": (1, "1"), "x": (0, "1")}
MINUS_D_Y = {"c": "x", "s": "1"}


def m_value(x: jax.Array, y: jax.Array) -> jax.Array:
    return _math.sigmoid_mix_value(x, 1 - y, -y)


def log_m_in_exponent(x: jax.Array, y: jax.Array) -> jax.Array:
    """log m, of which an exponent needs no relative accuracy where it is near 0."""
    # For a hard label m is p or q. Their logarithm is right even where they underflow to 0.
    hard, of_hard = (y == 0) | (y == 1), -bce.value(x, 1 - y)
    logarithm = jnp.where(hard, of_hard, _math.log(m_value(x, y)))
    return jnp.maximum(logarithm, -float(jnp.finfo(x.dtype).max))  # finite, so that 0 · log m is 0


def log_m_value(x: jax.Array, y: jax.Array) -> jax.Array:
    p_t = _math.sigmoid_mix_value(x, y, y - 1)
    near_1 = (y > 0) & (y < 1) & (p_t < 0.25)  # log1p loses digits above, in some XLA
    return jnp.where(near_1, lax.log1p(-p_t, accuracy=_math.HIGHEST), log_m_in_exponent(x, y))


def log_m_partials(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    d_x = (1 - 2 * y) * focal_term(-1, 1, "1")(x, y, None)
    return d_x, -multiply_saturated(_math.tanh_half(x), focal_term(-1, 0, "1")(x, y, None))


log_m = _math.with_jvp(log_m_value, log_m_partials)


@functools.cache
def focal_term(k: float, j: int, f: str) -> _math.ScalarFn:
    """The function of x, y and g that is m^(k + g) (p q)^j f.

    `k` and `j` are compiled in. `g` is that part of the exponent which is an array, or None.
    """

    def value(x: jax.Array, y: jax.Array, g: jax.Array | None) -> jax.Array:
        m, pq = m_value(x, y), _math.sigmoid_slope_value(x)
        factor = FACTORS[f](x, y)
        if g is None and k in WHOLE:
            return multiply_no_nan_value(
                lax.integer_pow(m, int(k)) * lax.integer_pow(pq, j), factor
            )
        # m^k with a negative k can overflow while (p q)^j underflows. So both are written as
        # m^(k + j) (p q / m)^j, where p q / m <= 1. c and s are divided by an m in the same way.
        # Where m underflows, the label is hard, and m, p q, c and |s| are all the smaller of p and
        # q: the quotients are 1.
        info = jnp.finfo(x.dtype)
        vanished = m < info.tiny
        ratio = jnp.where(vanished, 1, _math.quotient(pq, m))
        exponent = k + j if g is None else k + j + g
        if f in ("c", "s"):
            exponent = exponent + 1
            limit = 1 if f == "c" else 1 - 2 * y
            factor = jnp.where(vanished, limit, _math.quotient(factor, m))
        # The power stays below the largest float by a factor of e^7, about 1000. `partials`
        # multiplies it by exponents and subtracts such terms. From an infinite one it would make
        # ∞ - ∞ or 0 · ∞, which are NaN.
        power = _math.exp(jnp.minimum(exponent * log_m_in_exponent(x, y), math.log(info.max) - 7))
        return multiply_no_nan_value(power * lax.integer_pow(ratio, j), factor)

    def partials(
        x: jax.Array, y: jax.Array, g: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        def term(k: float, j: int, f: str) -> jax.Array:
            return focal_term(k, j, f)(x, y, g)

        minus_tanh = -_math.tanh_half(x)
        d_x, d_y, d_gamma = jnp.zeros_like(x), jnp.zeros_like(x), None
        if g is not None or k:
            exponent = k if g is None else k + g
            d_x += exponent * (1 - 2 * y) * term(k - 1, j + 1, f)
            d_y += exponent * multiply_saturated(minus_tanh, term(k - 1, j, f))
        if j:
            d_x += j * multiply_saturated(minus_tanh, term(k, j, f))
        if f in D_X:
            more, g_x = D_X[f]
            d_x += term(k, j + more, g_x)
        if f in MINUS_D_Y:
            d_y -= term(k, j, MINUS_D_Y[f])
        if g is not None:
            d_gamma = multiply_saturated(log_m(x, y), term(k, j, f))
        return d_x, d_y, d_gamma

    return _math.with_jvp(value, partials)


@functools.cache
def focal(static_gamma: float | None) -> _math.ScalarFn:
    """The loss of x, y, alpha and gamma, of which one known while tracing is `static_gamma`."""
    power = focal_term(static_gamma or 0, 0, "c")

    def loss(
        x: jax.Array, y: jax.Array, alpha: jax.Array | None = None, gamma: jax.Array | None = None
    ) -> jax.Array:
        if alpha is None:
            return power(x, y, gamma)
        return multiply_no_nan((1 - alpha) * (1 - y) + alpha * y, power(x, y, gamma))

    return _math.rematerialised(loss, _math.hidden_identity)


@functools.cache
def bound_of(gamma: float) -> _math.ScalarFn:
    """A `size_bound` with 4 (1 + gamma)² beside the arrays, for the factors of the derivatives.

    The largest factor is 4 gamma (gamma - 1). A gamma that is an array counts once, as every
    parameter, which is enough below 1e19.
    """

    def bound(x: jax.Array, y: jax.Array, *others: jax.Array) -> jax.Array:
        return undefined_outside(y, size_bound(x, y, *others, 4 * (1 + gamma) ** 2))

    return bound


def evaluate_focal(
    name: str, logits: Any, labels: Any, alpha: Any, gamma: Any, options: Options
) -> jax.Array:
    """A gamma known while tracing is a constant of the loss, and None among its parameters."""
    if alpha is not None and _checks.is_static(alpha):
        alpha = _checks.static_number(name, "alpha", alpha, "in [0, 1]", 0, 1)
    exponent = None
    if gamma is None or _checks.is_static(gamma):
        valid = "finite and at least 0"
        exponent, gamma = _checks.static_number(name, "gamma", gamma, valid, 0, math.inf), None
    loss, parameters = Loss(focal(exponent), ("alpha", "gamma")), {"alpha": alpha, "gamma": gamma}
    bound = bound_of(exponent or 0)
    return evaluate(name, loss, logits, labels, options, parameters, bound=bound)


def focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    alpha: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """Binary cross-entropy that gives less to what the model already gets right.

    Use it where easy negatives are so many that together they drown the rest, as in dense object
    detection. It trains scores that rank well; sigmoid(logits) is then no calibrated probability.

    Formula, with x a logit, y its label, w its weight and p = sigmoid(x):

      loss = w · αₜ (1 − pₜ)ᵞ [(1 − y) softplus(x) + y softplus(−x)]
      pₜ = y p + (1 − y) (1 − p),  αₜ = y α + (1 − y) (1 − α), or 1 without alpha

    Args:
      logits: float array of any shape.
      labels: float, integer or bool array of the same shape, in [0, 1]; soft ones mix in pₜ and αₜ.
      gamma: number ≥ 0, or real array that broadcasts to the shape of logits: how much less. A
        Python number is compiled in, once for each value, and is faster and, where it is whole,
        more accurate; 0 without alpha is then exactly `bce_with_logits`.
      alpha: number in [0, 1], or real array that broadcasts to the shape of logits: the share of
        the positive class; None weights neither.
      weight: real array that broadcasts to the shape of logits and multiplies the loss; None is 1.
        One value per row of a (batch, labels) array is `weight[:, None]`.
      label_smoothing: number a in [0, 1]; labels become y (1 − a) + a / 2.
      where: bool array that broadcasts to the shape of logits; False leaves an element out. None
        keeps everything.
      axis: int or tuple of ints, the axes that are reduced; None reduces all of them.
      reduction: "mean", "weighted_mean", "sum", "batchmean" or "none", as for `bce_with_logits`.
        The original divides the sum by the number of positives.

    Returns:
      The loss in float32 (float64 for float64 logits): a scalar, with `axis` an array of the axes
      that stay, for "none" one of the shape of logits.

    Raises:
      TypeError: logits are not floating-point, where is not bool, an argument is not an array.
      ValueError: labels have another shape than logits, gamma, alpha, weight or where does not
        broadcast to it, or gamma, alpha, label_smoothing, axis or reduction is not valid (of an
        array for gamma or alpha the values are not checked).

    Edge values: a coefficient of 0 gives 0, also times ∞. Without alpha, (+∞, 1) and (−∞, 0) give
    loss 0 and gradient 0; (+∞, 0) and (−∞, 1) give loss ∞ and gradients 1 and −1; NaN gives NaN.
    Where masked, or where weight is 0, anything gives 0. Nothing kept gives 0.

    Differentiable: with respect to logits, float labels (also hard ones), weight, and an array for
    gamma or alpha, each in its own dtype and shape, in reverse mode and forward over reverse
    (`jax.hessian`) to any order, through the focusing factor; finite wherever the true derivative
    is.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> logits, labels = jnp.array([2.0, -1.0, 0.5]), jnp.array([1, 0, 0])
      >>> print(round(float(jaxbce.focal_loss(logits, labels)), 4))
      0.134

    Source: Lin et al., "Focal Loss for Dense Object Detection" (2017).
    """
    options = Options(weight, label_smoothing, where, axis, reduction)
    return evaluate_focal("focal_loss", logits, labels, alpha, gamma, options)


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    """`focal_loss` unreduced, under the name that optax and torchvision give it.

    Use it in place of `optax.sigmoid_focal_loss`, with the same arguments. Labels are never
    broadcast, unlike optax's. All else is as in `focal_loss`.

    Returns:
      One loss per logit in float32 (float64 for float64 logits), 0 where masked.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> logits, labels = jnp.array([2.0, -1.0]), jnp.array([1, 0])
      >>> loss = jax.jit(lambda gamma: jaxbce.sigmoid_focal_loss(logits, labels, gamma=gamma))
      >>> print(loss(2.0).round(4))
      [0.0018 0.0227]

    Source: `optax.sigmoid_focal_loss` and `torchvision.ops.sigmoid_focal_loss`, whose alpha is 0.25
    unless it is given.
    """
    options = Options(weight, where=where)
    return evaluate_focal("sigmoid_focal_loss", logits, labels, alpha, gamma, options)
