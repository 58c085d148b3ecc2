"""Parameters and state in narrow dtypes: what a step makes of them, rounded back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What `round_with` knows. Some of the other formats write NaN as the negative 0.
ROUNDED = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def check(name: str, key: Any, params: Any, opt_state: Any) -> None:
    """That the state holds its numbers, and that there is something to round with a key."""
    if short := [leaf for leaf in jax.tree.leaves(opt_state) if is_float_below(leaf, 16)]:
        raise TypeError(
            f"{name}: opt_state must be of 16 bits or more, got {jax.typeof(short[0]).dtype}, in "
            "which most moments are 0; make it with optimizer.init of parameters in float32, "
            "jax.tree.map(lambda array: array.astype(jax.numpy.float32), params); an nnx.Optimizer "
            "takes a transformation whose init does so"
        )
    leaves = jax.tree.leaves((params, opt_state))
    if key is not None and not any(is_float_below(leaf, 32) for leaf in leaves):
        raise ValueError(
            f"{name}: rounding_key is for parameters or state of less than 32 bits, got "
            f"{params['kernel'].dtype} and no such state; leave it out"
        )
    try:
        jax.eval_shape(key_of, key, 0)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: rounding_key must be one key of jax.random, got {type(key).__name__}"
            f"{getattr(key, 'shape', '')}; make one for each step, by jax.random.fold_in(key, step)"
            " or by rngs.params() of an nnx.Rngs"
        ) from error


def is_float_below(array: Any, bits: int) -> bool:
    """Whether an array is of floats of less than so many bits."""
    dtype = jax.typeof(array).dtype
    return jnp.issubdtype(dtype, jnp.floating) and 8 * dtype.itemsize < bits


def key_of(key: jax.Array | None, i: jax.Array | int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, i)


def rounded(new: Any, old: Any, key: jax.Array | None) -> Any:
    """The arrays `new` in the dtypes of `old`: with a key at random, else to the nearest."""

    def one(i: int, values: jax.Array, like: jax.Array) -> jax.Array:
        floating = [jnp.issubdtype(each.dtype, jnp.floating) for each in (values, like)]
        if floating == [True, False]:
            raise ValueError(
                f"linear_update: optimizer turns state of {like.dtype} into {values.dtype}, whose "
                f"fractions each step would lose; let its init make {values.dtype}"
            )
        if key is None or not is_float_below(like, 32):
            return values.astype(like.dtype)
        if like.dtype.name not in ROUNDED:
            raise TypeError(
                f"linear_update: rounding_key rounds to {', '.join(ROUNDED)}, got parameters or "
                f"state in {like.dtype}; use one of these"
            )
        if values.dtype == like.dtype and values.ndim:
            raise ValueError(
                f"linear_update: rounding_key cannot round state that the optimizer itself rounds "
                f"to {like.dtype}, as with mu_dtype or accumulator_dtype; leave that option out, "
                f"and make the state of parameters in {like.dtype}"
            )
        # A bfloat16 is the upper half of a float32. Of the other formats any number of bits is cut
        # off, because their exponents are shorter.
        bits = jnp.uint16 if like.dtype == jnp.bfloat16 else jnp.uint32
        noise = jax.random.bits(jax.random.fold_in(key, i), values.shape, bits)
        return round_with(noise, values, like.dtype)

    leaves = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return jax.tree.unflatten(
        jax.tree.structure(old), [one(i, *pair) for i, pair in enumerate(leaves)]
    )


def round_with(noise: jax.Array, values: jax.Array, dtype: Any) -> jax.Array:
    """`values` rounded to a narrow dtype at random, so that the mean of the results is exact.

    Written as whole numbers: a float32 is `significand` units, and `dtype` lacks the last `cut`
    bits of it. So many random bits are added, and then dropped. The sum carries into what is kept
    with probability (dropped bits) / 2^cut.
    """
    info = jnp.finfo(dtype)
    unsigned = jnp.dtype(f"uint{info.bits}")
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    magnitude = bits & 0x7FFFFFFF
    # Subnormal numbers have the exponent of the smallest normal one, and no leading bit.
    exponent = jnp.maximum(magnitude >> 23, 1)
    significand = magnitude - ((exponent - 1) << 23)
    least = max(127 + int(info.minexp), 1)
    new_exponent = jnp.maximum(exponent, least)
    cut = 23 - info.nmant + new_exponent - exponent
    # With more than 31 bits to cut, the number is below 2^-8 of the smallest one. It is shifted
    # first, so that 31 random bits decide: the probability is then exact to 2^-31.
    significand >>= jnp.clip(cut, 31, 62) - 31
    cut = jnp.minimum(cut, 31)
    noise = noise.astype(jnp.uint32) >> (jnp.iinfo(noise.dtype).bits - cut)
    code = ((significand + noise) >> cut) + ((new_exponent - least) << info.nmant)
    largest = int(np.asarray(info.max, dtype).view(unsigned))
    code = jnp.minimum(code, largest) | (bits >> 31 << (info.bits - 1))
    rounded = jax.lax.bitcast_convert_type(code.astype(unsigned), dtype)
    return jnp.where(jnp.isfinite(values), rounded, values.astype(dtype))


def with_bits(array: jax.Array, dtype: Any) -> jax.Array:
    """The same bits, read as `dtype`."""
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)


def as_bits(array: jax.Array) -> jax.Array:
    """An array of float8 as whole numbers."""
    return with_bits(array, jnp.uint8) if is_float_below(array, 16) else array
