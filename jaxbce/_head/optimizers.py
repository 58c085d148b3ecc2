"""An optimizer and the labels: how its state is cut, and a proof that it treats each apart."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbce import _checks, _math, _program


class Layout(NamedTuple):
    """The optimizer's state and program, as far as a compiled step depends on them."""

    structure: Any
    axes: tuple[int | None, ...]  # which axis of each leaf of the state counts the labels, if one
    program: tuple[_program.Equation, ...]

    def split(self, state: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        """The leaves by label, and those without an axis of labels, such as the number of steps."""
        leaves = list(zip(jax.tree.leaves(state), self.axes, strict=True))
        by_label = [leaf for leaf, axis in leaves if axis is not None]
        return by_label, [leaf for leaf, axis in leaves if axis is None]

    def join(self, by_label: Sequence[Any], others: Sequence[Any]) -> Any:
        sources = {False: iter(by_label), True: iter(others)}
        leaves = [next(sources[axis is None]) for axis in self.axes]
        return jax.tree.unflatten(self.structure, leaves)


def label_dims(params: dict[str, Any], transposed: bool) -> dict[str, int]:
    """The axis of each parameter that counts the labels."""
    return {name: 0 if transposed else array.ndim - 1 for name, array in params.items()}


def layout_of(name: str, optimizer: Any, params: Any, opt_state: Any, transposed: bool) -> Layout:
    """Checks an optimizer and its state, and finds the axis of labels of each leaf of the state.

    It is the axis that grows where `optimizer.init` is traced with one label more.
    """
    if type(params) is not dict or not {"kernel"} <= params.keys() <= {"kernel", "bias"}:
        raise TypeError(
            f'{name}: params must be a dict of "kernel" and, if there is one, "bias", got '
            f"{list(params) if type(params) is dict else type(params).__name__}; pass "
            '{"kernel": kernel, "bias": bias}, and optimizer.init of it'
        )
    try:
        hash(optimizer)
        init, _ = optimizer.init, optimizer.update
    except (AttributeError, TypeError):
        raise TypeError(
            f"{name}: optimizer must be an optax transformation, or hashable and have init and "
            f"update, got {type(optimizer).__name__}; a dataclass is hashable with eq=False"
        ) from None
    arrays = {argument: _checks.floating(name, argument, params[argument]) for argument in params}
    if arrays["kernel"].ndim != 2 or not arrays["kernel"].size:
        raise ValueError(
            f"{name}: kernel must have two axes, of at least one label and one feature, got "
            f"{arrays['kernel'].shape}"
        )
    param_axes = label_dims(arrays, transposed)
    num_labels = arrays["kernel"].shape[param_axes["kernel"]]
    own, wider = (
        jax.eval_shape(init, {n: _shaped(a, param_axes[n], number) for n, a in arrays.items()})
        for number in (num_labels, num_labels + 1)
    )
    expected = [leaf.shape for leaf in jax.tree.leaves(own)]
    got = [jnp.shape(leaf) for leaf in jax.tree.leaves(opt_state)]
    structures: list[Any] = [jax.tree.structure(opt_state), jax.tree.structure(own)]
    if structures[0] != structures[1] or got != expected:
        raise ValueError(
            f"{name}: opt_state must be optimizer.init(params), with arrays of shapes {expected}, "
            f"got {got} in {structures[0]}; make a new one, or keep that of the last step"
        )
    axes: list[int | None] = []
    for shape, leaf in zip(expected, jax.tree.leaves(wider), strict=True):
        pairs = enumerate(zip(shape, leaf.shape, strict=False))
        changed = [axis for axis, sizes in pairs if sizes == (num_labels, num_labels + 1)]
        axes.append(changed[0] if changed else None)
        grown = tuple(size + (axis in changed[:1]) for axis, size in enumerate(shape))
        if leaf.shape != grown:
            raise ValueError(
                f"{name}: optimizer keeps state of shape {shape}, which is not one column or "
                "number for each label; use one that treats elements independently, as optax.adam "
                "does"
            )
    return Layout(structures[1], tuple(axes), _read(name, optimizer, arrays, opt_state))


def _shaped(array: Any, axis: int | None = None, size: int = 0) -> jax.ShapeDtypeStruct:
    """What an array looks like, if need be of another size along an axis."""
    kind = jax.typeof(array)
    shape = list(kind.shape)
    if axis is not None:
        shape[axis] = size
    return jax.ShapeDtypeStruct(shape, kind.dtype)


def step(optimizer: Any, gradients: Any, params: Any, state: Any) -> tuple[Any, Any]:
    """(Parameters, state) after a step, in the dtypes of the arithmetic."""
    params, state = jax.tree.map(_widened, (params, state))
    with jax.numpy_dtype_promotion("standard"):  # a user's own setting may refuse what optax does
        updates, state = optimizer.update(gradients, state, params)

        def moved(update: jax.Array | None, old: jax.Array) -> jax.Array:
            return old if update is None else old + update  # as optax.apply_updates

        return jax.tree.map(moved, updates, params, is_leaf=lambda leaf: leaf is None), state


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
        # `anew` is a new function: see `_program.trace`.
        traced = _program.trace(anew, gradients, params, state)
    except (NameError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: optimizer.update must take (gradients, state, params) and no more, of any "
            "number of labels: an array for each label belongs in its state, where optimizer.init "
            f"makes it as long as the labels of its params; got {error}"
        ) from error
    return _program.read(
        traced,
        f"{name}: optimizer",
        "such as a learning rate; pass it through optax.inject_hyperparams, which keeps it in "
        "opt_state",
    )


def check_by_label(
    name: str,
    optimizer: Any,
    layout: Layout,
    params: Any,
    param_axes: dict[str, int],
    state: Any,
    other: int,
) -> None:
    """Proves that a step computes each label from itself, for `other` labels as for all of them.

    The program is read for both numbers of labels, and must be the same. An axis whose size differs
    between them is one of labels: what has one must be computed label by label.
    """
    num_labels = params["kernel"].shape[param_axes["kernel"]]
    leaves = zip(jax.tree.leaves(state), layout.axes, strict=True)
    resized = [_shaped(leaf, axis, other) for leaf, axis in leaves]
    program = _read(
        name,
        optimizer,
        {n: _shaped(a, param_axes[n], other) for n, a in params.items()},
        jax.tree.unflatten(layout.structure, resized),
    )
    mixing = _program.what_mixes(layout.program, program)
    if mixing == "":
        raise ValueError(
            f"{name}: optimizer does not treat {other} labels as it treats all {num_labels}, as "
            "with a mask or a scale that depends on a size; let it depend on the name or the "
            "number of axes of a parameter"
        )
    if mixing:
        by_sum = "; for one that does not, write the product as (a * b).sum(axis=0)"
        raise ValueError(
            f"{name}: optimizer is not known to treat each label apart: its update uses {mixing} "
            "on arrays of labels, as clipping by a global norm, trust ratios, noise and tests for "
            "NaN do; a step that treats labels together needs the whole gradient, so use "
            "jax.value_and_grad of jaxbce.linear_bce_with_logits or linear_loss with it, or an "
            "optimizer that treats elements independently, as optax.clip does"
            f"{by_sum if mixing == 'dot_general' else ''}"
        )


def _widened(array: jax.Array) -> jax.Array:
    """In the dtype of the arithmetic, if it is of a floating dtype."""
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(_math.accumulator(array)) if floating else array
