"""Weight, where and reduction: the one place where a divisor is defined, the head's too.

An element, or a row of the head, is *kept* where no mask leaves it out. It is *counted* where its
weight is not 0 either. It is *dropped* where its weight is 0 and its loss or a slope may not be
finite. It *enters* the loss where it is kept and not dropped.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxbce import _math

ScalarReduction = Literal["mean", "weighted_mean", "sum", "batchmean"]
Reduction = Literal[ScalarReduction, "none"]


def counted(weight: jax.Array | None, where: jax.Array | None) -> jax.Array | None:
    """Where an element is neither masked nor of weight 0; None for everywhere."""
    if weight is None:
        return where
    return weight != 0 if where is None else (weight != 0) & where


def enters(size: jax.Array, weight: jax.Array | None, where: jax.Array | None) -> jax.Array | None:
    """Where an element enters the loss; None for everywhere.

    It does not where it is masked. Nor does it where its weight is 0 and its `size`, a bound for
    loss and slopes, is not finite: then it is dropped, from the loss and from every gradient.
    """
    if weight is None:
        return where
    keep = (weight != 0) | jnp.isfinite(size)
    return keep if where is None else keep & where


def one_over(size: Any, dtype: Any) -> jax.Array:
    """1 / a number of elements, of which 0 counts as 1; exact to a rounding where it is an int."""
    size = max(size, 1)
    return jnp.asarray(1 / size, dtype) if isinstance(size, int) else inverse(as_float(size, dtype))


def as_float(size: Any, dtype: Any) -> jax.Array:
    """A number of elements: as an int it may overflow, or be symbolic (`jax.export`)."""
    return jnp.asarray(float(size) if isinstance(size, int) else size, dtype)


def reduce_loss(
    loss: jax.Array,
    weight: jax.Array | None,
    keep: jax.Array | None,
    where: jax.Array | None,
    reduction: Reduction,
    axes: tuple[int, ...],
) -> jax.Array:
    """`loss`, already weighted, without what `keep` leaves out, reduced over `axes`.

    `where` is the mask of the user, which the divisor counts. `keep` also leaves out what a weight
    of 0 drops, which the divisor still counts.

    mean = Σ loss / number of elements where `where` holds; weighted_mean = Σ loss / Σ w over the
    same elements; batchmean = Σ loss / number of entries of the first axis with such an element.
    `weight` and `where` have the axes of the loss, of size 1 where they are broadcast.
    """
    if reduction == "batchmean":
        if where is not None:
            where = count_true(where, axes[1:], loss.dtype) != 0
        counted_axes = axes[:1]
    else:
        counted_axes = axes
    divided = reduction not in ("sum", "none")
    sizes: list[Any] = []
    # A divisor that depends on arrays comes before the sum. Dividing afterwards would cost another
    # pass over memory: it would be unknown when the gradient can be computed with the loss.
    if reduction == "weighted_mean" and weight is not None:
        loss = over_total(loss, total_of(weight, where, loss.shape, counted_axes))
    elif divided and where is not None:
        count = count_true(where, counted_axes, loss.dtype)
        loss = loss * inverse(count * repeats(where.shape, loss.shape, counted_axes, loss.dtype))
    elif divided:
        sizes = [loss.shape[axis] for axis in counted_axes]
    if keep is not None:
        loss = jnp.where(keep, loss, 0)
    if reduction == "none":
        return loss
    return jnp.sum(loss, axes) * one_over(math.prod(sizes), loss.dtype)


def inverse(total: jax.Array) -> jax.Array:
    """1 / total, and 0 for a total of 0: of nothing, the mean is 0."""
    nothing = total == 0
    one = jnp.ones_like(total)
    return jnp.where(nothing, 0, _math.quotient(one, jnp.where(nothing, one, total)))


def over_total(values: jax.Array, total: jax.Array) -> jax.Array:
    """values / total, or 0 for a total of 0.

    In two steps, each a division by about the root of the total. In one step the gradient would
    hold total², which overflows.
    """
    root = jax.lax.stop_gradient(inverse(jnp.sqrt(jnp.abs(total))))
    return values * root * inverse(total * root)


def repeats(own: Any, shape: Any, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """How often an array of the shape `own` is repeated over `axes`, broadcast to `shape`."""
    return as_float(math.prod(shape[axis] for axis in axes if own[axis] != shape[axis]), dtype)


def total_of(
    weight: jax.Array, where: jax.Array | None, shape: Any, axes: tuple[int, ...]
) -> jax.Array:
    """Σ w where the mask holds, over `axes` of `shape`, without broadcasting both to that."""
    if where is not None:
        joint = jnp.broadcast_shapes(weight.shape, where.shape)
        weight = jnp.where(jnp.broadcast_to(where, joint), jnp.broadcast_to(weight, joint), 0)
    total = jnp.sum(weight, axes, keepdims=True)
    return total * repeats(weight.shape, shape, axes, weight.dtype)


def count_true(where: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """The number of True elements, of which there may be more than an int32 counts."""
    size = math.prod(where.shape[axis] for axis in axes)
    if isinstance(size, int) and size <= 2**24:
        # Up to 2^24 a float32 counts exactly. From int8 a CPU needs no copy of the mask.
        ones = where.astype(jnp.int8)
        return jnp.sum(ones, axes, dtype=jnp.float32, keepdims=True).astype(dtype)
    ones = jnp.sum(where, axes[-1], dtype=jnp.int32, keepdims=True)
    return jnp.sum(ones.astype(dtype), axes[:-1], keepdims=True)


# The divisors of the head. It never holds all losses, so it counts rows and labels.


def num_kept(
    where: jax.Array | None, ignored: jax.Array | None, batch: int, num_labels: int, dtype: Any
) -> jax.Array | None:
    """How many labels of each row are kept, [batch]; None for all of all rows."""
    if where is None and ignored is None:
        return None
    if where is None:
        where = jnp.ones((1, 1), bool)
    kept = count_true(where, (1,), dtype)[:, 0]
    kept *= repeats(where.shape, (batch, num_labels), (1,), dtype)
    if ignored is None:
        return jnp.broadcast_to(kept, batch)
    ids, counts = once_each(ignored, where)
    return kept - jnp.sum(counts & (ids < num_labels), axis=1, dtype=dtype)


def once_each(ids: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The ids of each row, sorted, and which of them count: no duplicate, nor what is masked."""
    ids = jnp.sort(ids, axis=-1)
    counts = jnp.diff(ids, axis=-1, prepend=-1) != 0
    if where is not None:
        # `where` is read in its own shape. Broadcast, it would be as large as the dense labels.
        at = jnp.zeros_like(ids) if where.shape[-1] == 1 else ids
        counts &= jnp.take_along_axis(where, at, axis=-1, mode="fill", fill_value=False)
    return ids, counts


def row_factor(
    weight: jax.Array | None,
    kept: jax.Array | None,
    lead: tuple[int, ...],
    num_labels: int,
    dtype: Any,
    reduction: Reduction,
) -> jax.Array:
    """The factor of each row in the total: its weight over the divisor of the reduction."""
    batch = math.prod(lead)
    factor = own = jnp.ones(batch, dtype) if weight is None else weight
    if kept is None:
        sizes = {"mean": (batch, num_labels), "weighted_mean": (num_labels,), "batchmean": lead[:1]}
        for size in sizes.get(reduction, ()):
            factor = factor * one_over(size, dtype)
    elif reduction == "mean":
        factor = factor * inverse(jnp.sum(kept))
    elif reduction == "batchmean":
        entries = jnp.any(kept.reshape(lead) != 0, axis=tuple(range(1, len(lead))))
        factor = factor * inverse(jnp.sum(entries, dtype=dtype))
    if reduction == "weighted_mean":
        factor = over_total(factor, jnp.sum(own if kept is None else own * kept))
    return factor
