"""An optimizer and the labels: how its state is cut, and a proof that it treats each apart."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbce import _checks, _math, _program


class Layout(NamedTuple):
    """The optimizer's state and program, as far as a compiled step depends on them."""

    structure: Any
    by_label: tuple[bool, ...]  # which leaves of the state have a column, or a number, per label
    program: tuple[_program.Equation, ...]

    def split(self, state: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        """The leaves by label, and the others, as the number of steps."""
        leaves = list(zip(jax.tree.leaves(state), self.by_label, strict=True))
        return [leaf for leaf, cut in leaves if cut], [leaf for leaf, cut in leaves if not cut]

    def join(self, by_label: Sequence[Any], others: Sequence[Any]) -> Any:
        sources = {True: iter(by_label), False: iter(others)}
        return jax.tree.unflatten(self.structure, [next(sources[cut]) for cut in self.by_label])


def layout_of(name: str, optimizer: Any, params: Any, opt_state: Any) -> Layout:
    """How the state is cut by label, and what the optimizer does to it."""
    if not isinstance(params, dict) or not {"kernel"} <= params.keys() <= {"kernel", "bias"}:
        raise TypeError(
            f'{name}: params must be a dict of "kernel" and, if there is one, "bias", got '
            f"{list(params) if isinstance(params, dict) else type(params).__name__}"
        )
    try:
        hash(optimizer)
        init, _ = optimizer.init, optimizer.update
    except (AttributeError, TypeError):
        raise TypeError(
            f"{name}: optimizer must be an optax transformation, got {type(optimizer).__name__}"
        ) from None
    arrays = {argument: _checks.floating(name, argument, params[argument]) for argument in params}
    if not arrays["kernel"].size:
        raise ValueError(
            f"{name}: kernel must have at least one label and feature, got "
            f"{arrays['kernel'].shape}; there is nothing to train"
        )
    num_labels = arrays["kernel"].shape[-1]
    own, wider = (
        jax.eval_shape(init, {argument: _shaped(a, number) for argument, a in arrays.items()})
        for number in (num_labels, num_labels + 1)
    )
    expected = [leaf.shape for leaf in jax.tree.leaves(own)]
    got = [jnp.shape(leaf) for leaf in jax.tree.leaves(opt_state)]
    structures: list[Any] = [jax.tree.structure(opt_state), jax.tree.structure(own)]
    if structures[0] != structures[1] or got != expected:
        raise ValueError(
            f"{name}: opt_state must be optimizer.init(params), with arrays of shapes {expected}, "
            f"got {got}"
        )
    by_label = []
    for shape, leaf in zip(expected, jax.tree.leaves(wider), strict=True):
        columns = (*shape[:-1], num_labels), (*shape[:-1], num_labels + 1)
        by_label.append((shape, leaf.shape) == columns)
        if not by_label[-1] and shape != leaf.shape:
            raise ValueError(
                f"{name}: optimizer keeps state of shape {shape}, which is not one column or "
                "number for each label; use one that treats elements independently, as optax.adam "
                "does"
            )
    return Layout(structures[1], tuple(by_label), _read(name, optimizer, arrays, opt_state))


def _shaped(array: Any, num_labels: int | None = None) -> jax.ShapeDtypeStruct:
    """What an array looks like, if need be for another number of labels."""
    kind = jax.typeof(array)
    shape = kind.shape if num_labels is None else (*kind.shape[:-1], num_labels)
    return jax.ShapeDtypeStruct(shape, kind.dtype)


def step(optimizer: Any, gradients: Any, params: Any, state: Any) -> tuple[Any, Any]:
    """(Parameters, state) after a step, in the dtypes of the arithmetic."""
    params, state = jax.tree.map(_widened, (params, state))
    with jax.numpy_dtype_promotion("standard"):  # a user's own setting may refuse what optax does
        updates, state = optimizer.update(gradients, state, params)
    return jax.tree.map(jnp.add, params, updates), state


# --- what an optimizer does, read from its program ------------------------------------------------

# Operations that compute each element of their result from the same element of their operands.
ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type
    copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow
    is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pow
    reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square sub tan tanh xor
"""
# Those that drop some axes, and treat each place on the others apart.
DROPPING = """
    reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum squeeze
"""


def _read(name: str, optimizer: Any, params: Any, state: Any) -> tuple[_program.Equation, ...]:
    """What the optimizer does in a step, with every number in it."""

    def anew(gradients: Any, params: Any, state: Any) -> tuple[Any, Any]:
        return step(optimizer, gradients, params, state)

    params, state = jax.tree.map(_shaped, (params, state))
    gradients = {
        argument: jax.ShapeDtypeStruct(array.shape, _math.accumulator(array))
        for argument, array in params.items()
    }
    try:
        # `anew` is a new function: of one that it knows, JAX returns the trace with old numbers.
        traced = jax.make_jaxpr(anew)(gradients, params, state)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: optimizer.update must take (gradients, state, params) and no more, of any "
            "number of labels: an array for each label belongs in its state, where optimizer.init "
            f"makes it as long as the labels of its params; got {error}"
        ) from error
    return _program.read(
        traced,
        f"{name}: optimizer must hold no traced value; pass a learning rate that is traced through "
        "optax.inject_hyperparams, which keeps it in opt_state",
    )


def check_by_label(
    name: str, optimizer: Any, layout: Layout, params: Any, state: Any, other: int
) -> None:
    """Proves that a step treats each label apart, and `other` labels as all of them.

    The program is read for two numbers of labels. It must be the same, and an axis of which the
    size differs holds the labels: what has one must be computed label by label.
    """
    num_labels = params["kernel"].shape[-1]
    by_label, others = layout.split(state)
    resized = layout.join([_shaped(array, other) for array in by_label], others)
    program = _read(name, optimizer, {n: _shaped(a, other) for n, a in params.items()}, resized)
    for pair in itertools.zip_longest(layout.program, program):
        if None in pair or pair[0][:2] != pair[1][:2]:
            raise ValueError(
                f"{name}: optimizer does not treat {other} labels as it treats all {num_labels}, "
                "as with a mask or a scale that depends on a size; let it depend on the name or "
                "the number of axes of a parameter"
            )
        if not _treats_apart(*pair):
            raise ValueError(
                f"{name}: optimizer treats elements together, as clipping by a global norm, trust "
                f"ratios, noise and tests for NaN do: its update uses {pair[0].primitive} on "
                "arrays of labels, which is not known to treat each label apart; such a step needs "
                "the whole gradient, so use jax.value_and_grad of jaxbce.linear_bce_with_logits or "
                "linear_loss with it, or an optimizer that treats elements independently, as "
                "optax.clip does"
            )


def _treats_apart(one: _program.Equation, two: _program.Equation) -> bool:
    """Whether an operation leaves the labels in their places and computes each from itself."""

    def labelled(shapes: Any, others: Any) -> list[tuple[Any, list[int]]]:
        """Each shape, and the axes whose size depends on the number of labels."""
        return [
            (shape, [axis for axis, size in enumerate(shape) if size != other[axis]])
            for shape, other in zip(shapes, others, strict=True)
        ]

    operands = [pair for pair in labelled(one.operands, two.operands) if pair[1]]
    results = labelled(one.results, two.results)
    if one.primitive in ("call", "inputs", "outputs") or not any(
        axes for _, axes in results + operands
    ):
        return True
    if not operands:
        return one.primitive == "broadcast_in_dim"
    return bool(results) and all(
        len(axes) == len(new_axes) == 1 and _keeps(one, axes[0], shape, new_axes[0], new_shape)
        for shape, axes in operands
        for new_shape, new_axes in results
    )


def _keeps(
    equation: _program.Equation,
    axis: int,
    shape: tuple[int, ...],
    new_axis: int,
    new_shape: tuple[int, ...],
) -> bool:
    """Whether place i on an axis of an operand becomes place i on that of the result."""
    if equation.primitive in ELEMENTWISE.split():
        return axis == new_axis
    if equation.primitive in DROPPING.split():
        dropped = sum(each < axis for each in equation.axes)
        return axis not in equation.axes and new_axis == axis - dropped
    if equation.primitive == "broadcast_in_dim":
        return equation.axes[axis] == new_axis
    in_rows = shape[axis] == new_shape[new_axis] and (
        math.prod(shape[axis + 1 :]) == math.prod(new_shape[new_axis + 1 :])
    )
    return equation.primitive == "reshape" and in_rows


def _widened(array: jax.Array) -> jax.Array:
    """In the dtype of the arithmetic, if it is of a floating dtype."""
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(_math.accumulator(array)) if floating else array
