"""What the functions of the head have in common: their arrays, checked and prepared for a pass."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbce import _checks, _math, _placement, _reduce
from jaxbce._head import chunks
from jaxbce._head.loss import ChunkLoss
from jaxbce._labels.ids import checked_ids
from jaxbce._loss import Loss
from jaxbce._reduce import Reduction

# So many labels at the end of a kernel only fill up the devices of a mesh. The user's arrays have
# no entries for them, and no result counts them. `MultiLabelHead` alone sets it. It is a context
# because it is no argument of the public functions. JAX keeps it in the key of `jax.jit`.
padding = jax.make_user_context(default_value=0)


class Given(NamedTuple):
    """The arrays of a call, in this order everywhere; None for what is not given."""

    features: Any
    kernel: Any
    bias: Any
    positives: Any
    labels: Any
    weight: Any
    label_smoothing: Any
    where: Any
    ignored: Any
    per_label: Sequence[Any]


def for_jit(name: str, loss: ChunkLoss, given: Given) -> Given:
    """What was given, as `jax.jit` takes it."""
    _checks.check_one_of(name, positives=given.positives, labels=given.labels)
    smoothing = _checks.fraction_or_none(name, "label_smoothing", given.label_smoothing)
    arrays = given._replace(label_smoothing=smoothing)._asdict()
    numbers = dict(zip(loss.per_label, arrays.pop("per_label"), strict=True))
    per_label = tuple(_checks.jit_arguments(name, **numbers))
    return Given._make([*_checks.jit_arguments(name, **arrays), per_label])


def prepare_layer(
    name: str, features: Any, kernel: Any, bias: Any, transposed: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None, int]:
    """The arrays of a linear layer, and its number of labels.

    `features` are in the dtype in which products are multiplied.
    """
    features = _checks.floating(name, "features", features)
    kernel = _checks.floating(name, "kernel", kernel)
    if not features.ndim:
        raise ValueError(f"{name}: features must have shape (..., width), got one number")
    width, shape = features.shape[-1], kernel.shape
    if kernel.ndim != 2 or shape[transposed] != width:
        axes, other = ("(labels, width)", False) if transposed else ("(width, labels)", True)
        remedy = "the widths must be equal"
        if kernel.ndim == 2 and shape[other] == width:
            remedy = f"a kernel that lies the other way round takes transpose_kernel={other}"
        raise ValueError(
            f"{name}: kernel must have shape {axes} for features {features.shape} of shape "
            f"(..., width) with transpose_kernel={transposed}, got {shape}; {remedy}"
        )
    num_labels = shape[1 - transposed]
    if not isinstance(num_labels, int):
        raise ValueError(
            f"{name}: kernel must have a number of labels that is known while tracing, got "
            f"{kernel.shape}; only the leading axes of features may be symbolic"
        )
    half = all(_math.multiplied_in(each.dtype) == jnp.bfloat16 for each in (features, kernel))
    # Not in float16, in which a gradient divided by rows · labels would be 0.
    features = features.astype(jnp.bfloat16 if half else _math.accumulator(features, kernel))
    if bias is not None:
        bias = _checks.floating(name, "bias", bias)
        bias = _checks.shaped(name, "bias", bias, (num_labels,), "(labels,)")
    return features, kernel, bias, num_labels


def without_unused_rows(
    features: jax.Array, weight: jax.Array | None, row_kept: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Features and weights, with 0 for each row that the loss does not use.

    Such a row has no label that is kept, or a weight of 0 and features that are not finite. Call it
    before anything is computed of the features, so that no NaN reaches a gradient.
    """
    used = row_kept
    if weight is not None:
        largest = jnp.max(jnp.abs(features), axis=1, initial=0)
        used = _reduce.enters(largest, weight, row_kept)
    if used is not None:
        features = jnp.where(used[:, None], features, 0)
        weight = None if weight is None else jnp.where(used, weight, 0)
    return features, weight


