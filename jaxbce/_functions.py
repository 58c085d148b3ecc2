"""Softplus, log-sigmoid and sigmoid of arrays, as in `jax.nn`, with right derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbce import _checks, _math, _placement


def softplus(x: ArrayLike) -> jax.Array:
    """log(1 + eˣ), right in both tails and in every derivative.

    Use it in place of `jax.nn.softplus`, whose second derivative loses its digits.

    Formula: softplus(x) = max(x, 0) + log(1 + e^(−|x|))

    Args:
      x: real array of any shape; integers and bools become float32.

    Returns:
      An array of the shape and dtype of x; half precision is computed in float32 and rounded once.

    Raises:
      TypeError: x is not a real array.

    Edge values: 0 at −∞, ∞ at +∞, with derivatives 0 and 1; NaN gives NaN.

    Differentiable: in forward and reverse mode, to any order; the derivative is sigmoid(x).

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> print(jaxbce.softplus(jnp.array([-20.0, 0.0, 20.0])))
      [2.0611537e-09 6.9314718e-01 2.0000000e+01]

    Source: `jax.nn.softplus`.
    """
    return _apply("softplus", _math.softplus, x)


def log_sigmoid(x: ArrayLike) -> jax.Array:
    """log sigmoid(x), right in both tails and in every derivative.

    Use it in place of `jax.nn.log_sigmoid`, for example for a log-likelihood or, of a difference of
    two scores, for a preference.

    Formula: log_sigmoid(x) = −softplus(−x) = min(x, 0) − log(1 + e^(−|x|))

    Args:
      x: real array of any shape; integers and bools become float32.

    Returns:
      An array of the shape and dtype of x; half precision is computed in float32 and rounded once.

    Raises:
      TypeError: x is not a real array.

    Edge values: −∞ at −∞, 0 at +∞, with derivatives 1 and 0; NaN gives NaN.

    Differentiable: in forward and reverse mode, to any order; the derivative is sigmoid(−x).

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> print(jaxbce.log_sigmoid(jnp.array([-20.0, 0.0, 20.0])))
      [-2.0000000e+01 -6.9314718e-01 -2.0611537e-09]

    Source: `jax.nn.log_sigmoid`.
    """
    return _apply("log_sigmoid", _log_sigmoid, x)


def sigmoid(x: ArrayLike) -> jax.Array:
    """1 / (1 + e⁻ˣ), right in both tails and in every derivative.

    Use it in place of `jax.nn.sigmoid`, whose first derivative loses its digits where x is large.

    Formula: sigmoid(x) = 1 / (1 + e⁻ˣ)

    Args:
      x: real array of any shape; integers and bools become float32.

    Returns:
      An array of the shape and dtype of x; half precision is computed in float32 and rounded once.

    Raises:
      TypeError: x is not a real array.

    Edge values: 0 at −∞, 1 at +∞, with derivative 0 at both; NaN gives NaN.

    Differentiable: in forward and reverse mode, to any order; the derivative is sigmoid(x)
    sigmoid(−x).

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> print(jax.vmap(jax.grad(jaxbce.sigmoid))(jnp.array([-20.0, 0.0, 20.0])))
      [2.0611537e-09 2.5000000e-01 2.0611537e-09]

    Source: `jax.nn.sigmoid`.
    """
    return _apply("sigmoid", _math.sigmoid, x)


def _log_sigmoid(x: jax.Array) -> jax.Array:
    return -_math.softplus(-x)


def _apply(name: str, kernel: _math.ScalarFn, x: ArrayLike) -> jax.Array:
    (admitted,) = _checks.jit_arguments(name, x=x)
    return _mapped(admitted, name=name, kernel=kernel)


@_placement.compiled(result=_placement.as_first)
def _mapped(x: Any, *, name: str, kernel: _math.ScalarFn) -> jax.Array:
    array = _checks.real(name, "x", x)
    dtype = _math.accumulator(array)
    result = _math.over(kernel, array.ndim)(array.astype(dtype))
    return result.astype(array.dtype if jnp.issubdtype(array.dtype, jnp.floating) else dtype)
