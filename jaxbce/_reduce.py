"""Weight, where and reduction: the one place where a divisor is defined."""

import math

import jax
import jax.numpy as jnp

REDUCTIONS = ("mean", "sum", "batchmean", "none")


def kept(values: jax.Array, weight: jax.Array | None, where: jax.Array | None) -> jax.Array | None:
    """Where an element enters the loss; None for everywhere.

    It does not where it is masked, nor where a weight of 0 meets an infinite or NaN value: the zero
    annihilates it, in the loss and in every gradient.
    """
    if weight is None:
        return where
    keep = (weight != 0) | jnp.isfinite(values)
    return keep if where is None else keep & where


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
    if keep is not None:
        loss = jnp.where(keep, loss, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return jnp.sum(loss)
    per_row = reduction == "batchmean"
    units = loss.shape[:-1] if per_row else loss.shape
    if where is None:
        return jnp.sum(loss) / max(math.prod(units), 1)
    # Inside the sum: dividing it afterwards would cost another pass over memory, because the
    # divisor would then be unknown when the gradient can be computed with the loss.
    return jnp.sum(loss * (1 / jnp.maximum(count_kept(where, units, per_row, loss.dtype), 1)))


def count_kept(
    where: jax.Array, units: tuple[int, ...], per_row: bool, dtype: jnp.dtype
) -> jax.Array:
    """How many of the `units` that `where` stands for it keeps, without broadcasting it."""
    if per_row and where.ndim:
        where = jnp.any(where, axis=-1)
    # int32 is exact where it cannot overflow; a float sum of fewer could stall at 2^24.
    exact = where.size < 2**31
    count = jnp.sum(where, dtype=jnp.int32 if exact else jnp.float32)
    return count.astype(dtype) * (math.prod(units) // max(where.size, 1))
