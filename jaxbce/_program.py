"""A function of the user's, read as the program that JAX traces of it.

A function is known to `jax.jit` by its name alone: what it reads from an object may have changed
since it was traced. Its program holds all numbers, so equal programs do the same.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

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


# Operations that compute each element of their result from the same element of their operands.
ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil clamp convert_element_type copy copy_p cos cosh digamma div
    eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac integer_pow
    is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not one_minus_square
    optimization_barrier or polygamma polynomial pow reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""
# Reductions: their axes are gone in the result. Labels stay apart if theirs is not one of them.
DROPPING = """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum squeeze unstack
"""
# Operations along some axes, which stay in the result. The same holds for labels.
ALONG = "cumlogsumexp cummax cummin cumprod cumsum rev slice sort split"
# What JAX adds or leaves out where an axis has one element. `is_same` ignores these.
SHAPING = "broadcast_in_dim reduce_sum reshape squeeze"
# Those that change something outside of the program.
EFFECTS = ("addupdate", "io_callback", "swap")


class Equation(NamedTuple):
    """One operation of a traced program, with all that a caller can tell of it."""

    primitive: str
    wiring: tuple[Any, ...]  # which values it reads and writes, with their dtypes and ranks
    constants: tuple[Any, ...]  # the numbers in it
    options: tuple[Any, ...]  # its parameters, without shapes
    axes: tuple[int, ...]  # of a reduction, a broadcast or a concatenation
    operands: tuple[tuple[int, ...], ...]  # their shapes
    results: tuple[tuple[int, ...], ...]
    callback: Any  # finds its numbers when it runs: another function is another program

    @property
    def operation(self) -> tuple[Any, ...]:
        """What it computes, without shapes and axes, which differ with the number of labels."""
        return self.primitive, self.wiring, self.constants, self.options


def trace(fn: Callable[..., Any], *arguments: Any) -> Any:
    """The program of `fn`, the same on every mesh: the types of arrays tell nothing of one.

    JAX keeps a trace by the identity of the function. Wrap the function in a new one before it is
    traced: else the numbers are those of the first trace, even if the object that holds them has
    changed.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.make_jaxpr(fn)(*arguments)


def of_loss(
    who: str, loss: Callable[..., jax.Array], arguments: Sequence[Any], remedy: str, kind: str
) -> tuple[Equation, ...]:
    """The program of a user's loss, which must return one number per logit, and its derivatives'.

    A rule of a derivative may read what the loss itself does not. `who` is the argument that is the
    loss, and of which function. `kind` says to a user whose loss fails what it must be, and
    `remedy` to one whose loss holds a traced value what to do.
    """

    # New functions: see `trace`.
    def value(*arrays: jax.Array) -> jax.Array:
        return loss(*arrays)

    def all_gradients(*arrays: jax.Array) -> Any:
        return _pull_back(loss, *arrays)

    def logits_gradients(logits: jax.Array, *others: jax.Array) -> Any:
        return _pull_back(lambda logits: loss(logits, *others), logits)

    def second_derivatives(*arrays: jax.Array) -> Any:
        return _pull_back(all_gradients, *arrays)

    try:
        traced = trace(value, *arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who} must be {kind}, got one that fails: {error}") from error
    shapes, expected = [result.shape for result in traced.out_avals], arguments[0].shape
    if shapes != [expected]:
        raise ValueError(
            f"{who} must return one number per logit, of shape {expected} for logits of "
            f"that shape, got {shapes[0] if len(shapes) == 1 else shapes}; do not reduce it, and "
            "make jaxbce.Loss(loss) of one of jaxbce"
        )
    if not jnp.issubdtype(traced.out_avals[0].dtype, jnp.floating):
        raise TypeError(f"{who} must return floats, got {traced.out_avals[0].dtype}")
    programs = [traced]
    for derivative in (all_gradients, logits_gradients, second_derivatives):
        # A loss may have no derivative, as one with a loop of unknown length.
        with contextlib.suppress(NotImplementedError, TypeError, ValueError):
            programs.append(trace(derivative, *arguments))
    if_traced = f"of which it would lose the gradient; {remedy}"
    return tuple(equation for each in programs for equation in read(each, who, if_traced))


def _pull_back(fn: Callable[..., Any], *arrays: jax.Array) -> Any:
    """A derivative of `fn`, whatever it returns, in reverse mode."""
    values, pullback = jax.vjp(fn, *arrays)
    return pullback(values)


def read(traced: Any, who: str, if_traced: str) -> tuple[Equation, ...]:
    """The operations of the program of `who`, which must hold no traced value, nor have effects."""
    # Numbers are read now, while a program is traced, and whatever its settings say of transfers.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        program = tuple(_equations(traced, f"{who} must hold no traced value, {if_traced}"))
    for equation in program:
        if equation.primitive in EFFECTS:
            raise ValueError(
                f"{who} must change nothing outside of it, because how often it runs is not "
                f"defined, got one with the operation {equation.primitive}; return what changes, "
                "or change it outside"
            )
    return program


def is_same(one: Sequence[Equation], two: Sequence[Equation], exact: bool) -> bool:
    """Whether two programs do the same.

    With `exact=False` they may differ in the wiring and in reshapes, which JAX adds and drops where
    an axis has one element.
    """

    def parts(program: Sequence[Equation]) -> list[tuple[Any, ...]]:
        if exact:
            return [(*each.operation, each.axes) for each in program]
        return [
            (each.primitive, each.constants, each.primitive in ELEMENTWISE.split() and each.options)
            for each in program
            if each.primitive not in SHAPING.split()
        ]

    return parts(one) == parts(two)


