"""Binary cross-entropy with logits: formula, derivatives, value, and its public functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbce import _math
from jaxbce._loss import Loss, Options, evaluate
from jaxbce._reduce import Reduction

# loss(x, y, q) = (1 - y) softplus(x) + q y softplus(-x), with q = 1 for None
#
# ∂/∂x = (1 - y) sigmoid(x) - q y sigmoid(-x)
# ∂/∂y = -softplus(x) + q softplus(-x)        (one log1p, times q - 1: exact near x = 0)
# ∂/∂q = y softplus(-x)


def value(x: jax.Array, y: jax.Array, pos_weight: jax.Array | None = None) -> jax.Array:
    if pos_weight is None:
        return _math.linear_and_curved(x, jnp.where(x > 0, 1 - y, y), 1)
    return _math.softplus_mix_value(x, 1 - y, _math.multiply_no_nan(y, pos_weight))


def partials(
    x: jax.Array, y: jax.Array, pos_weight: jax.Array | None = None
) -> tuple[jax.Array | None, ...]:
    if pos_weight is None:
        return _math.sigmoid_minus(x, y), -x, None
    d_labels = _math.softplus_mix(x, -jnp.ones_like(x), pos_weight)
    d_pos_weight = _math.softplus_mix(x, jnp.zeros_like(x), y)
    return _math.sigmoid_mix(x, 1 - y, _math.multiply_no_nan(y, pos_weight)), d_labels, d_pos_weight


value_forward = _math.with_jvp(value, partials)
BCE = Loss(_math.rematerialised(value_forward), ("pos_weight",))
BCE_FORWARD = Loss(value_forward, ("pos_weight",))


def bce_with_logits(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    reduction: Reduction = "mean",
    forward_mode: bool = False,
) -> jax.Array:
    """Binary cross-entropy of sigmoid(logits) against labels, in one stable step.

    Use it to train any binary or multi-label classifier that outputs logits. To predict, apply
    `jax.nn.sigmoid` to the logits.

    Formula, with x a logit, y its label, q its pos_weight and w its weight:

      loss = w · [(1 − y) softplus(x) + q y softplus(−x)],  softplus(x) = log(1 + eˣ)

    Args:
      logits: float array of any shape.
      labels: float, integer or bool array of the same shape, in [0, 1]; soft labels are welcome.
      weight: real array that broadcasts to the shape of logits and multiplies the loss; None is 1.
        One value per row of a (batch, labels) array is `weight[:, None]`.
      pos_weight: real array that broadcasts to the shape of logits, usually (labels,), and
        multiplies the positive term only, at least 0; None is 1.
      label_smoothing: number a in [0, 1]; labels become y (1 − a) + a / 2.
      where: bool array that broadcasts to the shape of logits; False leaves an element out. None
        keeps everything.
      axis: int or tuple of ints, the axes that are reduced; None reduces all of them.
      reduction: "mean" is Σ loss / number of kept elements, in which `weight` does not count;
        "weighted_mean" Σ loss / Σ w over kept elements; "sum" Σ loss; "batchmean" Σ loss / number
        of entries of the first axis that keep an element; "none" the unreduced loss, 0 where
        masked. With "batchmean" and "none" `axis` must be None.
      forward_mode: True selects a rule that also supports `jax.jvp`, `jax.jacfwd` and
        `jax.linearize`; it may keep intermediate values for the backward pass.

    Returns:
      The loss in float32 (float64 for float64 logits): a scalar, with `axis` an array of the axes
      that stay, for "none" one of the shape of logits.

    Raises:
      TypeError: logits are not floating-point, where is not bool, an argument is not an array.
      ValueError: labels have another shape than logits, weight, pos_weight or where does not
        broadcast to it, or label_smoothing, axis or reduction is not valid.

    Edge values: a factor of 0 gives 0, even times infinity. (+∞, 1) and (−∞, 0) give loss 0 and
    gradient 0; (+∞, 0) gives loss ∞ and gradient 1; (−∞, 1) gives loss ∞ and gradient −q; NaN
    gives NaN. Where masked, or where weight is 0, anything gives 0. Nothing kept gives 0, and so
    does "weighted_mean" where Σ w is 0.

    Differentiable: with respect to logits, float labels, weight and pos_weight, each in its own
    dtype and shape, in reverse mode and forward over reverse (`jax.hessian`) to any order;
    ∂loss/∂x = w · [(1 − y) sigmoid(x) − q y sigmoid(−x)].

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> logits = jnp.array([[2.0, -1.0], [0.5, 3.0]])
      >>> labels = jnp.array([[1, 0], [0, 1]])
      >>> print(round(float(jaxbce.bce_with_logits(logits, labels)), 4))
      0.3657
      >>> known = jnp.array([[True, True], [False, True]])
      >>> print(round(float(jaxbce.bce_with_logits(logits, labels, where=known)), 4))
      0.1629

    Source: PyTorch's `BCEWithLogitsLoss`, whose arguments and divisor it shares.
    """
    loss = BCE_FORWARD if forward_mode else BCE
    options = Options(weight, label_smoothing, where, axis, reduction)
    parameters = {"pos_weight": pos_weight}
    return evaluate("bce_with_logits", loss, logits, labels, options, parameters)


def sigmoid_binary_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    forward_mode: bool = False,
) -> jax.Array:
    """`bce_with_logits` unreduced, under the name optax gives it.

    Use it in place of `optax.sigmoid_binary_cross_entropy`, with the same two arguments. Labels are
    never broadcast, unlike optax's. All else is as in `bce_with_logits`.

    Returns:
      One loss per logit in float32 (float64 for float64 logits), 0 where masked.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> logits, labels = jnp.array([0.0, jnp.inf]), jnp.array([1, 1])
      >>> print(jaxbce.sigmoid_binary_cross_entropy(logits, labels))
      [0.6931472 0.       ]

    Source: `optax.sigmoid_binary_cross_entropy`.
    """
    name, loss = "sigmoid_binary_cross_entropy", BCE_FORWARD if forward_mode else BCE
    options, parameters = Options(weight, label_smoothing, where), {"pos_weight": pos_weight}
    return evaluate(name, loss, logits, labels, options, parameters)


def sparse_bce_with_logits(
    logits: ArrayLike,
    positives: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """`bce_with_logits` with the labels given as the ids of the positives.

    Use it when each row has few positives among many labels and the logits are there anyway: a row
    of labels costs P ids instead of L numbers to store, to load and to move to the device. Where
    the logits themselves are too large, use `linear_bce_with_logits`.

    Formula: bce_with_logits(logits, multi_hot(positives, L)), exactly.

    Args:
      logits: float array [..., L].
      positives: integer array [..., P] of label ids, padded with -1, with the leading axes of
        logits; P may be 0.
      weight: real array that broadcasts to the shape of logits and multiplies the loss; None is 1.
        One value per row of a (batch, labels) array is `weight[:, None]`.
      pos_weight: real array that broadcasts to the shape of logits, usually (labels,), and
        multiplies the positive term only, at least 0; None is 1.
      label_smoothing: number a in [0, 1]; labels become y (1 − a) + a / 2.
      where: bool array that broadcasts to the shape of logits; False leaves an element out. None
        keeps everything.
      axis: int or tuple of ints, the axes that are reduced; None reduces all of them.
      reduction: "mean", "weighted_mean", "sum", "batchmean" or "none", as for `bce_with_logits`.

    Returns:
      The loss in float32 (float64 for float64 logits): a scalar, with `axis` an array of the axes
      that stay, for "none" one of the shape of logits. It makes the multi-hot labels in uint8: L
      bytes per row.

    Raises:
      TypeError: logits are not floating-point, positives not integer, where not bool.
      ValueError: positives have other leading axes than logits; otherwise as `bce_with_logits`.

    Edge values: any id outside [0, L) is padding, duplicates count once. Under `checked` an id
    outside [0, L) other than -1 is an error. Otherwise as `bce_with_logits`.

    Differentiable: with respect to logits, weight and pos_weight, as `bce_with_logits`.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> logits, positives = jnp.array([[2.0, -1.0, 0.5]]), jnp.array([[0, 2, -1]])
      >>> print(round(float(jaxbce.sparse_bce_with_logits(logits, positives)), 4))
      0.3048

    Source: PyTorch's `MultiLabelSoftMarginLoss` with the labels of its `MultiLabelMarginLoss`.
    """
    name, parameters = "sparse_bce_with_logits", {"pos_weight": pos_weight}
    options = Options(weight, label_smoothing, where, axis, reduction)
    return evaluate(name, BCE, logits, positives, options, parameters, sparse=True)
