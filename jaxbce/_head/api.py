"""Public functions of the chunked head: check, choose the chunk and the devices, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxbce import _checks, _placement
from jaxbce._head import arguments, chunks
from jaxbce._head.arguments import Given
from jaxbce._head.loss import ChunkLoss, built_in_loss, own_loss
from jaxbce._head.mesh import PlanOptions
from jaxbce._loss import Loss
from jaxbce._reduce import Reduction


def linear_bce_with_logits(
    features: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    positives: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    ignored: ArrayLike | None = None,
    reduction: Reduction = "mean",
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    batch_axis: str | tuple[str, ...] | None = None,
    label_axis: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Binary cross-entropy of the logits features @ kernel + bias, which are never held.

    Use it as the last layer and the loss of a classifier with thousands to millions of labels: the
    memory beyond the inputs and their gradients is a small multiple of batch · chunk_size, and the
    loss with all gradients takes one pass over the kernel.

    Formula, with x = features · kernel[:, l] + bias[l] the logit of label l, y its label, which is
    1 for positives, and q its pos_weight:

      loss of a row = weight · Σₗ [(1 − y) softplus(x) + q y softplus(−x)]

    Args:
      features: float array [..., D].
      kernel: float array [D, L], or [L, D] with transpose_kernel.
      bias: float array [L]; None is 0.
      positives: integer array [..., P] of label ids, padded with -1. Exactly one of positives and
        labels is given.
      labels: float, integer or bool array [..., L] in [0, 1]; soft labels are welcome.
      weight: real array [...], one number per row; None is 1.
      pos_weight: real array [L] that multiplies the positive term only, at least 0; None is 1.
      label_smoothing: number a in [0, 1]; labels become y (1 − a) + a / 2.
      where: bool array that broadcasts to [..., L]; False leaves a label of a row out of the loss
        and of its divisor. None keeps everything.
      ignored: integer array [..., I] of label ids, padded with -1: labels of that row that are left
        out like those that `where` masks, at a cost that does not grow with L. None is none.
      reduction: "mean" is Σ loss / number of kept labels of all rows, in which `weight` does not
        count; "weighted_mean" Σ loss / Σ over rows of weight · number of kept labels, 0 where that
        is 0; "sum" Σ loss; "batchmean" Σ loss / number of entries of the first axis of features,
        the batch, that keep a label; "none" one loss per row, summed over its labels.
      transpose_kernel: True for a kernel [L, D], as Equinox, PyTorch, `flax.nnx.Embed` and item
        tables have it. Nothing of its size is copied, and its gradient is [L, D] too.
      chunk_size: number of labels at a time; None chooses, and takes all of them at once where that
        is faster.
      mesh: devices to share the work, with axes of any type; None uses one, or what `jax.jit` makes
        of sharded inputs.
      batch_axis: axis of the mesh, or a tuple of axes, over which features, positives, weight,
        ignored and the rows of labels and where are sharded; None replicates them.
      label_axis: axis of the mesh, or a tuple of axes, over which kernel, bias, pos_weight and the
        columns of labels and where are sharded; None replicates them.

    Returns:
      The loss in float32 (float64 where features or kernel are): a scalar, or [...] for "none".

    Raises:
      TypeError: features, kernel or bias are not floating-point, positives or ignored not integer,
        where is not bool, or an argument is not an array.
      ValueError: neither or both of positives and labels are given, a shape does not fit, an axis
        of the mesh does not exist, is given for both or does not divide its size, the number of
        labels is symbolic, or reduction, label_smoothing or chunk_size is not valid.

    Edge values: an id outside [0, L) is padding, duplicates count once. A row of weight 0, or of no
    kept label, with an infinite or NaN feature gives 0. A positive that is ignored is left out.
    Infinite logits as in `bce_with_logits`, but an infinite number in the kernel gives NaN where
    weight, where or ignored are given. Nothing kept gives 0.

    Differentiable: with respect to features, kernel, bias, float labels, weight, pos_weight and
    label_smoothing, each in its own dtype and shape, in reverse mode; forward over reverse and
    reverse over reverse too. Under `jax.jit`, what is not differentiated costs nothing. For "none"
    the logits are computed once more in the backward pass. The gradient of a float16 kernel is kept
    in float32 until it is multiplied by its cotangent: a loss scale saves what float16 would lose.

    Transformations: rows belong in the leading axes of features, not under `jax.vmap`: mapped with
    a shared kernel, each row would have a gradient of the kernel of its own, [rows, D, L] in all.
    For one loss per row there is "none".

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> features, kernel = jnp.ones((2, 3)), jnp.full((3, 5), 0.1)
      >>> positives = jnp.array([[4, -1], [0, 2]])
      >>> loss = jaxbce.linear_bce_with_logits(features, kernel, positives=positives)
      >>> print(round(float(loss), 4))
      0.7644

    Source: the chunked softmax head of Wijmans et al. 2024, "Cut Your Losses", made exact in one
    pass by the absence of a normaliser.
    """
    name = "linear_bce_with_logits"
    _checks.check_choice(name, "reduction", reduction, Reduction)
    options = PlanOptions.checked(
        name, transpose_kernel, chunk_size, mesh, batch_axis=batch_axis, label_axis=label_axis
    )
    loss, per_label = built_in_loss(pos_weight)
    layer, targets = (features, kernel, bias), (positives, labels)
    given = Given(*layer, *targets, weight, label_smoothing, where, ignored, per_label)
    given = arguments.for_jit(name, loss, given)
    return _evaluate(given, name=name, reduction=reduction, loss=loss, options=options)


