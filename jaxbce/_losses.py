"""Public elementwise losses: check, prepare the labels, apply the kernel, reduce."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxbce import _checks, _kernels, _labels, _placement, _reduce


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """A loss of one score and one label, as everything else takes it."""

    kernel: _kernels.Kernel  # of the score, the label and the parameters
    extent: Callable[..., jax.Array]  # of the same; not finite where the loss or a slope is not
    parameters: tuple[str, ...] = ()  # the names of the arguments that may differ by label
    scores: str = "logits"  # the name of the scores


def extent_of_logits(x: jax.Array, y: jax.Array, q: jax.Array | None = None) -> jax.Array:
    extent = jnp.maximum(jnp.abs(x), 1) * jnp.maximum(jnp.abs(y), 1)
    return extent if q is None else extent * jnp.maximum(jnp.abs(q), 1)


def extent_of_probs(p: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where((p >= 0) & (p <= 1), 100 * y, jnp.nan)  # a logarithm is at least -100


BCE = Elementwise(_kernels.bce_with_logits, extent_of_logits, ("pos_weight",))
BCE_FORWARD = Elementwise(_kernels.bce_with_logits_forward, extent_of_logits, ("pos_weight",))
BCE_OF_PROBS = Elementwise(_kernels.bce, extent_of_probs, scores="probs")


def bce_with_logits(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
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
      axis: int or tuple of ints, the axes that are reduced; None reduces all of them.
      reduction: "mean" is Σ loss / number of kept elements, in which `weight` does not count;
        "weighted_mean" Σ loss / Σ w over kept elements; "sum" Σ loss; "batchmean" Σ loss / number
        of entries of the first axis that keep an element; "none" the unreduced loss, 0 where
        masked. With "batchmean" and "none" axis is None.
      forward_mode: True selects a rule that also supports `jax.jvp`, `jax.jacfwd` and
        `jax.linearize`; it may keep intermediate values for the backward pass.

    Returns:
      The loss in float32 (float64 for float64 logits): a scalar, with `axis` an array of the axes
      that stay, for "none" one of the shape of logits.

    Raises:
      TypeError: logits are not floating-point, where is not bool, an argument is not an array.
      ValueError: labels have another shape than logits, weight, pos_weight or where does not
        broadcast to it, or label_smoothing, axis or reduction is not valid.

    Edge values: a zero coefficient annihilates (0 · ∞ = 0). (+∞, 1) and (−∞, 0) give loss 0 and
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
    return evaluate(
        "bce_with_logits",
        BCE_FORWARD if forward_mode else BCE,
        logits,
        labels,
        parameters=(pos_weight,),
        weight=weight,
        label_smoothing=label_smoothing,
        where=where,
        axis=axis,
        reduction=reduction,
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
        BCE_FORWARD if forward_mode else BCE,
        logits,
        labels,
        parameters=(pos_weight,),
        weight=weight,
        label_smoothing=label_smoothing,
        where=where,
    )


def sparse_bce_with_logits(
    logits: ArrayLike,
    positives: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
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
    return evaluate(
        "sparse_bce_with_logits",
        BCE,
        logits,
        positives,
        parameters=(pos_weight,),
        weight=weight,
        label_smoothing=label_smoothing,
        where=where,
        axis=axis,
        reduction=reduction,
        sparse=True,
    )


def bce(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
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
    return evaluate(
        "bce",
        BCE_OF_PROBS,
        probs,
        labels,
        weight=weight,
        label_smoothing=label_smoothing,
        where=where,
        axis=axis,
        reduction=reduction,
    )


def evaluate(
    name: str,
    loss: Elementwise,
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    parameters: tuple[ArrayLike | None, ...] = (),
    weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    reduction: str = "none",
    sparse: bool = False,
) -> jax.Array:
    """Checks what does not need an array, then makes one cached, compiled call."""
    _checks.check_choice(name, "reduction", reduction, _reduce.REDUCTIONS)
    axes = _checks.axes_or_none(name, axis, reduction)
    arrays = _checks.admit(
        name,
        **{loss.scores: scores, "positives" if sparse else "labels": labels},
        **dict(zip(loss.parameters, parameters, strict=True)),
        weight=weight,
        label_smoothing=_checks.fraction_or_none(name, "label_smoothing", label_smoothing),
        where=where,
    )
    result: jax.Array = evaluate_arrays(
        *arrays, name=name, loss=loss, reduction=reduction, axes=axes, sparse=sparse
    )
    return result


def result_spec(
    scores: Any, *others: Any, name: str, loss: Elementwise, reduction: str, axes: Any, **_: Any
) -> PartitionSpec:
    spec = _placement.common_spec(scores, *others)
    if reduction == "none":
        return spec
    reduced = _checks.axes_of(name, axes, loss.scores, len(spec))
    return PartitionSpec(*(names for axis, names in enumerate(spec) if axis not in reduced))


@_placement.compiled("name", "loss", "reduction", "axes", "sparse", result=result_spec)
def evaluate_arrays(
    scores: Any,
    labels: Any,
    *options: Any,
    name: str,
    loss: Elementwise,
    reduction: str,
    axes: tuple[int, ...] | None,
    sparse: bool,
) -> jax.Array:
    *parameters, weight, label_smoothing, where = options
    x = _checks.floating(name, loss.scores, scores, None if sparse else labels)
    dtype, shape = _kernels.accumulator(x), x.shape
    x = x.astype(dtype)
    axes = _checks.axes_of(name, axes, loss.scores, x.ndim)
    where = _checks.mask(name, where, loss.scores, shape)

    def broadcast(argument: str, values: Any) -> jax.Array | None:
        if values is None:
            return None
        return _checks.broadcast(name, argument, values, loss.scores, shape).astype(dtype)

    own_weight = None
    if weight is not None:
        own_weight = _checks.real(name, "weight", weight).astype(dtype)
        weight = broadcast("weight", own_weight)
        own_weight = jnp.expand_dims(own_weight, range(x.ndim - own_weight.ndim))
    extras = [broadcast(*pair) for pair in zip(loss.parameters, parameters, strict=True)]
    counted = _reduce.counted(weight, where)
    if sparse:
        y = _labels.labels_of(name, labels, shape, counted)
    else:
        y = _checks.real(name, "labels", labels)
        if y.shape != shape:
            remedy = (
                "nothing is broadcast, so reshape one of them, for example with labels[:, None]"
            )
            if _checks.are_class_ids(y, shape):
                remedy = (
                    f"class ids become labels by jaxbce.multi_hot(labels[..., None], {shape[-1]}), "
                    "and jaxbce.sparse_bce_with_logits takes them as positives"
                )
            raise ValueError(
                f"{name}: labels must have the shape of {loss.scores}, got labels {y.shape} and "
                f"{loss.scores} {shape}; {remedy}"
            )
    y = y.astype(dtype)
    if loss.scores == "probs":
        _checks.check_unit_interval(name, "probs", x, counted)
    _checks.check_unit_interval(name, "labels", y, counted)
    for argument, extra in zip(loss.parameters, extras, strict=True):
        if argument == "pos_weight" and extra is not None:
            _checks.check_not_negative(name, argument, extra, counted)

    keep = _reduce.kept(loss.extent(x, y, *extras), weight, where)
    if keep is not None:
        # Before anything is computed of them, so that no NaN reaches a gradient.
        x, y = jnp.where(keep, x, 0), jnp.where(keep, y, 0)
        extras = [None if extra is None else jnp.where(keep, extra, 1) for extra in extras]
        weight = None if weight is None else jnp.where(keep, weight, 0)
    if label_smoothing is not None:
        a = _checks.number(name, "label_smoothing", label_smoothing).astype(dtype)
        _checks.check_unit_interval(name, "label_smoothing", a)
        y = y * (1 - a) + a * 0.5
    values = _kernels.over(loss.kernel, x.ndim)(x, y, *extras)
    if weight is not None:
        values = values * weight
    return _reduce.reduce_loss(values, own_weight, keep, where, reduction, axes)
