"""Programs that combine transformations, with every public function in them, against dense code.

A part may be right and a combination wrong: the same loss differentiated twice for other arguments,
a mask beside a mapped weight, a sharded kernel beside labels on the host.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from composing import CASES, HEADS
from heads import assert_close


@pytest.fixture(autouse=True)
def _nothing_traced():
    """JAX shares what it has traced between programs: each starts with nothing."""
    jax.clear_caches()


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_head = pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)


def scalar(loss):
    """The loss summed with a factor of its own for each element."""

    def total(arguments):
        rows = jnp.ravel(loss(arguments))
        return jnp.vdot(rows, jnp.cos(jnp.arange(rows.size, dtype=rows.dtype)))

    return total


def moving(arguments):
    """The names of what can be differentiated."""
    return [n for n, value in arguments.items() if jnp.issubdtype(value.dtype, jnp.floating)]


def stop(arguments, *names):
    """The arguments with these constant."""
    return arguments | {name: jax.lax.stop_gradient(arguments[name]) for name in names}


def gradient(loss, arguments, names=None):
    """By name."""
    names = moving(arguments) if names is None else names
    part = {name: arguments[name] for name in names}
    return jax.grad(lambda part: loss(arguments | part))(part)


def stack(value):
    return jnp.stack([value, value * 0.75])


# --- programs: (loss, arguments) -> pytree --------------------------------------------------------


def everything(loss, arguments):
    return jax.value_and_grad(lambda part: loss(arguments | part))(
        {name: arguments[name] for name in moving(arguments)}
    )


def each_alone(loss, arguments):
    return {name: gradient(loss, arguments, [name]) for name in moving(arguments)}


def halves(loss, arguments):
    """The same loss twice, with another argument constant each time."""
    first, second = moving(arguments)[:2]

    def both(arguments):
        return loss(stop(arguments, second)) + loss(stop(arguments, first))

    return gradient(both, arguments, [first, second])


def gradient_penalty(loss, arguments):
    first = moving(arguments)[0]

    def penalized(arguments):
        slope = gradient(loss, arguments, [first])[first]
        return loss(arguments) + jnp.sqrt(jnp.sum(slope**2))

    return gradient(penalized, arguments)


def adversarial_example(loss, arguments):
    """The first argument moved along the sign of its gradient, then the loss in the others."""
    first, *others = moving(arguments)

    def attacked(arguments):
        slope = gradient(loss, arguments, [first])[first]
        return loss(arguments | {first: arguments[first] + 0.1 * jnp.sign(slope)})

    return gradient(attacked, arguments, others)


def teacher(loss, arguments):
    """The loss beside that of constant parameters."""

    def distilled(arguments):
        target = loss(stop(arguments, *moving(arguments)))
        return (loss(arguments) - 0.9 * target) ** 2

    return gradient(distilled, arguments)


def vjp_beside_grad(loss, arguments):
    first, second = moving(arguments)[:2]
    value, pullback = jax.vjp(lambda x: loss(arguments | {first: x}), arguments[first])
    return value, pullback(jnp.full_like(value, 2)), gradient(loss, arguments, [second])


def hessian_along(order, loss, arguments):
    """The product of the Hessian with a vector, of all arguments together."""
    point = {name: arguments[name] for name in moving(arguments)}
    along = jax.tree.map(jnp.cos, point)

    def slope(point):
        return gradient(loss, arguments | point, list(point))

    if order == "forward":
        return jax.jvp(slope, (point,), (along,))[1]
    return jax.vjp(slope, point)[1](along)[0]


def mapped(loss, arguments, names):
    axes = {name: 0 if name in names else None for name in arguments}
    stacked = {n: stack(v) if n in names else v for n, v in arguments.items()}
    return jax.vmap(loss, (axes,))(stacked)


def vmap_over_each_alone(loss, arguments):
    """All else is shared."""

    def total(arguments):
        return sum(mapped(loss, arguments, [name]).sum() for name in moving(arguments))

    return gradient(total, arguments)


def vmap_of_gradients(loss, arguments):
    """Over the first argument, the gradient of the others for each."""
    first, *others = moving(arguments)

    def slopes(arguments):
        return gradient(loss, arguments, others)

    return mapped(slopes, arguments, [first])


def vmap_over_all(loss, arguments):
    return mapped(lambda arguments: everything(loss, arguments), arguments, moving(arguments))


def training_loop(loss, arguments):
    """Three steps of gradient descent in a scan."""
    point = {name: arguments[name] for name in moving(arguments)}

    def step(point, rate):
        value, slopes = jax.value_and_grad(lambda p: loss(arguments | p))(point)
        return jax.tree.map(lambda p, slope: p - rate * slope, point, slopes), value

    return jax.lax.scan(step, point, jnp.array([0.01, 0.02, 0.03], jnp.float32))


def scanned(loss, arguments):
    """The gradient through a scan in which an argument of each step is another."""
    first = moving(arguments)[0]

    def total(arguments):
        def step(carry, x):
            return carry + loss(arguments | {first: x}), None

        return jax.lax.scan(step, jnp.zeros((), arguments[first].dtype), stack(arguments[first]))[0]

    return gradient(total, arguments)


def skipped(loss, arguments):
    """The gradient through a branch."""

    def total(arguments):
        return jax.lax.cond(loss(arguments) > -1e6, loss, lambda _: jnp.zeros(()), arguments)

    return gradient(total, arguments)


PROGRAMS = {
    "everything": everything,
    "each argument alone": each_alone,
    "halves": halves,
    "gradient penalty": gradient_penalty,
    "adversarial example": adversarial_example,
    "teacher": teacher,
    "vjp beside grad": vjp_beside_grad,
    "forward over reverse": functools.partial(hessian_along, "forward"),
    "reverse over reverse": functools.partial(hessian_along, "reverse"),
    "vmap over each argument alone": vmap_over_each_alone,
    "vmap of gradients": vmap_of_gradients,
    "vmap over all arguments": vmap_over_all,
    "training loop": training_loop,
    "scan": scanned,
    "cond": skipped,
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@every_case
def test_a_program_gives_what_it_gives_with_dense_code(case, program, rng):
    arguments = case.draw(rng)
    got = jax.jit(functools.partial(program, scalar(case.ours)))(arguments)
    expected = jax.jit(functools.partial(program, scalar(case.dense)))(arguments)
    assert_close(got, expected, 1e-4)
