"""A function of the user's, read as the program that JAX traces of it.

A function is known to `jax.jit` by its name alone: what it reads from an object may have changed
since it was traced. Its program holds all numbers, so equal programs do the same.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Operations that only run another program, which is read too.
CALLING = (
    "call_hi_primitive",
    "closed_call",
    "cond",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "remat2",
)


class Equation(NamedTuple):
    """One operation of a traced program, with all that a caller can tell of it."""

    primitive: str
    meaning: tuple[Any, ...]  # the same for any number of labels: wiring, numbers, options, dtypes
    axes: tuple[int, ...]  # of a reduction or a broadcast
    operands: tuple[tuple[int, ...], ...]  # their shapes
    results: tuple[tuple[int, ...], ...]


def of_loss(
    name: str, loss: Callable[..., jax.Array], arguments: Sequence[Any], remedy: str
) -> tuple[Equation, ...]:
    """The program of a user's loss, which must return one number per logit."""
    # A new function: of one that it knows, JAX returns the program with the numbers of that time.
    traced = jax.make_jaxpr(lambda *arrays: loss(*arrays))(*arguments)
    shapes, expected = [result.shape for result in traced.out_avals], arguments[0].shape
    if shapes != [expected]:
        raise ValueError(
            f"{name}: loss must return one number per logit, of shape {expected} for logits of "
            f"that shape, got {shapes[0] if len(shapes) == 1 else shapes}; a loss of jaxbce takes "
            'reduction="none"'
        )
    if not jnp.issubdtype(traced.out_avals[0].dtype, jnp.floating):
        raise TypeError(f"{name}: loss must return floats, got {traced.out_avals[0].dtype}")
    return read(
        traced,
        f"{name}: loss must hold no traced value, of which it would lose the gradient; {remedy}",
    )


def read(traced: Any, if_traced: str) -> tuple[Equation, ...]:
    """The operations of a program; `if_traced` is the error where it holds a traced value."""
    # Numbers are read now, while a program is traced, and whatever its settings say of transfers.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        return tuple(_equations(traced, if_traced))


def _equations(traced: Any, if_traced: str) -> Iterator[Equation]:
    """The operations of a program and of those inside it, between their inputs and outputs."""
    jaxpr, numbers = getattr(traced, "jaxpr", traced), dict[Any, int]()

    def described(variable: Any) -> tuple[Any, ...]:
        if hasattr(variable, "val"):
            return _number(if_traced, variable.val)
        place = numbers.setdefault(variable, len(numbers))
        return place, variable.aval.dtype, variable.aval.ndim

    def equation(
        primitive: str, operands: Sequence[Any], results: Sequence[Any], **options: Any
    ) -> Equation:
        axes = (options.get(key) for key in ("axes", "dimensions", "broadcast_dimensions"))
        return Equation(
            primitive,
            (*map(described, (*operands, *results)), *filter(_is_plain, options.items())),
            next(filter(None, axes), ()),
            tuple(each.aval.shape for each in operands),
            tuple(each.aval.shape for each in results),
        )

    constants = [_number(if_traced, value) for value in getattr(traced, "consts", ())]
    yield equation("constants", (), jaxpr.constvars, values=tuple(constants))
    yield equation("inputs", (), jaxpr.invars)
    for each in jaxpr.eqns:
        primitive = each.primitive.name
        inner = _inner_programs([*each.params.values()])
        if inner and primitive in CALLING:
            yield equation("call", each.invars, each.outvars, of=primitive)
        else:
            yield equation(primitive, each.invars, each.outvars, **each.params)
        for program in inner:
            yield from _inner_equations(program, if_traced)
    yield equation("outputs", jaxpr.outvars, ())


@functools.lru_cache(maxsize=256)
def _inner_equations(program: Any, if_traced: str) -> tuple[Equation, ...]:
    """Of a program inside another, which JAX keeps and returns again."""
    return tuple(_equations(program, if_traced))


def _inner_programs(options: Any) -> list[Any]:
    """Those that the options of an operation hold, by themselves or, in newer JAX, traced."""
    leaves = [getattr(leaf, "traced", leaf) for leaf in jax.tree.leaves(options)]
    programs = [leaf.jaxpr if isinstance(leaf, jax.stages.Traced) else leaf for leaf in leaves]
    return [each for each in programs if hasattr(getattr(each, "jaxpr", each), "eqns")]


def _is_plain(option: tuple[str, Any]) -> bool:
    """Whether an option of an operation says more than shapes and the programs inside it do.

    A function says how to differentiate, or is a callback, which finds its numbers when it runs.
    """
    key, value = option
    plain = isinstance(value, Hashable) and not callable(value) and not _inner_programs(value)
    return plain and key not in ("shape", "new_sizes")


def _number(if_traced: str, value: Any) -> tuple[Any, ...]:
    """A number or an array in a program, such that equal ones compare equal."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(if_traced)
    if jnp.issubdtype(jax.typeof(value).dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return array.dtype, array.shape, array.tobytes()
