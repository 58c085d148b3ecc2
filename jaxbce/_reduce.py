"""Weight, where and reduction: the one place where a divisor is defined."""

import math
from typing import Any

import jax
import jax.numpy as jnp

REDUCTIONS = ("mean", "sum", "batchmean", "none")


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


def reduce_loss(
    loss: jax.Array,
    weight: jax.Array | None,
    keep: jax.Array | None,
    where: jax.Array | None,
    reduction: str,
) -> jax.Array:
    """`loss`, weighted, without what is not kept, reduced.

    mean = Σ loss / number of elements where `where` holds; batchmean = Σ loss / number of rows with
    such an element. The weight is in no divisor, and a divisor of 0 counts as 1.
    """
    if weight is not None:
        loss = loss * weight
    per_row = reduction == "batchmean"
    units = loss.shape[:-1] if per_row else loss.shape
    divided = reduction in ("mean", "batchmean")
    if where is not None and divided:
        # Before the sum: dividing it afterwards would cost another pass over memory, because the
        # divisor would then be unknown when the gradient can be computed with the loss.
        loss = loss * (1 / jnp.maximum(count_kept(where, units, per_row, loss.dtype), 1))
    if keep is not None:
        loss = jnp.where(keep, loss, 0)
    if reduction == "none":
        return loss
    total = jnp.sum(loss)
    if where is None and divided:
        return total / as_float(max(math.prod(units), 1), loss.dtype)
    return total


def count_kept(
    where: jax.Array, units: tuple[int, ...], per_row: bool, dtype: jnp.dtype
) -> jax.Array:
    """How many of the `units` that `where` stands for it keeps, without broadcasting it."""
    if per_row and where.ndim:
        where = jnp.any(where, axis=-1)
    repeats = [size for own, size in zip(where.shape, units, strict=True) if own != size]
    return count_true(where, dtype) * as_float(math.prod(repeats), dtype)


def count_true(where: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The number of True elements, of which there may be more than an int32 counts."""
    if isinstance(where.size, int) and where.size <= 2**24:
        # Exact in float32, and of int8 it needs no copy of the mask on a CPU.
        return jnp.sum(where.astype(jnp.int8), dtype=jnp.float32).astype(dtype)
    return jnp.sum(jnp.sum(where, axis=-1, dtype=jnp.int32).astype(dtype))
