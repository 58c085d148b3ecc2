"""Public functions of the chunked head: check, choose the chunk and the devices, evaluate."""

import math
from collections.abc import Callable, Sequence
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
    where: ArrayLike | None = None,
    ignored: ArrayLike | None = None,
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
      where: bool array that broadcasts to [..., L]; False leaves a label of a row out of the loss
        and of its divisor. None keeps everything.
      ignored: integer array [..., I] of label ids, padded with -1: labels of that row that are left
        out like those that `where` masks, at a cost that does not grow with L. None is none.
      reduction: "mean" is Σ loss / number of kept labels of all rows, in which `weight` does not
        count; "weighted_mean" Σ loss / Σ over rows of weight · number of kept labels, 0 where that
        is 0; "sum" Σ loss; "batchmean" Σ loss / number of entries of the first axis of features,
        the batch, that keep a label; "none" one loss per row, summed over its labels.
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
    Infinite logits as in `bce_with_logits`. Nothing kept gives 0.

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
    devices = _sharding.Devices.named(
        name, chunk_size, mesh, batch_axis=batch_axis, label_axis=label_axis
    )
    arrays = admit(
        name,
        features,
        kernel,
        bias,
        positives=positives,
        labels=labels,
        per_label={"pos_weight": pos_weight},
        weight=weight,
        label_smoothing=label_smoothing,
        where=where,
        ignored=ignored,
    )
    result: jax.Array = _evaluate(
        *arrays, name=name, reduction=reduction, loss=_linear.bce, devices=devices
    )
    return result


