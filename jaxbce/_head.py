"""Public functions of the chunked head: check, choose the chunk and the devices, evaluate."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxbce import _checks, _kernels, _linear, _placement, _reduce, _sharding


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
    reduction: str = "mean",
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
      kernel: float array [D, L].
      bias: float array [L]; None is 0.
      positives: integer array [..., P] of label ids, padded with -1. Exactly one of positives and
        labels is given.
      labels: float, integer or bool array [..., L] in [0, 1]; soft labels are welcome.
      weight: real array [...], one number per row; None is 1.
      pos_weight: real array [L] that multiplies the positive term only; None is 1.
      label_smoothing: number a in [0, 1]; labels become y (1 − a) + a / 2.
      reduction: "mean" is Σ loss / (rows · L), in which `weight` does not count; "weighted_mean"
        Σ loss / (L · Σ weight), 0 where that sum is 0; "sum" Σ loss; "batchmean" Σ loss / size of
        the first axis of features, the batch; "none" one loss per row, summed over its labels.
      chunk_size: number of labels at a time; None chooses, and takes all of them at once where that
        is faster.
      mesh: devices to share the work, with axes of any type; None uses one, or what `jax.jit` makes
        of sharded inputs.
      batch_axis: axis of the mesh, or a tuple of axes, over which features, positives, weight and
        the rows of labels are sharded; None replicates them.
      label_axis: axis of the mesh, or a tuple of axes, over which kernel, bias, pos_weight and the
        columns of labels are sharded; None replicates them.

    Returns:
      The loss in float32 (float64 where features or kernel are): a scalar, or [...] for "none".

    Raises:
      TypeError: features, kernel or bias are not floating-point, positives not integer, or an
        argument is not an array.
      ValueError: neither or both of positives and labels are given, a shape does not fit, an axis
        of the mesh does not exist, is given for both or does not divide its size, the number of
        labels is symbolic, or reduction, label_smoothing or chunk_size is not valid.

    Edge values: a positive outside [0, L) is padding, duplicates count once. A row of weight 0 with
    an infinite or NaN feature gives 0. Infinite logits as in `bce_with_logits`. Nothing gives 0.

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
    _checks.check_choice(name, "reduction", reduction, _reduce.REDUCTIONS)
    _checks.check_one_of(name, positives=positives, labels=labels)
    devices = _sharding.Devices.named(
        name, chunk_size, mesh, batch_axis=batch_axis, label_axis=label_axis
    )
    arrays = _checks.admit(
        name,
        features=features,
        kernel=kernel,
        bias=bias,
        positives=positives,
        labels=labels,
        weight=weight,
        pos_weight=pos_weight,
        label_smoothing=_checks.fraction_or_none(name, "label_smoothing", label_smoothing),
    )
    loss: jax.Array = _evaluate(*arrays, name=name, reduction=reduction, devices=devices)
    return loss


def linear_top_k(
    features: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    k: int,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    batch_axis: str | tuple[str, ...] | None = None,
    label_axis: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k highest of the logits features @ kernel + bias, which are never held, and their labels.

    Use it to predict with a head of very many labels.

    Formula: `jax.lax.top_k(features @ kernel + bias, k)`.

    Args:
      features: float array [..., D].
      kernel: float array [D, L].
      bias: float array [L]; None is 0.
      k: how many, an int in [1, L].
      chunk_size: number of labels at a time, at least k of them; None chooses.
      mesh: devices to share the work, with axes of any type; None uses one, or what `jax.jit` makes
        of sharded inputs.
      batch_axis: axis of the mesh, or a tuple of axes, over which features are sharded; None
        replicates them.
      label_axis: axis of the mesh, or a tuple of axes, over which kernel and bias are sharded; None
        replicates them. Each device keeps to its own labels and sends its k best.

    Returns:
      The logits [..., k] in float32 (float64 where features or kernel are), highest first, and
      their labels [..., k] in int32.

    Raises:
      TypeError: features, kernel or bias are not floating-point, or not an array.
      ValueError: a shape does not fit, an axis of the mesh does not exist, is given for both or
        does not divide its size, or k or chunk_size is not valid.

    Edge values: of equal logits the one of the lowest label comes first, as in `jax.lax.top_k`.

    Differentiable: the logits are, with respect to features, kernel and bias; on a mesh in reverse
    mode only.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> logits, labels = jaxbce.linear_top_k(jnp.ones(2), jnp.array([[1., 3, 2], [1, 1, 2]]), k=2)
      >>> print(logits, labels)
      [4. 4.] [1 2]

    Source: `jax.lax.top_k`, merged over chunks.
    """
    name = "linear_top_k"
    devices = _sharding.Devices.named(
        name, chunk_size, mesh, batch_axis=batch_axis, label_axis=label_axis
    )
    arrays = _checks.admit(name, features=features, kernel=kernel, bias=bias)
    num_labels = next(reversed(getattr(arrays[1], "shape", ())), None)
    _checks.check_size(name, "k", k, num_labels if isinstance(num_labels, int) else None)
    best: tuple[jax.Array, jax.Array] = _top_k(*arrays, name=name, k=k, devices=devices)
    return best


