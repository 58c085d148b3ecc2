"""The balance of the two classes of each label, from dense labels or ids."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbce import _checks, _math, _placement, _reduce
from jaxbce._labels import ids as _ids


def balanced_pos_weight(
    labels: ArrayLike | None = None,
    *,
    positives: ArrayLike | None = None,
    num_labels: int | None = None,
    where: ArrayLike | None = None,
    ignored: ArrayLike | None = None,
    max_weight: float | None = None,
) -> jax.Array:
    """The `pos_weight` with which the two classes of each label weigh the same.

    Use it on the training labels when positives are few and recall matters more than calibrated
    probabilities: a model trained with it overestimates the probability of a positive.

    Formula, with P the positives and N the negatives of a label:

      pos_weight = min(N / max(P, 1), max_weight)

    Args:
      labels: bool, integer or float array [..., L] in [0, 1]; a soft label y counts as y positives
        and 1 − y negatives. Exactly one of labels and positives.
      positives: integer array [..., P] of label ids instead, padded with -1.
      num_labels: the number of labels L, an int; with positives only.
      where: bool array that broadcasts to [..., L]; False leaves an element out. None keeps all.
      ignored: integer array [..., I] of label ids that each row leaves out, padded with -1; with
        positives only.
      max_weight: number > 0, the largest result; None is no limit, about 10 keeps a rare label from
        dominating.

    Returns:
      A float32 array [L] (float64 for float64 labels).

    Raises:
      TypeError: labels are not a real array, positives or ignored not an integer array, where is
        not bool, max_weight is not a real number.
      ValueError: neither or both of labels and positives, positives without num_labels, labels with
        ignored, a shape that does not fit, a label outside [0, 1], or max_weight is not positive
        (what is traced is not checked).

    Edge values: a label without positives gets its number of negatives, at most max_weight; one
    without negatives, or with nothing kept, 0. What is masked may hold anything, also NaN.

    Differentiable: with respect to float labels.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> labels = jnp.array([[1, 0, 0], [1, 0, 1], [0, 0, 0], [1, 0, 0]])
      >>> print(jaxbce.balanced_pos_weight(labels, max_weight=3.5))
      [0.33333334 3.5        3.        ]

    Source: negatives / positives, the advice of PyTorch's `BCEWithLogitsLoss`.
    """
    name = "balanced_pos_weight"
    if max_weight is not None:
        (max_weight,) = _checks.jit_arguments(name, max_weight=max_weight)
        _checks.number(name, "max_weight", max_weight)
        # A traced one is not known. NaN is not greater than 0 either.
        known = not isinstance(max_weight, jax.core.Tracer)
        if known and not np.all(np.asarray(max_weight).astype(float) > 0):
            raise ValueError(f"{name}: max_weight must be positive, got {max_weight}")
    count, negatives = _counts(name, labels, positives, num_labels, where, ignored)
    weight = negatives / jnp.maximum(count, 1)
    if max_weight is None:
        return weight
    return jnp.minimum(weight, jnp.asarray(max_weight).astype(weight.dtype))


def prior_bias(
    labels: ArrayLike | None = None,
    *,
    positives: ArrayLike | None = None,
    num_labels: int | None = None,
    where: ArrayLike | None = None,
    ignored: ArrayLike | None = None,
) -> jax.Array:
    """The bias with which an untrained output layer predicts the base rate of each label.

    Use it on the training labels to initialise the bias of the last layer: with many rare labels,
    training otherwise spends its first epochs on pushing all logits down.

    Formula, with P the positives and N the negatives of a label:

      bias = log((P + ½) / (N + ½)),  so that sigmoid(bias) = (P + ½) / (P + N + 1)

    Args:
      labels: bool, integer or float array [..., L] in [0, 1]; a soft label y counts as y positives
        and 1 − y negatives. Exactly one of labels and positives.
      positives: integer array [..., P] of label ids instead, padded with -1.
      num_labels: the number of labels L, an int; with positives only.
      where: bool array that broadcasts to [..., L]; False leaves an element out. None keeps all.
      ignored: integer array [..., I] of label ids that each row leaves out, padded with -1; with
        positives only.

    Returns:
      A float32 array [L] (float64 for float64 labels).

    Raises:
      TypeError: labels are not a real array, positives or ignored not an integer array, where is
        not bool.
      ValueError: neither or both of labels and positives, positives without num_labels, labels with
        ignored, a shape that does not fit, or a label outside [0, 1] (traced ones are not checked).

    Edge values: finite for every label; 0 where nothing is kept. What is masked may hold anything,
    also NaN.

    Differentiable: with respect to float labels.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> bias = jaxbce.prior_bias(positives=jnp.array([[0], [0], [-1]]), num_labels=2)
      >>> print(jax.nn.sigmoid(bias).round(3))
      [0.625 0.125]

    Source: Lin et al., "Focal loss for dense object detection" (2017), section 4.1; the ½ is
    Jeffreys' prior.
    """
    count, negatives = _counts("prior_bias", labels, positives, num_labels, where, ignored)
    return jnp.log((count + 0.5) / (negatives + 0.5))


def _counts(
    name: str,
    labels: ArrayLike | None,
    positives: ArrayLike | None,
    num_labels: Any,
    where: ArrayLike | None,
    ignored: ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """For each label: its positives and its negatives, of what is kept."""
    _checks.check_one_of(name, labels=labels, positives=positives)
    labels, positives, where, ignored = _checks.jit_arguments(
        name, labels=labels, positives=positives, where=where, ignored=ignored
    )
    if positives is None:
        if num_labels is not None:
            raise ValueError(
                f"{name}: num_labels goes with positives, got labels and num_labels={num_labels}"
            )
        if ignored is not None:
            raise ValueError(
                f"{name}: ignored goes with positives, got it with labels; leave elements of dense "
                "labels out by where"
            )
        count, kept = _dense_counts(labels, where, name=name)
        _check_known(name, labels, where)
    else:
        _ids.check_num_labels(name, num_labels)
        count, kept = _sparse_counts(positives, where, ignored, name=name, num_labels=num_labels)
    # The two sums are rounded differently, so a large one may leave less than 0 negatives.
    negatives = kept - count
    return count, jnp.where(negatives < 0, 0, negatives)


def _check_known(name: str, labels: Any, where: Any) -> None:
    """Refuses labels outside [0, 1], such as ids, unless they are traced.

    A loss leaves that to `checked`, because it runs in every step. This runs once.
    """
    if jnp.issubdtype(jnp.result_type(labels), jnp.bool_):
        return
    extremes = _extremes(labels, where)
    if isinstance(extremes[0], jax.core.Tracer):
        return
    for value in jax.device_get(extremes):
        if not 0 <= value <= 1:
            raise ValueError(
                f"{name}: labels must be in [0, 1], got {value}; label ids are positives=..., what "
                "is unknown is left out by where, and jax.numpy.clip mends what is rounded"
            )


@_placement.compiled(result=_placement.replicated, results=2)
def _extremes(labels: Any, where: Any) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest of the labels that are kept."""
    labels = labels if where is None else jnp.where(where, labels, 0)
    return jnp.min(labels, initial=0), jnp.max(labels, initial=0)


