"""Elementwise mathematics: scalar functions, the rules of their derivatives, their dtypes.

Every function takes scalars, and `over` maps it over arrays. A function is a pair: its value
`<op>_value` and its derivatives, one for each argument. `with_jvp` makes of the pair a function
that JAX differentiates to any order, in forward and reverse mode. `rematerialised` makes a loss of
such functions: it has reverse mode only, and stores nothing but its inputs for the backward pass.

At 0 the derivatives of `abs` and `max` are conventions. So no derivative of a function of logits
comes from them: it is a rule that is right at logit 0, in both tails and at every order.

A coefficient of 0 gives 0, also times infinity.

In float32 additions and multiplications are exact to half a unit. Two operations are not: `exp` and
`quotient`. Each is defined once, so a bound for the error of the two is a bound for the losses that
are made of them, on every backend. `log` and `log1p` serve elsewhere: for probabilities, for powers
with a fraction in the exponent, far above the kink of the asymmetric loss, and in float64.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

HIGHEST = lax.AccuracyMode.HIGHEST
WHOLE = range(9)  # exponents of powers that are multiplied out, to a few ULP

ScalarFn = Callable[..., jax.Array]
Partials = Callable[..., tuple[jax.Array | None, ...]]


def along(tangents: Any, slopes: Any, like: jax.Array) -> jax.Array:
    """Σ tangent · slope, without what is constant or has no derivative."""
    # Constants are known while tracing. To compare the value of a tangent with 0 would break the
    # transposition that makes reverse mode.
    terms = [
        tangent * slope
        for tangent, slope in zip(tangents, slopes, strict=True)
        if slope is not None and not isinstance(tangent, SymbolicZero)
    ]
    # No term is left where the result depends on nothing that is differentiated.
    return functools.reduce(operator.add, terms) if terms else jnp.zeros_like(like)


def with_jvp(value: ScalarFn, partials: Partials) -> ScalarFn:
    """`value` with `partials` as its derivatives, in forward and reverse mode."""
    # The jit is there for its cache: the scalar is traced once, whatever it is mapped over. With
    # `inline` no call of it is left in the program.
    kernel = jax.custom_jvp(jax.jit(value, inline=True))

    def jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        result = kernel(*primals)
        return result, along(tangents, partials(*primals), result)

    kernel.defjvp(jvp, symbolic_zeros=True)
    return kernel


def rematerialised(fn: ScalarFn, hide: ScalarFn | None = None) -> ScalarFn:
    """`fn` for reverse mode only, storing nothing but its inputs.

    The backward pass computes `fn` again. `hide` returns its argument, but XLA cannot tell. Without
    it XLA may merge the two computations, and write to memory what they share.
    """
    kernel = jax.custom_vjp(fn)

    def fwd(*inputs: jax.Array | None) -> tuple[jax.Array, Any]:
        # Not `kernel`: a decorated function in its own forward rule breaks `jax.hessian`.
        return fn(*inputs), inputs

    def bwd(inputs: Any, g: jax.Array) -> Any:
        x, *others = inputs
        return jax.vjp(fn, hide(x) if hide else x, *others)[1](g)

    kernel.defvjp(fwd, bwd)
    return kernel


def accumulator(*arrays: Any) -> Any:
    """The dtype in which what comes of `arrays` is computed and summed, and that of the loss."""
    wide = any(getattr(array, "dtype", None) == jnp.float64 for array in arrays)
    # NumPy's float64 is float32 in JAX unless jax_enable_x64 is set.
    return jax.dtypes.canonicalize_dtype(jnp.float64 if wide else jnp.float32)


def multiplied_in(dtype: Any) -> Any:
    """The dtype in which numbers of `dtype` are multiplied: bfloat16 for those of 8 bits."""
    return jnp.dtype(jnp.bfloat16 if jnp.dtype(dtype).itemsize == 1 else dtype)


def over(kernel: ScalarFn, ndim: int) -> ScalarFn:
    """`kernel` mapped over `ndim` axes of its inputs."""
    for _ in range(ndim):
        kernel = jax.vmap(kernel)
    return kernel


def multiply_no_nan_value(coefficient: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(coefficient == 0, 0, coefficient * value)


# multiply_no_nan(coefficient, value) = coefficient · value, and 0 where the coefficient is 0
multiply_no_nan = with_jvp(multiply_no_nan_value, lambda coefficient, value: (value, coefficient))

# multiply_saturated(a, b) = multiply_no_nan(a, b), but where b is infinite the slope by a is 0 and
# not infinite. In a loss b is infinite only at an infinite logit. There a, a power of a sigmoid, is
# constant.
multiply_saturated = with_jvp(
    multiply_no_nan_value, lambda a, b: (jnp.where(jnp.isinf(b), 0, b), a)
)


def exp(x: jax.Array) -> jax.Array:
    """e^x to 2 ULP; JAX's default is up to 116 ULP off on a TPU v5e."""
    return lax.exp(x, accuracy=HIGHEST)