def _prepare_layer(
    name: str, features: Any, kernel: Any, bias: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The arrays of a linear layer; `features` in the dtype in which products are multiplied."""
    features = _checks.floating(name, "features", features)
    kernel = _checks.floating(name, "kernel", kernel)
    if not features.ndim:
        raise ValueError(f"{name}: features must have shape (..., width), got one number")
    if kernel.ndim != 2 or kernel.shape[0] != features.shape[-1]:
        raise ValueError(
            f"{name}: kernel must have shape (width, labels) for features {features.shape} of "
            f"shape (..., width), got {kernel.shape}; a (labels, width) kernel is kernel.T"
        )
    if not isinstance(kernel.shape[1], int):
        raise ValueError(
            f"{name}: kernel must have a number of labels that is known while tracing, got "
            f"{kernel.shape}; only the leading axes of features may be symbolic"
        )
    dtype = _kernels.accumulator(features, kernel)
    if not features.dtype == kernel.dtype == jnp.bfloat16:
        # Also for float16, in which a gradient divided by rows · labels would be 0.
        features = features.astype(dtype)
    if bias is not None:
        bias = _checks.floating(name, "bias", bias)
        bias = _checks.shaped(name, "bias", bias, kernel.shape[1:], "(labels,)").astype(dtype)
    return features, kernel, bias


def _by_row(features: Any, *_: Any, reduction: str, **__: Any) -> PartitionSpec:
    """The loss of each row is sharded as the features are."""
    if reduction != "none":
        return PartitionSpec()
    return PartitionSpec(*_placement.common_spec(features)[:-1])


@_placement.compiled("name", "reduction", "devices", result=_by_row)
def _evaluate(
    features: Any,
    kernel: Any,
    bias: Any,
    positives: Any,
    labels: Any,
    weight: Any,
    pos_weight: Any,
    label_smoothing: Any,
    *,
    name: str,
    reduction: str,
    devices: _sharding.Devices,
) -> jax.Array:
    features, kernel, bias = _prepare_layer(name, features, kernel, bias)
    lead, num_labels = features.shape[:-1], kernel.shape[1]
    batch = math.prod(lead)
    rows_of = ("features", features.shape)
    features = features.reshape(batch, features.shape[-1])
    dtype = _kernels.accumulator(features)
    counted = None
    if weight is not None:
        weight = _checks.shaped(name, "weight", weight, lead, "(...,)").astype(dtype)
        counted = weight != 0
        weight = weight.reshape(batch)
        keep = (weight != 0) | jnp.all(jnp.isfinite(features), axis=1)
        features = jnp.where(keep[:, None], features, 0)
        weight = jnp.where(keep, weight, 0)
    if positives is not None:
        positives = _checks.positives(name, positives, num_labels, rows_of=rows_of, keep=counted)
        positives = positives.reshape(batch, positives.shape[-1])
    else:
        labels = _checks.shaped(name, "labels", labels, (*lead, num_labels), "(..., labels)")
        rows = None if counted is None else counted[..., None]
        _checks.check_unit_interval(name, "labels", labels.astype(dtype), rows)
        labels = labels.reshape(batch, num_labels)
    if pos_weight is not None:
        pos_weight = _checks.shaped(name, "pos_weight", pos_weight, (num_labels,), "(labels,)")
        pos_weight = pos_weight.astype(dtype)
    if label_smoothing is not None:
        label_smoothing = _checks.number(name, "label_smoothing", label_smoothing).astype(dtype)
        _checks.check_unit_interval(name, "label_smoothing", label_smoothing)

    scale = jnp.ones(batch, dtype) if weight is None else weight
    if reduction == "weighted_mean":
        scale = scale * _reduce.inverse(jnp.sum(scale))
    divisors = {
        "mean": (batch, num_labels),
        "weighted_mean": (num_labels,),
        "batchmean": lead[:1],
    }
    for size in divisors.get(reduction, ()):
        scale = scale * _reduce.one_over(size, dtype)
    operands = _linear.Operands(
        features, kernel, bias, positives, labels, pos_weight, label_smoothing, scale
    )
    operands = _placement.vary_together(operands)
    how = devices.over(name, batch, num_labels)
    if reduction != "none":
        return _linear.total_loss(how, operands)
    loss = _linear.row_losses(how, operands)
    keep = _reduce.kept(loss, weight, None)
    if keep is not None:
        loss = jnp.where(keep, loss, 0)
    return (loss if weight is None else loss * weight).reshape(lead)


def _by_row_and_whole(features: Any, *_: Any, **__: Any) -> tuple[PartitionSpec, PartitionSpec]:
    spec = PartitionSpec(*_placement.common_spec(features)[:-1], None)
    return spec, spec


@_placement.compiled("name", "k", "devices", result=_by_row_and_whole)
def _top_k(
    features: Any, kernel: Any, bias: Any, *, name: str, k: int, devices: _sharding.Devices
) -> tuple[jax.Array, jax.Array]:
    features, kernel, bias = _prepare_layer(name, features, kernel, bias)
    num_labels = kernel.shape[1]
    lead = features.shape[:-1]
    features = features.reshape(math.prod(lead), features.shape[-1])
    how = devices.over(name, features.shape[0], num_labels)
    values, ids = how.top_k(features, kernel, bias, k)
    return values.reshape(*lead, k), ids.reshape(*lead, k)
