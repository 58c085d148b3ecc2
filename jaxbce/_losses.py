"""Public elementwise losses: check, prepare the labels, apply the kernel, reduce."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbce import _checks, _kernels, _labels, _reduce


def bce_with_logits(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    reduction: str = "mean",
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
        multiplies the positive term only; None is 1.
      label_smoothing: number a in [0, 1]; labels become y (1 − a) + a / 2.
      where: bool array that broadcasts to the shape of logits; False leaves an element out. None
        keeps everything.
      reduction: "mean" is Σ loss / number of kept elements, "sum" Σ loss, "batchmean" Σ loss /
        number of rows (all axes but the last) that keep an element, "none" the unreduced loss, 0
        where masked. `weight` is in no divisor.
      forward_mode: True selects a rule that also supports `jax.jvp`, `jax.jacfwd` and
        `jax.linearize`; it may keep intermediate values for the backward pass.

    Returns:
      The loss in float32 (float64 for float64 logits): a scalar, or for "none" an array of the
      shape of logits.

    Raises:
      TypeError: logits are not floating-point, where is not bool, an argument is not an array.
      ValueError: labels have another shape than logits, weight, pos_weight or where does not
        broadcast to it, or reduction or label_smoothing is not valid.

    Edge values: a zero coefficient annihilates (0 · ∞ = 0). (+∞, 1) and (−∞, 0) give loss 0 and
    gradient 0; (+∞, 0) gives loss ∞ and gradient 1; (−∞, 1) gives loss ∞ and gradient −q; NaN
    gives NaN. Where masked, or where weight is 0, anything gives 0. Nothing kept gives 0.

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
    return evaluate(
        "bce_with_logits",
        _kernels.bce_with_logits_forward if forward_mode else _kernels.bce_with_logits,
        (logits, labels),
        {"pos_weight": pos_weight},
        weight,
        label_smoothing,
        where,
        reduction,
    )


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

    Use it in place of `optax.sigmoid_binary_cross_entropy`, with the same two arguments.

    Formula, with x a logit, y its label, q its pos_weight and w its weight:

      loss = w · [(1 − y) softplus(x) + q y softplus(−x)],  softplus(x) = log(1 + eˣ)

    Args:
      logits: float array of any shape.
      labels: float, integer or bool array of the same shape, in [0, 1].
      weight: real array that broadcasts to the shape of logits and multiplies the loss; None is 1.
        One value per row of a (batch, labels) array is `weight[:, None]`.
      pos_weight: real array that broadcasts to the shape of logits, usually (labels,), and
        multiplies the positive term only; None is 1.
      label_smoothing: number a in [0, 1]; labels become y (1 − a) + a / 2.
      where: bool array that broadcasts to the shape of logits; False gives a loss of 0. None keeps
        everything.
      forward_mode: True selects a rule that also supports `jax.jvp`, `jax.jacfwd` and
        `jax.linearize`; it may keep intermediate values for the backward pass.

    Returns:
      One loss per logit in float32 (float64 for float64 logits), 0 where masked.

    Raises:
      TypeError, ValueError: as `bce_with_logits`. Labels are never broadcast, unlike optax's.

    Edge values: as `bce_with_logits`.

    Differentiable: as `bce_with_logits`.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> logits, labels = jnp.array([0.0, jnp.inf]), jnp.array([1, 1])
      >>> print(jaxbce.sigmoid_binary_cross_entropy(logits, labels))
      [0.6931472 0.       ]

    Source: `optax.sigmoid_binary_cross_entropy`.
    """
    return evaluate(
        "sigmoid_binary_cross_entropy",
        _kernels.bce_with_logits_forward if forward_mode else _kernels.bce_with_logits,
        (logits, labels),
        {"pos_weight": pos_weight},
        weight,
        label_smoothing,
        where,
        "none",
    )