def prepare(
    given: Given, *, name: str, reduction: Reduction, loss: ChunkLoss, transposed: bool
) -> tuple[tuple[int, ...], chunks.Operands, jax.Array | None, tuple[int, int]]:
    """Leading axes of the rows, operands, weight [batch], (rows, labels with their padding)."""
    features, kernel, bias, all_labels = prepare_layer(
        name, given.features, given.kernel, given.bias, transposed
    )
    num_labels = all_labels - padding.value
    positives, labels, weight = given.positives, given.labels, given.weight
    ignored, where = given.ignored, given.where
    lead = features.shape[:-1]
    batch, dtype = math.prod(lead), _math.accumulator(features)
    rows_of = ("features", features.shape)
    features = features.reshape(batch, features.shape[-1])

    where = _checks.mask(name, where, "(..., labels)", (*lead, num_labels))
    if where is not None:
        # One row for all where it is the same for all.
        rows = (1,) * len(lead) if math.prod(where.shape[:-1]) == 1 else lead
        where = jnp.broadcast_to(where, (*rows, where.shape[-1]))
        where = where.reshape(math.prod(rows), where.shape[-1])
    if ignored is not None:
        ignored = checked_ids(name, ignored, num_labels, argument="ignored", rows_of=rows_of)
        ignored = ignored.reshape(batch, ignored.shape[-1])
    num_kept = _reduce.num_kept(where, ignored, batch, num_labels, dtype)

    if weight is not None:
        weight = _checks.shaped(name, "weight", weight, lead, "(...,)").astype(dtype)
        weight = weight.reshape(batch)
    row_kept = None if num_kept is None else num_kept != 0  # has a label that no mask leaves out
    row_counted = _reduce.counted(weight, row_kept)  # nor a weight of 0
    features, weight = without_unused_rows(features, weight, row_kept)

    if positives is not None:
        checked_rows = None if row_counted is None else row_counted.reshape(lead)
        positives = checked_ids(name, positives, num_labels, rows_of=rows_of, keep=checked_rows)
        positives = positives.reshape(batch, positives.shape[-1])
    else:
        labels = _checks.shaped(name, "labels", labels, (*lead, num_labels), "(..., labels)")
        labels = labels.reshape(batch, num_labels)
    numbers = tuple(
        _checks.shaped(name, argument, array, (num_labels,), "(labels,)").astype(dtype)
        for argument, array in zip(loss.per_label, given.per_label, strict=True)
    )
    operands = chunks.Operands(
        features=features,
        kernel=kernel,
        bias=bias,
        positives=positives,
        labels=labels,
        per_label=numbers,
        label_smoothing=_checks.smoothing(name, given.label_smoothing, dtype),
        where=where,
        ignored=ignored,
        row_factor=_reduce.row_factor(weight, num_kept, lead, num_labels, dtype, reduction),
        weightless=None if weight is None else weight == 0,
    )
    if isinstance(loss.loss, Loss) and _checks.values_are_checked():  # a function may take any
        mask = chunks.chunk_mask(operands, 0, 0, num_labels)
        if row_counted is not None:
            mask = row_counted[:, None] if mask is None else mask & row_counted[:, None]
        for parameter, argument, array in zip(
            loss.loss.parameters, loss.per_label, numbers, strict=False
        ):
            if parameter == "pos_weight":
                label_counted = None if mask is None else jnp.any(mask, axis=0)
                _checks.check_not_negative(name, argument, array, label_counted)
        if labels is not None:
            _checks.check_unit_interval(name, "labels", labels.astype(dtype), mask)
    if padding.value:
        operands = with_padding(operands, num_labels, padding.value)
    return lead, _placement.vary_together(operands), weight, (batch, all_labels)


def padded(array: jax.Array, padding: int, fill: int = 0) -> jax.Array:
    """With so many entries more on its last axis; without any it is not copied."""
    if not padding:
        return array
    widths = [(0, 0)] * (array.ndim - 1) + [(0, padding)]
    return jnp.pad(array, widths, constant_values=np.asarray(fill, array.dtype))


def with_padding(operands: chunks.Operands, num_labels: int, padding: int) -> chunks.Operands:
    """The operands by label, which have `num_labels`, for padding too, which is masked."""
    labels, where, ignored = operands.labels, operands.where, operands.ignored
    if where is None:
        where = jnp.ones((1, num_labels), bool)
    if where.shape[1] == num_labels:
        where = padded(where, padding)
    else:  # with all labels, a mask of rows would be as large as the logits
        ids = jnp.arange(num_labels, num_labels + padding, dtype=jnp.int32)
        ids = jnp.broadcast_to(ids, (operands.features.shape[0], padding))
        ignored = ids if ignored is None else jnp.concatenate([ignored, ids], axis=1)
    return operands._replace(
        labels=None if labels is None else padded(labels, padding),
        per_label=tuple(padded(array, padding, 1) for array in operands.per_label),
        where=where,
        ignored=ignored,
    )