def linear_loss(
    loss: Callable[..., jax.Array],
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
    reduction: str = "mean",
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
      loss: a function of logits and labels, both [rows, chunk] and of the dtype of the result, and
        of the numbers [chunk] per label, that returns one loss per logit, [rows, chunk]; for
        example `functools.partial(jaxbce.focal_loss, gamma=1.0, reduction="none")`. JAX
        differentiates it. It is compiled once for each function, so define it once, outside of the
        training step, and let it hold no traced value.
      features: float array [..., D].
      kernel: float array [D, L].
      bias: float array [L]; None is 0.
      positives: integer array [..., P] of label ids, padded with -1. Exactly one of positives and
        labels is given.
      labels: float, integer or bool array [..., L].
      per_label: real arrays [L] that are handed to the loss, cut to its chunk: margins,
        propensities, class weights.
      weight: real array [...], one number per row; None is 1.
      where: bool array that broadcasts to [..., L]; as in `linear_bce_with_logits`.
      ignored: integer array [..., I] of label ids to leave out of each row, padded with -1.
      reduction: as in `linear_bce_with_logits`.
      chunk_size: number of labels at a time; None chooses.
      mesh: devices to share the work; None uses one.
      batch_axis: axis of the mesh, or a tuple, over which the rows are sharded; None replicates them.
      label_axis: axis of the mesh, or a tuple, over which the labels are sharded; None replicates
        them.

    Returns:
      The loss in float32 (float64 where features or kernel are): a scalar, or [...] for "none".

    Raises:
      TypeError: loss is not a function, or does not return floats, and as
        `linear_bce_with_logits`.
      ValueError: loss does not return one number per logit or holds a traced value, and as
        `linear_bce_with_logits`.

    Edge values: those of the loss. What is masked, or has a weight of 0, has no part in the loss
    nor in a gradient, as in `linear_bce_with_logits`.

    Differentiable: with respect to features, kernel, bias, float labels, per_label and weight, as
    `linear_bce_with_logits`, as often as the loss is.

    Example:
      >>> import functools, jax.numpy as jnp, jaxbce
      >>> features, kernel = jnp.ones((2, 3)), jnp.full((3, 5), 0.1)
      >>> positives = jnp.array([[4, -1], [0, 2]])
      >>> focal = functools.partial(jaxbce.focal_loss, reduction="none")
      >>> print(round(float(jaxbce.linear_loss(focal, features, kernel, positives=positives)), 4))
      0.2455

    Source: `linear_bce_with_logits`, which is this function with its loss built in.
    """
    name = "linear_loss"
    _checks.check_choice(name, "reduction", reduction, _reduce.REDUCTIONS)
    devices = _sharding.Devices.named(
        name, chunk_size, mesh, batch_axis=batch_axis, label_axis=label_axis
    )
    arrays = admit(
        name,
        features,
        kernel,
        bias,
        positives=positives,
        labels=labels,
        per_label=numbered(name, per_label),
        weight=weight,
        where=where,
        ignored=ignored,
    )
    result: jax.Array = _evaluate(
        *arrays,
        name=name,
        reduction=reduction,
        loss=own_loss(name, loss, len(per_label)),
        devices=devices,
    )
    return result


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

    Differentiable: the logits are, with respect to features, kernel and bias.

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


def admit(
    name: str,
    features: Any,
    kernel: Any,
    bias: Any,
    *,
    positives: Any,
    labels: Any,
    per_label: dict[str, Any],
    weight: Any,
    where: Any,
    ignored: Any,
    label_smoothing: Any = 0.0,
) -> list[Any]:
    """The arrays that `prepare` takes; those of `per_label` by name, None for what is not given."""
    _checks.check_one_of(name, positives=positives, labels=labels)
    given = {argument: value for argument, value in per_label.items() if value is not None}
    numbers = dict(zip(given, _checks.admit(name, **given), strict=True))
    arrays = _checks.admit(
        name,
        features=features,
        kernel=kernel,
        bias=bias,
        positives=positives,
        labels=labels,
        weight=weight,
        label_smoothing=_checks.fraction_or_none(name, "label_smoothing", label_smoothing),
        where=where,
        ignored=ignored,
    )
    return [*arrays, numbers]


def numbered(name: str, per_label: Any) -> dict[str, Any]:
    """The arrays of `per_label` under the names that errors give them."""
    if not isinstance(per_label, (tuple, list)):
        raise TypeError(
            f"{name}: per_label must be a tuple of arrays, got {type(per_label).__name__}; one "
            "array is (per_label,)"
        )
    return {f"per_label[{i}]": array for i, array in enumerate(per_label)}


def own_loss(name: str, loss: Any, num_arrays: int) -> _linear.OwnLoss:
    """A user's loss, which must be one number per logit and a function of its arguments alone."""
    if not callable(loss):
        raise TypeError(
            f"{name}: loss must be a function of (logits, labels, *per_label), got "
            f"{type(loss).__name__}"
        )
    elements = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    numbers = [jax.ShapeDtypeStruct((3,), jnp.float32)] * num_arrays
    traced = jax.make_jaxpr(loss)(elements, elements, *numbers)
    shapes = [result.shape for result in traced.out_avals]
    if shapes != [elements.shape]:
        raise ValueError(
            f"{name}: loss must return one number per logit, of shape {elements.shape} for logits "
            f"of that shape, got {shapes[0] if len(shapes) == 1 else shapes}; a loss of jaxbce "
            'takes reduction="none"'
        )
    if not jnp.issubdtype(traced.out_avals[0].dtype, jnp.floating):
        raise TypeError(f"{name}: loss must return floats, got {traced.out_avals[0].dtype}")
    if any(isinstance(constant, jax.core.Tracer) for constant in traced.consts):
        raise ValueError(
            f"{name}: loss must hold no traced value, of which it would lose the gradient; pass "
            "the value as one of per_label, jax.numpy.full(labels, value)"
        )
    return _linear.OwnLoss(loss)


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
        bias = _checks.shaped(name, "bias", bias, kernel.shape[1:], "(labels,)")
    return features, kernel, bias


def _by_row(features: Any, *_: Any, reduction: str, **__: Any) -> PartitionSpec:
    """The loss of each row is sharded as the features are."""
    if reduction != "none":
        return PartitionSpec()
    return PartitionSpec(*_placement.common_spec(features)[:-1])


@_placement.compiled("name", "reduction", "loss", "devices", result=_by_row)
def _evaluate(
    *arrays: Any,
    name: str,
    reduction: str,
    loss: _linear.ChunkLoss,
    devices: _sharding.Devices,
) -> jax.Array:
    lead, operands, weight = prepare(*arrays, name=name, reduction=reduction)
    how = devices.over(name, *sizes(operands), loss)
    if reduction != "none":
        return _linear.total_loss(how, operands)
    rows = _linear.row_losses(how, operands)
    keep = _reduce.kept(rows, weight, None)
    if keep is not None:
        rows = jnp.where(keep, rows, 0)
    return (rows if weight is None else rows * weight).reshape(lead)


def sizes(operands: _linear.Operands) -> tuple[int, int]:
    return operands.features.shape[0], operands.kernel.shape[1]


def prepare(
    features: Any,
    kernel: Any,
    bias: Any,
    positives: Any,
    labels: Any,
    weight: Any,
    label_smoothing: Any,
    where: Any,
    ignored: Any,
    per_label: dict[str, Any],
    *,
    name: str,
    reduction: str,
) -> tuple[tuple[int, ...], _linear.Operands, jax.Array | None]:
    """The leading axes of the rows, the operands of a pass over them, and the weight of each."""
    features, kernel, bias = _prepare_layer(name, features, kernel, bias)
    lead, num_labels = features.shape[:-1], kernel.shape[1]
    batch, dtype = math.prod(lead), _kernels.accumulator(features)
    rows_of = ("features", features.shape)
    features = features.reshape(batch, features.shape[-1])

    if where is not None:
        shape = (*lead, num_labels)
        where = _checks.mask(name, where, "(..., labels)", shape)
        # One row for all where it is the same for all.
        rows = (1,) * len(lead) if math.prod(where.shape[:-1]) == 1 else lead
        where = jnp.broadcast_to(where, (*rows, where.shape[-1]))
        where = where.reshape(math.prod(rows), where.shape[-1])
    if ignored is not None:
        ignored = _checks.positives(name, ignored, num_labels, argument="ignored", rows_of=rows_of)
        ignored = ignored.reshape(batch, ignored.shape[-1])
    kept = _kept_labels(where, ignored, batch, num_labels, dtype)

    keep, counted = None, None if kept is None else kept != 0
    if weight is not None:
        weight = _checks.shaped(name, "weight", weight, lead, "(...,)").astype(dtype)
        weight = weight.reshape(batch)
        keep = (weight != 0) | jnp.all(jnp.isfinite(features), axis=1)
        keep = keep if counted is None else keep & counted
        counted = weight != 0 if counted is None else counted & (weight != 0)
        weight = jnp.where(keep, weight, 0)
    elif counted is not None:
        keep = counted
    if keep is not None:
        # Before anything is computed of them, so that no NaN reaches a gradient.
        features = jnp.where(keep[:, None], features, 0)

    if positives is not None:
        rows_kept = None if counted is None else counted.reshape(lead)
        positives = _checks.positives(name, positives, num_labels, rows_of=rows_of, keep=rows_kept)
        positives = positives.reshape(batch, positives.shape[-1])
    else:
        labels = _checks.shaped(name, "labels", labels, (*lead, num_labels), "(..., labels)")
        labels = labels.reshape(batch, num_labels)
    numbers = tuple(
        _checks.shaped(name, argument, array, (num_labels,), "(labels,)").astype(dtype)
        for argument, array in per_label.items()
    )
    if label_smoothing is not None:
        label_smoothing = _checks.number(name, "label_smoothing", label_smoothing).astype(dtype)
        _checks.check_unit_interval(name, "label_smoothing", label_smoothing)

    operands = _linear.Operands(
        features=features,
        kernel=kernel,
        bias=bias,
        positives=positives,
        labels=labels,
        per_label=numbers,
        label_smoothing=label_smoothing,
        where=where,
        ignored=ignored,
        scale=_scale(weight, kept, lead, num_labels, dtype, reduction),
    )
    if labels is not None:
        mask = _linear.chunk_mask(operands, 0, 0, num_labels)
        if counted is not None:
            mask = counted[:, None] if mask is None else mask & counted[:, None]
        _checks.check_unit_interval(name, "labels", labels.astype(dtype), mask)
    return lead, _placement.vary_together(operands), weight


def _kept_labels(
    where: jax.Array | None, ignored: jax.Array | None, batch: int, num_labels: int, dtype: Any
) -> jax.Array | None:
    """How many labels of each row are kept, [batch]; None for all of all rows."""
    if where is None and ignored is None:
        return None
    if where is None:
        where = jnp.ones((1, 1), bool)
    kept = _reduce.count_true(where, (1,), dtype)[:, 0]
    kept *= _reduce.repeats(where.shape, (batch, num_labels), (1,), dtype)
    if ignored is None:
        return jnp.broadcast_to(kept, batch)
    ids = jnp.sort(ignored, axis=1)
    first = ids != jnp.pad(ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    row = jnp.arange(batch)[:, None] if where.shape[0] > 1 else 0
    column = ids if where.shape[1] > 1 else 0
    masked = ~where.at[row, column].get(mode="fill", fill_value=False)
    return kept - jnp.sum((ids < num_labels) & first & ~masked, axis=1, dtype=dtype)


def _scale(
    weight: jax.Array | None,
    kept: jax.Array | None,
    lead: tuple[int, ...],
    num_labels: int,
    dtype: Any,
    reduction: str,
) -> jax.Array:
    """The factor of each row in the total: its weight over the divisor of the reduction."""
    batch = math.prod(lead)
    scale = jnp.ones(batch, dtype) if weight is None else weight
    if kept is None:
        sizes = {"mean": (batch, num_labels), "weighted_mean": (num_labels,), "batchmean": lead[:1]}
        for size in sizes.get(reduction, ()):
            scale = scale * _reduce.one_over(size, dtype)
        kept = jnp.ones((), dtype)
    elif reduction == "mean":
        scale = scale * _reduce.inverse(jnp.sum(kept))
    elif reduction == "batchmean":
        entries = jnp.any(kept.reshape(lead) != 0, axis=tuple(range(1, len(lead))))
        scale = scale * _reduce.inverse(jnp.sum(entries, dtype=dtype))
    if reduction == "weighted_mean":
        own = jnp.ones(batch, dtype) if weight is None else weight
        scale = scale * _reduce.inverse(jnp.sum(own * kept))
    return scale


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