def what_mixes(one: Sequence[Equation], two: Sequence[Equation]) -> str | None:
    """Compares one program that was read for two numbers of labels.

    Returns None if each label is computed from itself alone. Else it returns the name of the first
    operation that is not known to do so, or "" where the two programs are different.
    """
    for a, b in itertools.zip_longest(one, two):
        if a is None or b is None or a.primitive != b.primitive:
            return ""
        if a.operation != b.operation:
            # The option of another operation may just be the number of labels.
            plain = a.primitive in (*ELEMENTWISE.split(), *SHAPING.split())
            return "" if plain else str(a.primitive)
        if not _treats_apart(a, b):
            return str(a.primitive)
    return None


def _treats_apart(one: Equation, two: Equation) -> bool:
    """Whether an operation leaves the labels in their places and computes each from itself.

    The axes whose size differs between the two are those of the labels.
    """

    # These compute nothing. The operations of a call are equations of their own.
    if one.primitive in ("call", "inputs", "outputs"):
        return True

    def labelled(shapes: Any, others: Any) -> list[tuple[Any, list[int]]]:
        """Each shape, and the axes whose size depends on the number of labels."""
        return [
            (shape, [axis for axis, size in enumerate(shape) if size != other[axis]])
            for shape, other in zip(shapes, others, strict=True)
        ]

    operands = [pair for pair in labelled(one.operands, two.operands) if pair[1]]
    results = labelled(one.results, two.results)
    if not any(axes for _, axes in results + operands):
        return True
    if not operands:
        return one.primitive == "broadcast_in_dim"
    return bool(results) and all(
        len(operand[1]) == len(result[1]) == 1 and _keeps(one, operand, result)
        for operand in operands
        for result in results
    )


def _keeps(equation: Equation, operand: Any, result: Any) -> bool:
    """Whether place i on the axis of labels of an operand becomes place i on that of the result."""
    (shape, [axis]), (new_shape, [new_axis]) = operand, result
    if equation.primitive in ELEMENTWISE.split():
        return axis == new_axis
    if equation.primitive in DROPPING.split():
        dropped = sum(each < axis for each in equation.axes)
        return axis not in equation.axes and new_axis == axis - dropped
    if equation.primitive in ALONG.split():
        return axis == new_axis and axis not in equation.axes
    if equation.primitive == "broadcast_in_dim":
        return equation.axes[axis] == new_axis
    if equation.primitive == "concatenate":
        return axis == new_axis != equation.axes[0]
    if equation.primitive == "transpose":
        return equation.axes[new_axis] == axis
    if equation.primitive == "stack":
        return new_axis == axis + (equation.axes[0] <= axis)
    in_rows = shape[axis] == new_shape[new_axis] and (
        math.prod(shape[axis + 1 :]) == math.prod(new_shape[new_axis + 1 :])
    )
    return equation.primitive == "reshape" and in_rows


def _equations(traced: Any, if_traced: str) -> Iterator[Equation]:
    """The operations of a program and of those inside it, between their inputs and outputs."""
    jaxpr, numbers = getattr(traced, "jaxpr", traced), dict[Any, int]()

    def wired(value: Any) -> tuple[Any, ...] | None:
        if hasattr(value, "val"):  # a number
            return None
        place = numbers.setdefault(value, len(numbers))
        return place, value.aval.dtype, value.aval.ndim

    def equation(
        primitive: str, operands: Sequence[Any], results: Sequence[Any], **options: Any
    ) -> Equation:
        if primitive == "slice":
            options = _part_that_is_taken(operands[0].aval.shape, results[0].aval.shape, options)
        axes = [
            options.get(key)
            for key in ("axes", "dimensions", "broadcast_dimensions", "permutation")
        ]
        axes += [(options[key],) for key in ("dimension", "axis") if key in options]
        return Equation(
            primitive,
            tuple(map(wired, (*operands, *results))),
            tuple(_number(if_traced, each.val) for each in operands if hasattr(each, "val")),
            tuple(filter(_is_plain, options.items())),
            next(filter(None, axes), ()),
            tuple(each.aval.shape for each in operands),
            tuple(each.aval.shape for each in results),
            options.get("callback") if primitive == "pure_callback" else None,
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


def _part_that_is_taken(
    whole: tuple[int, ...], taken: tuple[int, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """The options of a slice, of those axes alone of which it does not take all."""
    axes = tuple(
        axis for axis, sizes in enumerate(zip(whole, taken, strict=True)) if sizes[0] != sizes[1]
    )
    parts = {key: tuple(value[axis] for axis in axes) for key, value in options.items() if value}
    return parts | {"axes": axes}


@functools.lru_cache(maxsize=256)
def _inner_equations(program: Any, if_traced: str) -> tuple[Equation, ...]:
    """Of a program inside another, which JAX keeps and returns again."""
    return tuple(_equations(program, if_traced))


def _inner_programs(options: Any) -> list[Any]:
    """The programs among the options of an operation. Newer JAX wraps some as traced functions."""
    leaves = [getattr(leaf, "traced", leaf) for leaf in jax.tree.leaves(options)]
    programs = [leaf.jaxpr if isinstance(leaf, jax.stages.Traced) else leaf for leaf in leaves]
    return [each for each in programs if hasattr(getattr(each, "jaxpr", each), "eqns")]


def _is_plain(option: tuple[str, Any]) -> bool:
    """Whether an option of an operation is compared.

    Shapes and the programs inside it are read by themselves. A function among the options only says
    how to differentiate, and `of_loss` traces the derivatives too.
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
