"""Weight, where and reduction: the one place where a divisor is defined."""

import math
from typing import Any

import jax
import jax.numpy as jnp

REDUCTIONS = ("mean", "weighted_mean", "sum", "batchmean", "none")


def counted(weight: jax.Array | None, where: jax.Array | None) -> jax.Array | None:
    """Where an element is neither masked nor of weight 0; None for everywhere."""
    if weight is None:
        return where
    return weight != 0 if where is None else (weight != 0) & where


def kept(values: jax.Array, weight: jax.Array | None, where: jax.Array | None) -> jax.Array | None:
    """Where an element enters the loss; None for everywhere.

    It does not where it is masked, nor where a weight of 0 meets an infinite or NaN value: the zero
    annihilates it, in the loss and in every gradient.
    """
    if weight is None:
        return where
    keep = (weight != 0) | jnp.isfinite(values)
    return keep if where is None else keep & where


def as_float(size: Any, dtype: Any) -> jax.Array:
    """A number of elements: as an int it may overflow, or be symbolic (`jax.export`)."""
    return jnp.asarray(float(size) if isinstance(size, int) else size, dtype)


def inverse(total: jax.Array) -> jax.Array:
    """1 / total, and 0 for a total of 0: of nothing, the mean is 0."""
    nothing = total == 0
    return jnp.where(nothing, 0, 1 / jnp.where(nothing, 1, total))


def reduce_loss(
    loss: jax.Array,
    weight: jax.Array | None,
    keep: jax.Array | None,
    where: jax.Array | None,
    reduction: str,
    axes: tuple[int, ...] = (),
) -> jax.Array:
    """`loss`, weighted, without what is not kept, reduced over `axes`.

    mean = Σ w · loss / number of elements where `where` holds; weighted_mean = Σ w · loss / Σ w, of
    which the weight is 0 where it is not kept; batchmean = Σ w · loss / number of entries of the
    first axis with an element where `where` holds.
    """
    if weight is not None:
        loss = loss * weight
    counted_axes = axes
    if reduction == "batchmean":
        counted_axes = axes[:1]
        where = None if where is None else jnp.any(where, axis=axes[1:], keepdims=True)
    # A divisor that depends on arrays comes before the sum. Dividing afterwards would cost another
    # pass over memory: it would be unknown when the gradient can be computed with the loss.
    sizes: list[Any] = []
    if reduction == "weighted_mean" and weight is not None:
        loss = loss * inverse(jnp.sum(weight, axes, keepdims=True))
    elif reduction not in ("sum", "none") and where is not None:
        loss = loss * inverse(count_kept(where, loss.shape, counted_axes, loss.dtype))
    elif reduction not in ("sum", "none"):
        sizes = [loss.shape[axis] for axis in counted_axes]
    if keep is not None:
        loss = jnp.where(keep, loss, 0)
    if reduction == "none":
        return loss
    return jnp.sum(loss, axes) / as_float(max(math.prod(sizes), 1), loss.dtype)


def count_kept(
    where: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...], dtype: Any
) -> jax.Array:
    """How many elements of `shape` the mask keeps over `axes`, without broadcasting it to that."""
    repeats = [shape[axis] for axis in axes if where.shape[axis] != shape[axis]]
    return count_true(where, axes, dtype) * as_float(math.prod(repeats), dtype)


def count_true(where: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """The number of True elements, of which there may be more than an int32 counts."""
    size = math.prod(where.shape[axis] for axis in axes)
    if isinstance(size, int) and size <= 2**24:
        # Exact in float32, and of int8 it needs no copy of the mask on a CPU.
        ones = where.astype(jnp.int8)
        return jnp.sum(ones, axes, dtype=jnp.float32, keepdims=True).astype(dtype)
    ones = jnp.sum(where, axes[-1], dtype=jnp.int32, keepdims=True)
    return jnp.sum(ones.astype(dtype), axes[:-1], keepdims=True)