def linear_loss(
    loss: Loss | Callable[..., jax.Array],
    features: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    positives: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    per_label: Sequence[ArrayLike] = (),
    weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignored: ArrayLike | None = None,
    reduction: Reduction = "mean",
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    batch_axis: str | tuple[str, ...] | None = None,
    label_axis: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Any elementwise loss of the logits features @ kernel + bias, which are never held.

    Use it as `linear_bce_with_logits`, with the focal or the asymmetric loss, with a loss of a peer
    or with one of your own.

    Formula, with x = features · kernel[:, l] + bias[l] the logit of label l and y its label:

      loss of a row = weight · Σₗ loss(x, y, per_label[0][l], per_label[1][l], ...)

    Args:
      loss: a `jaxbce.Loss`, such as `jaxbce.Loss(jaxbce.focal_loss)`, or a function of arrays: of
        logits and labels of one shape, in the dtype of the result, and of the numbers per label. It
        returns one loss per logit and computes each from its own logit and label, which is proven
        when it is traced and takes longer than for a `Loss`. JAX differentiates it. It is compiled
        once for each function, so define it once, outside of the training step, and let it hold no
        traced value.
      features: float array [..., D].
      kernel: float array [D, L], or [L, D] with transpose_kernel.
      bias: float array [L]; None is 0.
      positives: integer array [..., P] of label ids, padded with -1. Exactly one of positives and
        labels is given.
      labels: float, integer or bool array [..., L].
      per_label: real arrays [L] that are handed to the loss, cut to its chunk: margins,
        propensities, class weights. For a `Loss` they are its parameters, in their order.
      weight: real array [...], one number per row; None is 1.
      where: bool array that broadcasts to [..., L]; as in `linear_bce_with_logits`.
      ignored: integer array [..., I] of label ids to leave out of each row, padded with -1.
      reduction: as in `linear_bce_with_logits`.
      transpose_kernel: True for a kernel [L, D].
      chunk_size: number of labels at a time; None chooses.
      mesh: devices to share the work; None uses one.
      batch_axis: axis of the mesh, or a tuple, over which the rows are sharded; None replicates
        them.
      label_axis: axis of the mesh, or a tuple, over which the labels are sharded; None replicates
        them.

    Returns:
      The loss in float32 (float64 where features or kernel are): a scalar, or [...] for "none".

    Raises:
      TypeError: loss is not a function, or does not return floats, and as
        `linear_bce_with_logits`.
      ValueError: loss does not return one number per logit, is not known to treat each logit
        apart, changes something outside of it or holds a traced value, and as
        `linear_bce_with_logits`.

    Edge values: those of the loss. What is masked, or has a weight of 0, has no part in the loss
    nor in a gradient, as in `linear_bce_with_logits`.

    Differentiable: with respect to features, kernel, bias, float labels, per_label and weight, as
    `linear_bce_with_logits`, as often as the loss is.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> features, kernel = jnp.ones((2, 3)), jnp.full((3, 5), 0.1)
      >>> positives = jnp.array([[4, -1], [0, 2]])
      >>> focal = jaxbce.Loss(jaxbce.focal_loss)
      >>> print(round(float(jaxbce.linear_loss(focal, features, kernel, positives=positives)), 4))
      0.2275

    Source: `linear_bce_with_logits`, which is this function with its loss built in.
    """
    name = "linear_loss"
    _checks.check_choice(name, "reduction", reduction, Reduction)
    options = PlanOptions.checked(
        name, transpose_kernel, chunk_size, mesh, batch_axis=batch_axis, label_axis=label_axis
    )
    chunk_loss = own_loss(name, loss, per_label, features, kernel)
    layer, targets = (features, kernel, bias), (positives, labels)
    given = Given(*layer, *targets, weight, 0.0, where, ignored, per_label)
    given = arguments.for_jit(name, chunk_loss, given)
    return _evaluate(given, name=name, reduction=reduction, loss=chunk_loss, options=options)


def _loss_spec(given: Given, *, reduction: Reduction, **_: Any) -> PartitionSpec:
    """One loss per row is sharded as the rows of the features are. A scalar is on every device."""
    if reduction != "none":
        return PartitionSpec()
    return PartitionSpec(*_placement.common_spec(given.features)[:-1])


@_placement.compiled(result=_loss_spec)
def _evaluate(
    given: Given,
    *,
    name: str,
    reduction: Reduction,
    loss: ChunkLoss,
    options: PlanOptions,
) -> jax.Array:
    lead, operands, weight, sizes = arguments.prepare(
        given, name=name, reduction=reduction, loss=loss, transposed=options.transposed
    )
    plan = options.plan(name, *sizes, loss=loss)
    if reduction != "none":
        return chunks.total_loss(plan, operands)
    rows = chunks.finite_rows(chunks.row_losses(plan, operands), operands)
    return (rows if weight is None else rows * weight).reshape(lead)
