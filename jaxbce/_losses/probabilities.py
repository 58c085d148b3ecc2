"""Binary cross-entropy of probabilities: formula, derivatives, value, and its public function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbce import _math
from jaxbce._loss import Loss, Options, evaluate, undefined_outside
from jaxbce._reduce import Reduction

# loss(p, y) = -y max(log p, -100) - (1 - y) max(log(1 - p), -100)
#
# ∂/∂p = bce_slope(p, y) = (p - y) / max(p (1 - p), 1e-12)   (PyTorch: finite at 0 and 1)
# ∂/∂y = -log_odds(p), the difference of the two clamped logarithms


def clamped_log(p: jax.Array) -> jax.Array:
    return jnp.maximum(_math.log(p), -100)


def clamped_log1m(p: jax.Array) -> jax.Array:
    return jnp.maximum(lax.log1p(-p, accuracy=_math.HIGHEST), -100)


# inverse_spread(p) = 1 / max(p (1 - p), 1e-12)


def inverse_spread_value(p: jax.Array) -> jax.Array:
    return _math.reciprocal_value(jnp.maximum(p * (1 - p), 1e-12))


def inverse_spread_partials(p: jax.Array) -> tuple[jax.Array]:
    inverse = inverse_spread(p)
    return (jnp.where(p * (1 - p) > 1e-12, (2 * p - 1) * inverse * inverse, 0),)


inverse_spread = _math.with_jvp(inverse_spread_value, inverse_spread_partials)


def bce_slope_partials(p: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The product rule would subtract two large numbers where p is near a hard label.
    inside = p * (1 - p) > 1e-12
    of_zero, of_one = (_math.reciprocal(jnp.where(inside, each, 1)) for each in (1 - p, p))
    curvature = (1 - y) * of_zero * of_zero + y * of_one * of_one
    return jnp.where(inside, curvature, 1e12), -inverse_spread(p)


bce_slope = _math.with_jvp(lambda p, y: (p - y) * inverse_spread(p), bce_slope_partials)


log_odds = _math.with_jvp(
    lambda p: clamped_log(p) - clamped_log1m(p), lambda p: (inverse_spread(p),)
)


def value(p: jax.Array, y: jax.Array) -> jax.Array:
    return -(y * clamped_log(p) + (1 - y) * clamped_log1m(p))


differentiable = _math.with_jvp(value, lambda p, y: (bce_slope(p, y), -log_odds(p)))
OF_PROBABILITIES = Loss(_math.rematerialised(differentiable))


def bound(p: jax.Array, y: jax.Array) -> jax.Array:
    return undefined_outside(p, undefined_outside(y, p))


def bce(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """Binary cross-entropy of probabilities against labels.

    Use it only for a model that outputs probabilities and cannot output logits. Logits are better:
    in float32 sigmoid(20) rounds to exactly 1, so for a label of 0 the probability gives the loss
    100 (the clamp) where the logit gives the right 20.000000002, and for a label of 1 it gives 0
    where the logit gives 2.06e-9. The gradient through that sigmoid is exactly 0 for both labels
    where the logit gives 1 and −2.06e-9: such an example is never learnt.

    Formula, with p a probability, y its label and w its weight:

      loss = −w · [y max(log p, −100) + (1 − y) max(log(1 − p), −100)]

    Args:
      probs: float array of any shape, in [0, 1].
      labels: float, integer or bool array of the same shape, in [0, 1].
      weight: real array that broadcasts to the shape of probs and multiplies the loss; None is 1.
        One value per row of a (batch, labels) array is `weight[:, None]`.
      label_smoothing: number a in [0, 1]; labels become y (1 − a) + a / 2.
      where: bool array that broadcasts to the shape of probs; False leaves an element out. None
        keeps everything.
      axis: int or tuple of ints, the axes that are reduced; None reduces all of them.
      reduction: "mean", "weighted_mean", "sum", "batchmean" or "none", as for `bce_with_logits`.

    Returns:
      The loss in float32 (float64 for float64 probs): a scalar, with `axis` an array of the axes
      that stay, for "none" one of the shape of probs.

    Raises:
      TypeError: probs are not floating-point, where is not bool, an argument is not an array.
      ValueError: labels have another shape than probs, weight or where does not broadcast to it,
        or label_smoothing, axis or reduction is not valid.

    Edge values: (0, 0) and (1, 1) give loss 0 and gradient 0; (0, 1) and (1, 0) give loss 100 and
    gradients −1e12 and 1e12. Where masked, or where weight is 0, anything gives 0.

    Differentiable: with respect to probs, float labels and weight, in reverse mode and forward over
    reverse to any order; ∂loss/∂p = w · (p − y) / max(p (1 − p), 1e-12).

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> print(round(float(jaxbce.bce(jnp.array([0.9, 0.2]), jnp.array([1, 0]))), 4))
      0.1643

    Source: PyTorch's `BCELoss`, whose clamps it shares.
    """
    options = Options(weight, label_smoothing, where, axis, reduction)
    return evaluate(
        "bce", OF_PROBABILITIES, probs, labels, options, score_name="probs", bound=bound
    )