def log(x: jax.Array) -> jax.Array:
    return lax.log(x, accuracy=HIGHEST)


def corrected_quotient(n: jax.Array, d: jax.Array) -> jax.Array:
    q = n / d
    # n - q d is small and nearly exact, so only the last sum is rounded.
    correction = (n - q * d) / d
    # The correction is tested and not the sum: XLA on a GPU may write to memory what is read twice.
    return q + jnp.where(jnp.isfinite(correction), correction, 0)


def quotient(n: jax.Array, d: jax.Array) -> jax.Array:
    """n / d to about 1 ULP where the device divides to 12 bits; a CPU's is correctly rounded."""
    n, d = jnp.broadcast_arrays(n, d)
    return lax.platform_dependent(n, d, cpu=lax.div, default=corrected_quotient)


def reciprocal_value(d: jax.Array) -> jax.Array:
    return quotient(jnp.ones_like(d), d)


# 1 / d, with the derivative -1 / d²
reciprocal: ScalarFn = with_jvp(reciprocal_value, lambda d: (-lax.square(reciprocal(d)),))


# softplus_mix(x, a, b) = a softplus(x) + b softplus(-x)
# sigmoid_mix(x, a, b)  = a sigmoid(x) - b sigmoid(-x)     is its derivative with respect to x.
#
# With t = exp(-|x|), softplus(±x) = max(±x, 0) + log1p(t) and sigmoid(-|x|) = t / (1 + t), so one
# exponential serves both signs and a small sigmoid is never the difference of two large numbers.


def log1p_series(z: jax.Array) -> jax.Array:
    """2 / 3 + 2 z / 5 + ..., of which `log1p_unit` is made: `benchmarks/minimax.py`, to 4.5e-9."""
    return ((0.280119862 * z + 0.280018054) * z + 0.400215272) * z + 0.666664163


def log1p_unit(t: jax.Array) -> jax.Array:
    """log(1 + t) for t in [0, 1], in float32 to 1 ULP."""
    if t.dtype != jnp.float32:
        return lax.log1p(t, accuracy=HIGHEST)
    # XLA's log1p on a CPU is 2 ULP off, because it takes the logarithm of the rounded 1 + t. With
    # s = t / (2 + t), log(1 + t) = 2 atanh(s) = 2 s + 2 s³ / 3 + ..., and 2 s = t - s t. Here only
    # small corrections to t are rounded. The minimum changes no number: without it XLA on a CPU
    # writes the quotient to memory, because it is used twice.
    s = jnp.minimum(quotient(t, 2 + t), 1)
    z = s * s
    return t - s * (t - z * log1p_series(z))


def linear_and_curved(x: jax.Array, slope: jax.Array, curvature: jax.Array | float) -> jax.Array:
    """|x| slope + curvature log1p(exp(-|x|)), and no first term where the slope is 0.

    The select comes last: XLA on a CPU then computes a loss in one loop. A sum that ends in
    arithmetic it hands to a library, and writes to memory all that this library lacks.
    """
    magnitude = jnp.abs(x)
    curved = curvature * log1p_unit(exp(-magnitude))
    return jnp.where(slope == 0, curved, magnitude * slope + curved)