def sparse_bce_with_logits(
    logits: ArrayLike,
    positives: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    reduction: str = "mean",
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
        multiplies the positive term only; None is 1.
      label_smoothing: number a in [0, 1]; labels become y (1 − a) + a / 2.
      where: bool array that broadcasts to the shape of logits; False leaves an element out. None
        keeps everything.
      reduction: "mean", "sum", "batchmean" or "none", as for `bce_with_logits`.

    Returns:
      The loss in float32 (float64 for float64 logits): a scalar, or for "none" an array of the
      shape of logits. It makes the multi-hot labels in bfloat16: 2 L bytes per row.

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
    return evaluate(
        "sparse_bce_with_logits",
        _kernels.bce_with_logits,
        (logits, positives),
        {"pos_weight": pos_weight},
        weight,
        label_smoothing,
        where,
        reduction,
        sparse=True,
    )


def bce(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: str = "mean",
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
      where: bool array that broadcasts to the shape of probs; False leaves an element out. None
        keeps everything.
      reduction: "mean", "sum", "batchmean" or "none", as for `bce_with_logits`.

    Returns:
      The loss in float32 (float64 for float64 probs): a scalar, or for "none" an array of the shape
      of probs.

    Raises:
      TypeError: probs are not floating-point, where is not bool, an argument is not an array.
      ValueError: labels have another shape than probs, weight or where does not broadcast to it,
        or reduction is not valid.

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
    return evaluate("bce", _kernels.bce, (probs, labels), {}, weight, 0.0, where, reduction)


def evaluate(
    name: str,
    kernel: _kernels.Kernel,
    inputs: tuple[ArrayLike, ArrayLike],
    parameters: dict[str, ArrayLike | None],
    weight: ArrayLike | None,
    label_smoothing: ArrayLike,
    where: ArrayLike | None,
    reduction: str,
    sparse: bool = False,
) -> jax.Array:
    """Checks what does not need an array, then makes one cached, compiled call."""
    _checks.check_choice(name, "reduction", reduction, _reduce.REDUCTIONS)
    smoothing = _checks.fraction_or_none(name, "label_smoothing", label_smoothing)
    loss: jax.Array = evaluate_arrays(
        *inputs,
        parameters,
        weight,
        smoothing,
        where,
        name=name,
        kernel=kernel,
        reduction=reduction,
        sparse=sparse,
    )
    return loss


@functools.partial(jax.jit, static_argnames=("name", "kernel", "reduction", "sparse"))
def evaluate_arrays(
    scores: Any,
    labels: Any,
    parameters: dict[str, Any],
    weight: Any,
    label_smoothing: Any,
    where: Any,
    *,
    name: str,
    kernel: _kernels.Kernel,
    reduction: str,
    sparse: bool,
) -> jax.Array:
    check = _checks.Arguments(name, "probs" if kernel is _kernels.bce else "logits", scores)
    x = check.scores
    if sparse:
        ids = check.positives(labels)
        # XLA on a CPU fuses the conversion of bfloat16 into the loss, not that of bool or uint8.
        labels = _labels.scatter_ones(ids, check.shape[-1], jnp.bfloat16)
    y = check.labels(labels)
    extras = [check.broadcast(argument, values) for argument, values in parameters.items()]
    weight = check.broadcast("weight", weight)
    where = check.mask(where)

    # Not finite where the loss is not: a probability outside [0, 1] gives NaN, a large logit times
    # pos_weight may overflow.
    bound = y + (jnp.sqrt(x * (1 - x)) if kernel is _kernels.bce else x)
    for extra in extras:
        bound = bound if extra is None else bound * jnp.maximum(extra, 1)
    keep = _reduce.kept(bound, weight, where)
    if check.scores_name == "probs":
        check.unit_interval("probs", x, keep)
    check.unit_interval("labels", y, keep)
    if label_smoothing is not None:
        a = check.number("label_smoothing", label_smoothing)
        check.unit_interval("label_smoothing", a)
        y = y * (1 - a) + a / 2
    if keep is not None:
        # Before the kernel, so that no NaN reaches a gradient.
        x = jnp.where(keep, x, 0)
        y = jnp.where(keep, y, 0)
    loss = _kernels.over(kernel, x.ndim)(x, y, *extras)
    return _reduce.reduce_loss(loss, weight, keep, where, reduction)
