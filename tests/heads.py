"""The chunked head and its derivatives by name of argument, for one device and for a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbce

every_order = pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse"])


def draw_arguments(rng, rows, width, num_labels, dtype, dense):
    """Arguments by name; the labels only if `dense`."""
    drawn = {
        "features": rng.normal(size=(rows, width)),
        "kernel": rng.normal(size=(width, num_labels)),
        "bias": rng.normal(size=num_labels),
        "weight": rng.uniform(0.5, 2, rows),
        "pos_weight": rng.uniform(0.5, 2, num_labels),
        "label_smoothing": np.float64(0.1),
    }
    if dense:
        drawn["labels"] = rng.random((rows, num_labels))
    return {name: jnp.asarray(value, dtype) for name, value in drawn.items()}


def head(arguments, **options):
    arguments = dict(arguments)
    layer = [arguments.pop(name, None) for name in ("features", "kernel", "bias")]
    return jaxbce.linear_bce_with_logits(*layer, **arguments, **options)


def value_and_gradients(loss, arguments, cotangent=1.0):
    """In every float argument."""
    moving = {n: v for n, v in arguments.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    fixed = {n: v for n, v in arguments.items() if n not in moving}

    @jax.jit
    def evaluate(moving):
        value, pullback = jax.vjp(lambda moving: loss(moving | fixed), moving)
        g = jnp.broadcast_to(jnp.asarray(cotangent, value.dtype), value.shape)
        return value, pullback(g)[0]

    return evaluate(moving)


def hessian_vector_product(total, point, along, order):
    """Of the scalar function `total`, by one of the orders of `every_order`."""
    if order == "forward over reverse":
        return jax.jit(lambda p, t: jax.jvp(jax.grad(total), (p,), (t,))[1])(point, along)

    def slope(point):
        terms = jax.tree.map(jnp.vdot, jax.grad(total)(point), along)
        return sum(jax.tree.leaves(terms))

    return jax.jit(jax.grad(slope))(point)


def assert_close(got, expected, rtol=1e-5):
    """Relative to the norm of each array."""

    def close(path, got, expected):
        name = jax.tree_util.keystr(path)
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        assert got.shape == expected.shape, f"{name}: shape {got.shape}, not {expected.shape}"
        error, size = np.linalg.norm(got - expected), np.linalg.norm(expected)
        assert error <= rtol * size, f"{name}: error {error:.3g} of {size:.3g}, bound {rtol:.3g}"

    jax.tree.map_with_path(close, got, expected)