def sigmoid_tail(x: jax.Array) -> jax.Array:
    """sigmoid(-|x|), which is at most 1/2."""
    t = exp(-jnp.abs(x))
    # t / (1 + t) = t - t (t / (1 + t)), which multiplies the errors of 1 + t and of / by t.
    return t - t * quotient(t, 1 + t)


def softplus_mix_value(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return linear_and_curved(x, jnp.where(x > 0, a, b), a + b)


softplus_mix = with_jvp(
    softplus_mix_value, lambda x, a, b: (sigmoid_mix(x, a, b), softplus(x), softplus(-x))
)


def softplus_value(x: jax.Array) -> jax.Array:
    curved = log1p_unit(exp(-jnp.abs(x)))
    return jnp.where(x > 0, x + curved, curved)


softplus: ScalarFn = with_jvp(softplus_value, lambda x: (sigmoid(x),))


def sigmoid_mix_value(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    tail = (a + b) * sigmoid_tail(x)
    return jnp.where(x >= 0, a - tail, tail - b)


sigmoid_mix: ScalarFn = with_jvp(
    sigmoid_mix_value, lambda x, a, b: ((a + b) * sigmoid_slope(x), sigmoid(x), -sigmoid(-x))
)


# sigmoid_minus(x, y) = sigmoid(x) - y = sigmoid_mix(x, 1 - y, y), with less arithmetic


def sigmoid_minus_value(x: jax.Array, y: jax.Array) -> jax.Array:
    tail = sigmoid_tail(x)
    return jnp.where(x >= 0, (1 - y) - tail, tail - y)


sigmoid_minus = with_jvp(sigmoid_minus_value, lambda x, y: (sigmoid_slope(x), -jnp.ones_like(x)))


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x))"""
    return sigmoid_minus(x, jnp.zeros_like(x))


# sigmoid'(x) = sigmoid(x) sigmoid(-x), and sigmoid''(x) = -sigmoid'(x) tanh_half(x)


def sigmoid_slope_value(x: jax.Array) -> jax.Array:
    tail = sigmoid_tail(x)
    return tail - tail * tail


sigmoid_slope: ScalarFn = with_jvp(
    sigmoid_slope_value, lambda x: (-sigmoid_slope(x) * tanh_half(x),)
)


# tanh_half(x) = sigmoid(x) - sigmoid(-x) = tanh(x / 2), also right near 0


# n and d with tanh(x / 2) = n / d, for |x| <= 1: the continued fraction x / (2 + x² / (6 + x² /
# (10 + ...))) down to 18, to 1e-10, and for float64 down to 30, to 2e-19


def short_fraction(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    z = x * x
    return x * (15120 + z * (420 + z)), 30240 + z * (3360 + 30 * z)


def long_fraction(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    z = x * x
    n = x * (259459200 + z * (8648640 + z * (55440 + 72 * z)))
    return n, 518918400 + z * (60540480 + z * (831600 + z * (2520 + z)))


def tanh_fraction(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return long_fraction(x) if x.dtype == jnp.float64 else short_fraction(x)


def tanh_half_value(x: jax.Array) -> jax.Array:
    near = quotient(*tanh_fraction(jnp.clip(x, -1, 1)))
    far = 1 - 2 * sigmoid_tail(x)  # which cancels near 0
    return jnp.where(jnp.abs(x) < 1, near, jnp.where(x < 0, -far, far))


tanh_half: ScalarFn = with_jvp(tanh_half_value, lambda x: (2 * sigmoid_slope(x),))


# hidden_identity(x) = x, written so that XLA does not recognise it. Loss and gradient then share no
# term. XLA would write a shared term to memory, and computing it twice is cheaper.


def hidden_identity_value(x: jax.Array) -> jax.Array:
    magnitude = jnp.maximum(x, -x)
    return jnp.where(x < 0, -magnitude, magnitude)


hidden_identity = with_jvp(hidden_identity_value, lambda x: (jnp.ones_like(x),))
