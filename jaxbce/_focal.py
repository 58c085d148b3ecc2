"""Public losses for imbalanced labels: focal and asymmetric."""

import math

import jax
from jax.typing import ArrayLike

from jaxbce import _checks, _focal_kernels
from jaxbce._losses import Elementwise, evaluate, extent_of_logits


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
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
      gamma: Python number ≥ 0, how much less; 0 without alpha is exactly `bce_with_logits`. Each
        value compiles once.
      alpha: Python number in [0, 1], the share of the positive class; None weights neither.
      weight: real array that broadcasts to the shape of logits and multiplies the loss; None is 1.
        One value per row of a (batch, labels) array is `weight[:, None]`.
      where: bool array that broadcasts to the shape of logits; False leaves an element out. None
        keeps everything.
      reduction: "mean", "sum", "batchmean" or "none", as for `bce_with_logits`. The original
        divides the sum by the number of positives.

    Returns:
      The loss in float32 (float64 for float64 logits): a scalar, or for "none" an array of the
      shape of logits.

    Raises:
      TypeError: logits are not floating-point, where is not bool, an argument is not an array,
        gamma or alpha is traced or an array.
      ValueError: labels have another shape than logits, weight or where does not broadcast to it,
        or gamma, alpha or reduction is not valid.

    Edge values: a zero coefficient annihilates (0 · ∞ = 0). Without alpha, (+∞, 1) and (−∞, 0) give
    loss 0 and gradient 0; (+∞, 0) and (−∞, 1) give loss ∞ and gradients 1 and −1; NaN gives NaN.
    Where masked, or where weight is 0, anything gives 0. Nothing kept gives 0.

    Differentiable: with respect to logits, float labels (also hard ones) and weight, each in its
    own dtype and shape, in reverse mode and forward over reverse (`jax.hessian`) to any order,
    through the focusing factor; finite wherever the true derivative is.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> logits, labels = jnp.array([2.0, -1.0, 0.5]), jnp.array([1, 0, 0])
      >>> print(round(float(jaxbce.sigmoid_focal_loss(logits, labels)), 4))
      0.134

    Source: Lin et al., "Focal Loss for Dense Object Detection" (2017); the same values as optax's
    and torchvision's functions.
    """
    name = "sigmoid_focal_loss"
    gamma = _checks.static_number(name, "gamma", gamma, "finite and at least 0", 0, math.inf)
    if alpha is not None:
        alpha = _checks.static_number(name, "alpha", alpha, "in [0, 1]", 0, math.nextafter(1, 2))
    kernel = _focal_kernels.sigmoid_focal(gamma, alpha)
    loss = Elementwise(kernel, extent_of_logits)
    return evaluate(name, loss, logits, labels, weight=weight, where=where, reduction=reduction)


def asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    stop_focus_gradient: bool = False,
    weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
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
      where: bool array that broadcasts to the shape of logits; False leaves an element out. None
        keeps everything.
      reduction: "mean", "sum", "batchmean" or "none", as for `bce_with_logits`. The original is
        "sum".

    Returns:
      The loss in float32 (float64 for float64 logits): a scalar, or for "none" an array of the
      shape of logits.

    Raises:
      TypeError: logits are not floating-point, where is not bool, an argument is not an array,
        gamma_neg, gamma_pos or clip is traced or an array.
      ValueError: labels have another shape than logits, weight or where does not broadcast to it,
        or gamma_neg, gamma_pos, clip or reduction is not valid.

    Edge values: a zero coefficient annihilates (0 · ∞ = 0). (+∞, 1) and (−∞, 0) give loss 0 and
    gradient 0; (−∞, 1) gives loss ∞ and gradient −1; (+∞, 0) gives loss ∞ and gradient 1 with clip
    0, else loss −(1 − clip)^gamma_neg log(clip) and gradient 0. At p = clip every derivative is 0,
    as below. NaN gives NaN. Where masked, or where weight is 0, anything gives 0.

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
    kernel = _focal_kernels.asymmetric(*gammas, clip, bool(stop_focus_gradient))
    loss = Elementwise(kernel, extent_of_logits)
    return evaluate(name, loss, logits, labels, weight=weight, where=where, reduction=reduction)