@_placement.compiled(result=_placement.by_label, results=2)
def _dense_counts(labels: Any, where: Any, *, name: str) -> tuple[jax.Array, jax.Array]:
    labels = _ids.check_labels(name, labels)
    where = _checks.mask(name, where, "labels", labels.shape)
    dtype = _math.accumulator(labels)
    # Summed in int32: a float32 stops counting at 2^24 when ones are added to it.
    labels = labels.astype(dtype if jnp.issubdtype(labels.dtype, jnp.floating) else jnp.int32)
    masked = labels if where is None else jnp.where(where, labels, 0)
    _checks.check_unit_interval(name, "labels", masked)
    count = jnp.sum(masked, axis=tuple(range(labels.ndim - 1)))
    return count.astype(dtype), _kept_per_label(where, labels.shape, dtype)


@_placement.compiled(result=_placement.replicated, results=2)
def _sparse_counts(
    positives: Any, where: Any, ignored: Any, *, name: str, num_labels: int
) -> tuple[jax.Array, jax.Array]:
    shape = (*jnp.shape(positives)[:-1], num_labels)
    where = _checks.mask(name, where, "multi-hot labels", shape)
    rows = None if where is None else jnp.any(where, axis=-1)
    ids = _ids.checked_ids(name, positives, num_labels, keep=rows)
    kept = _kept_per_label(where, shape, jnp.float32)
    if ignored is None:
        return _rows_with(ids, where, num_labels).astype(jnp.float32), kept
    rows_of = ("positives", ids.shape)
    left_out = _ids.checked_ids(name, ignored, num_labels, argument="ignored", rows_of=rows_of)
    either = jnp.concatenate([ids, left_out], axis=-1)
    out = _rows_with(left_out, where, num_labels)
    count = _rows_with(either, where, num_labels) - out
    return count.astype(jnp.float32), kept - out.astype(jnp.float32)


def _rows_with(ids: jax.Array, where: Any, num_labels: int) -> jax.Array:
    """For each label the number of rows whose `ids` have it, where it is kept."""
    ids, counts = _reduce.once_each(ids, where)
    ids = jnp.where(counts, ids, num_labels)
    # Ones are added one after another: a float32 would stop at 2^24, a uint32 at 2^32.
    return jnp.zeros(num_labels, jnp.uint32).at[ids].add(1, mode="drop")


def _kept_per_label(where: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """How many elements of each label `where`, of the rank of `shape`, keeps."""
    if where is None:
        where = jnp.ones((1,) * len(shape), bool)
    rows = tuple(range(len(shape) - 1))
    kept = _reduce.count_true(where, rows, dtype) * _reduce.repeats(where.shape, shape, rows, dtype)
    return jnp.broadcast_to(kept.reshape(-1), shape[-1:])
