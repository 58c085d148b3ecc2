"""Losses for imbalanced labels, focal and asymmetric: kernels and public functions."""

import decimal
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxbce import _checks, _kernels
from jaxbce._kernels import annihilate, annihilate_value
from jaxbce._losses import Elementwise, evaluate, extent_of_logits

# product(a, b) = a b, where an a of 0 annihilates an infinite b. So does its slope, which is taken
# to be 0 there: below, b is infinite at infinite logits only, and a then constant


def product_partials(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(jnp.isinf(b), 0, b), a


product = _kernels.with_jvp(annihilate_value, product_partials)


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

WHOLE = range(9)  # exponents that are multiplied out, to a few ULP
FACTORS: dict[str, _kernels.Kernel] = {
    "c": _kernels.bce_with_logits_value,
    "s": _kernels.sigmoid_minus_value,
    "x": lambda x, y: x,
    "1": lambda x, y: jnp.ones_like(x),
}
BY_X = {"c": (0, "s"), "s": (1, "1"), "x": (0, "1")}  # f: the power of p q and the f of ∂f/∂x
MINUS_BY_Y = {"c": "x", "s": "1"}


def m_value(x: jax.Array, y: jax.Array) -> jax.Array:
    return _kernels.sigmoid_mix_value(x, 1 - y, -y)


def log_m_in_exponent(x: jax.Array, y: jax.Array) -> jax.Array:
    """log m, of which an exponent needs no relative accuracy where it is near 0."""
    # For a hard label m is p or q, whose logarithm is right also where it underflows.
    hard, of_hard = (y == 0) | (y == 1), -_kernels.bce_with_logits_value(x, 1 - y)
    logarithm = jnp.where(hard, of_hard, _kernels.log(m_value(x, y)))
    return jnp.maximum(logarithm, -float(jnp.finfo(x.dtype).max))  # finite: a term of 0 is left 0


def log_m_value(x: jax.Array, y: jax.Array) -> jax.Array:
    p_t = _kernels.sigmoid_mix_value(x, y, y - 1)
    near_1 = (y > 0) & (y < 1) & (p_t < 0.5)
    return jnp.where(near_1, lax.log1p(-p_t, accuracy=_kernels.HIGHEST), log_m_in_exponent(x, y))


def log_m_partials(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    by_x = (1 - 2 * y) * focal_term(-1, 1, "1")(x, y, None)
    return by_x, -product(_kernels.sigmoid_excess(x), focal_term(-1, 0, "1")(x, y, None))


log_m = _kernels.with_jvp(log_m_value, log_m_partials)


@functools.cache
def focal_term(k: float, j: int, f: str) -> _kernels.Kernel:
    """m^(k + g) (p q)^j f of x, y and g; a g of None is 0."""

    def value(x: jax.Array, y: jax.Array, g: jax.Array | None) -> jax.Array:
        m, pq = m_value(x, y), _kernels.sigmoid_slope_value(x)
        factor = FACTORS[f](x, y)
        if g is None and k in WHOLE:
            return annihilate_value(lax.integer_pow(m, int(k)) * lax.integer_pow(pq, j), factor)
        # m^k (p q)^j = m^(k + j) (p q / m)^j with p q / m <= 1, so that no power that overflows
        # meets one that underflows; c and s are divided by an m too. Where m itself underflows the
        # label is hard and m the smaller of p and q; so are p q, c and |s|.
        info = jnp.finfo(x.dtype)
        vanished = m < info.tiny
        ratio = jnp.where(vanished, 1, _kernels.quotient(pq, m))
        exponent = k + j if g is None else k + j + g
        if f in ("c", "s"):
            exponent = exponent + 1
            limit = 1 if f == "c" else 1 - 2 * y
            factor = jnp.where(vanished, limit, _kernels.quotient(factor, m))
        # Finite, with room for coefficients: a tangent of 0 annihilates it, and opposites can meet.
        power = _kernels.exp(
            jnp.minimum(exponent * log_m_in_exponent(x, y), math.log(info.max) - 7)
        )
        return annihilate_value(power * lax.integer_pow(ratio, j), factor)

    def partials(
        x: jax.Array, y: jax.Array, g: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        def term(k: float, j: int, f: str) -> jax.Array:
            return focal_term(k, j, f)(x, y, g)

        minus_excess = -_kernels.sigmoid_excess(x)
        by_x, by_y, by_g = jnp.zeros_like(x), jnp.zeros_like(x), None
        if g is not None or k:
            exponent = k if g is None else k + g
            by_x += exponent * (1 - 2 * y) * term(k - 1, j + 1, f)
            by_y += exponent * product(minus_excess, term(k - 1, j, f))
        if j:
            by_x += j * product(minus_excess, term(k, j, f))
        if f in BY_X:
            more, g_x = BY_X[f]
            by_x += term(k, j + more, g_x)
        if f in MINUS_BY_Y:
            by_y -= term(k, j, MINUS_BY_Y[f])
        if g is not None:
            by_g = product(log_m(x, y), term(k, j, f))
        return by_x, by_y, by_g

    return _kernels.with_jvp(value, partials)


@functools.cache
def focal(gamma: float | None) -> _kernels.Kernel:
    """The loss of x, y, alpha and g; gamma is None where it is the array g."""
    power = focal_term(gamma or 0, 0, "c")

    def loss(x: jax.Array, y: jax.Array, alpha: jax.Array | None, g: jax.Array | None) -> jax.Array:
        if alpha is None:
            return power(x, y, g)
        return annihilate((1 - alpha) * (1 - y) + alpha * y, power(x, y, g))

    return _kernels.keep_inputs(loss, _kernels.unshared)


def extent_of_focal(x: jax.Array, y: jax.Array, *others: jax.Array | None) -> jax.Array:
    y = jnp.where((y >= 0) & (y <= 1), y, jnp.nan)  # of others, the power may be NaN
    return sum((other for other in others if other is not None), extent_of_logits(x, y))


def focal_of(name: str, alpha: Any, gamma: Any) -> tuple[Elementwise, tuple[Any, Any]]:
    """The loss, and the alpha and gamma that it takes: a known gamma is in its kernel."""
    if alpha is not None and _checks.known(alpha):
        alpha = _checks.static_number(name, "alpha", alpha, "in [0, 1]", 0, math.nextafter(1, 2))
    exponent = None
    if gamma is None or _checks.known(gamma):
        valid = "finite and at least 0"
        exponent, gamma = _checks.static_number(name, "gamma", gamma, valid, 0, math.inf), None
    return Elementwise(focal(exponent), extent_of_focal, ("alpha", "gamma")), (alpha, gamma)


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
    reduction: str = "mean",
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

    Edge values: a zero coefficient annihilates (0 · ∞ = 0). Without alpha, (+∞, 1) and (−∞, 0) give
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
    name = "focal_loss"
    loss, parameters = focal_of(name, alpha, gamma)
    return evaluate(
        name,
        loss,
        logits,
        labels,
        parameters=parameters,
        weight=weight,
        label_smoothing=label_smoothing,
        where=where,
        axis=axis,
        reduction=reduction,
    )


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

    Use it in place of `optax.sigmoid_focal_loss`, with the same arguments.

    Formula, with x a logit, y its label, w its weight and p = sigmoid(x):

      loss = w · αₜ (1 − pₜ)ᵞ [(1 − y) softplus(x) + y softplus(−x)]
      pₜ = y p + (1 − y) (1 − p),  αₜ = y α + (1 − y) (1 − α), or 1 without alpha

    Args:
      logits: float array of any shape.
      labels: float, integer or bool array of the same shape, in [0, 1]; soft ones mix in pₜ and αₜ.
      alpha: number in [0, 1], or real array that broadcasts to the shape of logits: the share of
        the positive class; None weights neither.
      gamma: number ≥ 0, or real array that broadcasts to the shape of logits. A Python number is
        compiled in, once for each value, and is faster.
      weight: real array that broadcasts to the shape of logits and multiplies the loss; None is 1.
        One value per row of a (batch, labels) array is `weight[:, None]`.
      where: bool array that broadcasts to the shape of logits; False gives a loss of 0. None keeps
        everything.

    Returns:
      One loss per logit in float32 (float64 for float64 logits), 0 where masked.

    Raises:
      TypeError, ValueError: as `focal_loss`. Labels are never broadcast, unlike optax's.

    Edge values: as `focal_loss`.

    Differentiable: as `focal_loss`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> logits, labels = jnp.array([2.0, -1.0]), jnp.array([1, 0])
      >>> loss = jax.jit(lambda gamma: jaxbce.sigmoid_focal_loss(logits, labels, gamma=gamma))
      >>> print(loss(2.0).round(4))
      [0.0018 0.0227]

    Source: `optax.sigmoid_focal_loss` and `torchvision.ops.sigmoid_focal_loss`, whose alpha is 0.25
    unless it is given.
    """
    name = "sigmoid_focal_loss"
    loss, parameters = focal_of(name, alpha, gamma)
    return evaluate(name, loss, logits, labels, parameters=parameters, weight=weight, where=where)


# Asymmetric loss with p and q as above, m = max(p - clip, 0) and n = -log(1 - m):
#
#   loss = y q^gamma_pos softplus(-x) + (1 - y) m^gamma_neg n
#
# p^k has the derivative k q p^k. Where m > 0, m^k has k p q m^(k - 1) and n has p q / (1 - m), with
# 1 - m = q + clip. At the kink m = 0 and below, m^k and its derivatives are 0, also for k = 0, and
# so is the loss of a negative. Without clip, m is p and n is softplus(x).


@functools.cache
def sigmoid_power(k: float) -> _kernels.Kernel:
    """p^k"""

    def value(x: jax.Array) -> jax.Array:
        if k in WHOLE:
            return lax.integer_pow(_kernels.sigmoid(x), int(k))
        return _kernels.exp(-k * _kernels.softplus(-x))

    def partials(x: jax.Array) -> tuple[jax.Array | None]:
        return (k * _kernels.sigmoid(-x) * sigmoid_power(k)(x) if k else None,)

    return _kernels.with_jvp(value, partials)


def kink(clip: float, dtype: Any) -> tuple[float, float]:
    """Where p = clip, x0 = log(clip / (1 - clip)): as a number of `dtype`, and what that lacks."""
    # A float64 lacks more than float64 arithmetic can tell.
    digits, p = decimal.Context(prec=50), decimal.Decimal(clip)
    x0 = digits.ln(digits.divide(p, digits.subtract(1, p)))
    rounded = float(np.asarray(float(x0), dtype))
    return rounded, float(digits.subtract(x0, decimal.Decimal(rounded)))


def clipped(x: jax.Array, clip: float) -> tuple[jax.Array, jax.Array]:
    """m and 1 - m; m to a few ULP also near the kink."""
    p, q = _kernels.sigmoid(x), _kernels.sigmoid(-x)
    x0, rest = kink(clip, x.dtype)
    # p - clip = clip q (exp(x - x0) - 1), where x - x0 is exact and the rest of x0 follows.
    beyond = x - x0
    n, d = _kernels.tanh_fraction(jnp.clip(beyond, -1, 1))
    growth = _kernels.quotient(2 * n, d - n)  # exp(beyond) - 1, also near 0
    growth = growth - rest * (1 + growth)
    far = p - clip if clip < 0.5 else (1 - clip) - q  # the smaller two, which cancel less
    return jnp.maximum(jnp.where(beyond < 0.6, clip * q * growth, far), 0), q + clip


@functools.cache
def clipped_power(k: float, clip: float) -> _kernels.Kernel:
    """m^k"""

    def value(x: jax.Array) -> jax.Array:
        m, _ = clipped(x, clip)
        base = jnp.where(m > 0, m, 1)
        power = (
            lax.integer_pow(base, int(k)) if k in WHOLE else _kernels.exp(k * _kernels.log(base))
        )
        return jnp.where(m > 0, power, 0)

    def partials(x: jax.Array) -> tuple[jax.Array | None]:
        return (k * _kernels.sigmoid_slope(x) * clipped_power(k - 1, clip)(x) if k else None,)

    return _kernels.with_jvp(value, partials)


@functools.cache
def inverse_of_rest(clip: float) -> _kernels.Kernel:
    """1 / (q + clip)"""

    def value(x: jax.Array) -> jax.Array:
        return _kernels.quotient(jnp.ones_like(x), _kernels.sigmoid(-x) + clip)

    def partials(x: jax.Array) -> tuple[jax.Array]:
        inverse = inverse_of_rest(clip)(x)
        return (_kernels.sigmoid_slope(x) * inverse * inverse,)

    return _kernels.with_jvp(value, partials)


@functools.cache
def clipped_softplus(clip: float) -> _kernels.Kernel:
    """n"""

    def value(x: jax.Array) -> jax.Array:
        m, rest = clipped(x, clip)
        # log(1 + m / (1 - m)) does not cancel where m is small.
        near = _kernels.log1p_unit(jnp.minimum(_kernels.quotient(m, rest), 1))
        return jnp.where(m < 0.5, near, -_kernels.log(rest))

    def partials(x: jax.Array) -> tuple[jax.Array]:
        return (_kernels.sigmoid_slope(x) * inverse_of_rest(clip)(x),)

    return _kernels.with_jvp(value, partials)


@functools.cache
def asymmetric(
    gamma_neg: float, gamma_pos: float, clip: float, stop_focus_gradient: bool
) -> _kernels.Kernel:
    def loss(x: jax.Array, y: jax.Array) -> jax.Array:
        focus, focus_neg = sigmoid_power(gamma_pos)(-x), sigmoid_power(gamma_neg)(x)
        cross_entropy_neg = _kernels.softplus(x)
        if clip:
            focus_neg = clipped_power(gamma_neg, clip)(x)
            cross_entropy_neg = clipped_softplus(clip)(x)
        if stop_focus_gradient:
            focus, focus_neg = lax.stop_gradient((focus, focus_neg))
        positive = product(focus, _kernels.softplus(-x))
        return annihilate(y, positive) + annihilate(1 - y, product(focus_neg, cross_entropy_neg))

    return _kernels.keep_inputs(loss, _kernels.unshared)


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
    reduction: str = "mean",
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

    Edge values: a zero coefficient annihilates (0 · ∞ = 0). (+∞, 1) and (−∞, 0) give loss 0 and
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
    clip = _checks.static_number(name, "clip", clip, "in [0, 1)", 0, 1)
    kernel = _kernels.bce_with_logits
    if clip or any(gammas):
        kernel = asymmetric(*gammas, clip, bool(stop_focus_gradient))
    loss = Elementwise(kernel, extent_of_logits)
    return evaluate(
        name,
        loss,
        logits,
        labels,
        weight=weight,
        label_smoothing=label_smoothing,
        where=where,
        axis=axis,
        reduction=reduction,
    )
