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
    return total / max(math.prod(units), 1) if where is None and divided else total


def count_kept(
    where: jax.Array, units: tuple[int, ...], per_row: bool, dtype: jnp.dtype
) -> jax.Array:
    """How many of the `units` that `where` stands for it keeps, without broadcasting it."""
    if per_row and where.ndim:
        where = jnp.any(where, axis=-1)
    # float32 is exact up to 2^24 and, of int8, needs no copy of the mask on a CPU; int32 overflows.
    counter = jnp.int32 if 2**24 < where.size < 2**31 else jnp.float32
    count = jnp.sum(where.astype(jnp.int8), dtype=counter)
    return count.astype(dtype) * (math.prod(units) // max(where.size, 1))
