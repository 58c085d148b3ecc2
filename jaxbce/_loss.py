"""An elementwise loss as one value: checked, prepared, mapped over arrays, reduced."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxbce import _checks, _math, _placement, _program, _reduce
from jaxbce._labels import ids
from jaxbce._reduce import Reduction


class Options(NamedTuple):
    """What every loss takes beside its logits, its labels and its own parameters."""

    weight: ArrayLike | None = None
    label_smoothing: ArrayLike = 0.0
    where: ArrayLike | None = None
    axis: int | tuple[int, ...] | None = None
    reduction: Reduction = "none"


@dataclasses.dataclass(frozen=True)
class Loss:
    """An elementwise loss of your own, with all that the losses of jaxbce have.

    Use it to try a new loss: write it for one logit and one label. Call the object on arrays, or
    give it to `linear_loss` and `linear_update` as it is. A loss of jaxbce or of another library
    goes there in the same way: `Loss(jaxbce.focal_loss)`, with its options by `functools.partial`.
    Make it once, outside of the training step: a new function is compiled anew.

    Formula: loss(logits, labels) = fn(x, y, *parameters) for each logit x and its label y.

    Args:
      fn: a function of one logit, one label and one number for each parameter, all float32
        scalars, or float64 for float64 logits. It returns one number, and JAX can trace it and
        differentiate it.
      parameters: the names of the arguments of fn that may differ by label, or by element, in the
        order of fn. Other names stand for the arguments without a default, in their order. An
        argument with a default may be left out of a call. Those that are not named stay fixed. One
        called pos_weight must be at least 0, which `checked` checks.

    Returns:
      An object to call with `(logits, labels, *, weight=None, label_smoothing=0.0, where=None,
      axis=None, reduction="mean", **parameters)`. These mean what they mean for `bce_with_logits`;
      a parameter is a real array that broadcasts to the shape of logits.

    Raises:
      TypeError: fn is not a function, parameters are not names, a call lacks a required parameter
        or has an unknown one, or fn does not return a float.
      ValueError: fn does not return one number, holds a traced value, takes another number of
        arguments, or a name of parameters is that of an option. Calling it raises what
        `bce_with_logits` does.

    Edge values: those of fn. `label * f(x)` is NaN where f is infinite, even for label 0. What is
    masked, or is not finite and has a weight of 0, has no part in the loss nor in a gradient, also
    where it is NaN.

    Differentiable: as fn is, with respect to logits, float labels, weight, label_smoothing and
    parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbce
      >>> def adjusted(logit, label, log_prior):
      ...     return jaxbce.softplus(logit + log_prior) - label * (logit + log_prior)
      >>> loss = jaxbce.Loss(adjusted, parameters=("log_prior",))
      >>> logits, labels = jnp.array([[2.0, -1.0]]), jnp.array([[1, 0]])
      >>> print(round(float(loss(logits, labels, log_prior=jnp.array([-1.0, -3.0]))), 4))
      0.1657

    Source: `bce_with_logits`, `focal_loss` and `asymmetric_loss` are made of such objects.
    """

    fn: Callable[..., jax.Array]
    parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = self.parameters
        if not callable(self.fn):
            raise TypeError(
                f"Loss: fn must be a function of one logit and one label, got "
                f"{type(self.fn).__name__}"
            )
        _checks.check_hashable("Loss", "fn", self.fn, "parameters")
        if not isinstance(names, (tuple, list)) or not all(
            isinstance(name, str) and name.isidentifier() for name in names
        ):
            raise TypeError(
                f'Loss: parameters must be a tuple of names, got {names!r}; one name is ("margin",)'
            )
        reserved = (*Options._fields, "self", "logits", "labels")
        if taken := [name for name in names if name in reserved or names.count(name) > 1]:
            raise ValueError(
                f"Loss: parameters must have names of their own, got {taken[0]!r}, which is taken; "
                f"choose another one, such as own_{taken[0]}"
            )
        object.__setattr__(self, "parameters", tuple(names))

    def __call__(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        weight: ArrayLike | None = None,
        label_smoothing: ArrayLike = 0.0,
        where: ArrayLike | None = None,
        axis: int | tuple[int, ...] | None = None,
        reduction: Reduction = "mean",
        **parameters: ArrayLike,
    ) -> jax.Array:
        """The loss of `logits` against `labels`: see `bce_with_logits`."""
        if unknown := parameters.keys() - set(self.parameters):
            raise TypeError(
                f"Loss: {min(unknown)} is no option, got one of that name; this loss has "
                f"{', '.join((*self.parameters, *Options._fields))}; name an argument of fn in "
                "parameters"
            )
        parameters = {own: value for own, value in parameters.items() if value is not None}
        options = Options(weight, label_smoothing, where, axis, reduction)
        program = self.program("Loss", tuple(parameters), logits)
        return evaluate("Loss", self, logits, labels, options, parameters, program=program)

    def arguments(self, name: str) -> dict[str, inspect.Parameter]:
        """The argument of fn that each parameter is: by its name, or else by its place."""
        kinds = inspect.Parameter
        signature = list(inspect.signature(self.fn).parameters.values())
        variadic = [a for a in signature if a.kind is kinds.VAR_POSITIONAL]
        in_place = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        others = [a for a in signature if a.kind in in_place][2:]
        others += [a for a in signature if a.kind is kinds.KEYWORD_ONLY]
        named = {a.name: a for a in others if a.kind is not kinds.POSITIONAL_ONLY}
        if self.parameters and set(self.parameters) <= named.keys():
            found = {own: named[own] for own in self.parameters}
        else:
            # An argument with a default is no place for another name, which may be misspelt.
            free = [a.name for a in others if a.default is kinds.empty or a.name not in named]
            places = [
                a for a in others if a.kind in in_place and a.name in (*free, *self.parameters)
            ]
            # Of what follows a default by place, the default would take the first.
            if all(a in places for a in others if a.kind in in_place):
                places += variadic * len(self.parameters)
            found = dict(zip(self.parameters, places, strict=False))
        names = [a.name for a in signature]
        left = [a.name for a in others if a not in found.values() and a.default is kinds.empty]
        if left or len(found) < len(self.parameters):
            raise ValueError(
                f"{name}: parameters must be names of arguments of fn, or stand for those without "
                f"a default in their order, got {list(self.parameters)} and the arguments {names}; "
                "name the others in parameters too, or bind them with functools.partial"
            )
        if any(own in named and found[own] is not named[own] for own in found):
            other = next(own for own in found if own not in named)  # perhaps misspelt
            raise ValueError(
                f"{name}: parameters must be in the order of fn, or all have its names, got "
                f"{list(self.parameters)} for {[a.name for a in others]}; rename {other}, or keep "
                "that order"
            )
        return found

    def mapped(
        self, ndim: int, given: tuple[str, ...], name: str = "Loss"
    ) -> Callable[..., jax.Array]:
        """The loss of arrays of `ndim` axes: logits, labels and the parameters that are `given`."""
        found, kinds = self.arguments(name), inspect.Parameter
        defaults = {own: found[own].default for own in self.parameters if own not in given}
        if missing := [own for own in defaults if defaults[own] is kinds.empty]:
            raise TypeError(
                f"{name}: {missing[0]} is a required parameter of this loss, got none; pass "
                f"{missing[0]}=... in the call"
            )
        in_call = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        by_name = all(a.name == own and a.kind in in_call for own, a in found.items())

        def scalar(x: jax.Array, y: jax.Array, *arrays: jax.Array) -> jax.Array:
            values = defaults | dict(zip(given, arrays, strict=True))
            # fn may call a loss that checks its values, but it knows no mask and no weight.
            with _checks.value_checks(False):
                if by_name:
                    return self.fn(x, y, **values)
                return self.fn(x, y, *(values[name] for name in self.parameters))

        return _math.over(scalar, ndim)

    def program(
        self, name: str, given: tuple[str, ...], *arrays: Any
    ) -> tuple[_program.Equation, ...]:
        """What fn does now to `arrays`; an error where it is no loss, or lacks a parameter."""
        number = jax.ShapeDtypeStruct((), _math.accumulator(*arrays))
        scalar = self.mapped(0, given, name)
        remedy = "name it in parameters, and pass it in the call"
        scalars = "a function of one logit and one label, which are numbers and no arrays"
        who = "Loss: fn" if name == "Loss" else f"{name}: loss"
        return _program.of_loss(who, scalar, [number] * (2 + len(given)), remedy, scalars)


def smoothed(labels: jax.Array, a: jax.Array | None) -> jax.Array:
    """Labels moved toward one half by the label_smoothing `a`, if there is one."""
    return labels if a is None else labels * (1 - a) + a / 2


def size_bound(*values: Any) -> jax.Array:
    """A bound for the size of a loss and its slopes: infinite or NaN wherever they may be."""
    sizes = [jnp.maximum(jnp.abs(value), 1) for value in values if value is not None]
    return functools.reduce(operator.mul, sizes)


def undefined_outside(values: jax.Array, size: jax.Array) -> jax.Array:
    """`size`, but infinite where `values` are outside of [0, 1], as a loss may be there."""
    return jnp.where((values >= 0) & (values <= 1), size, jnp.inf)


def is_defined(loss: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """Where a loss and its slopes are finite. Of a user's loss no bound is known, so it is run."""
    values, pullback = jax.vjp(loss, *jax.lax.stop_gradient(arrays))
    slopes = jax.tree.leaves(pullback(jnp.ones_like(values)))
    return functools.reduce(operator.and_, map(jnp.isfinite, [values, *slopes]))


def evaluate(
    name: str,
    loss: Loss,
    scores: ArrayLike,
    labels: ArrayLike,
    options: Options,
    parameters: Mapping[str, ArrayLike | None] | None = None,
    *,
    score_name: str = "logits",
    bound: Callable[..., jax.Array] = size_bound,
    sparse: bool = False,
    program: tuple[_program.Equation, ...] = (),
) -> jax.Array:
    """Checks what does not need an array, then makes one cached, compiled call.

    `bound` of the scores, labels and parameters is not finite where the loss or a slope may not be.
    """
    weight, label_smoothing, where, axis, reduction = options
    _checks.check_choice(name, "reduction", reduction, Reduction)
    axes = _checks.axes_or_none(name, axis, reduction)
    given = {n: value for n, value in (parameters or {}).items() if value is not None}
    arrays = _checks.jit_arguments(
        name,
        **{score_name: scores, "positives" if sparse else "labels": labels},
        weight=weight,
        label_smoothing=_checks.fraction_or_none(name, "label_smoothing", label_smoothing),
        where=where,
        **given,
    )
    names = tuple(given)
    call = Call(name, loss, names, reduction, axes, score_name, bound, sparse, program)
    return evaluate_arrays(*arrays, call=call)


class Call(NamedTuple):
    """What a compiled loss depends on, beside its arrays.

    `program` is empty for a built-in loss. Of a user's it is what the function does now. It is here
    only to be static: a function whose captured numbers have changed is compiled anew.
    """

    name: str
    loss: Loss
    given: tuple[str, ...]  # the parameters that have arrays
    reduction: Reduction
    axes: tuple[int, ...] | None
    score_name: str
    bound: Callable[..., jax.Array]
    sparse: bool  # the labels are ids
    program: tuple[_program.Equation, ...]


def result_spec(scores: Any, labels: Any, *others: Any, call: Call) -> PartitionSpec:
    # The last axis of ids is not one of labels.
    spec = _placement.common_spec(scores, None if call.sparse else labels, *others)
    if call.reduction == "none":
        return spec
    reduced = _checks.axes_of(call.name, call.axes, call.score_name, len(spec))
    return PartitionSpec(*(names for axis, names in enumerate(spec) if axis not in reduced))


@_placement.compiled(result=result_spec)
def evaluate_arrays(
    scores: Any,
    labels: Any,
    weight: Any,
    label_smoothing: Any,
    where: Any,
    *parameters: Any,
    call: Call,
) -> jax.Array:
    """Checks, prepares, maps and reduces: a whole loss, compiled for each shape and `call`."""
    name, loss, given, reduction, axes, score_name, bound, sparse, program = call
    x = _checks.floating(name, score_name, scores, None if sparse else labels)
    dtype, shape = _math.accumulator(x), x.shape
    x = x.astype(dtype)
    axes = _checks.axes_of(name, axes, score_name, x.ndim)
    where = _checks.mask(name, where, score_name, shape)

    def broadcast(argument: str, values: Any) -> jax.Array:
        return _checks.broadcast(name, argument, values, score_name, shape).astype(dtype)

    unbroadcast_weight = None
    if weight is not None:
        own = _checks.real(name, "weight", weight).astype(dtype)
        weight = broadcast("weight", own)
        unbroadcast_weight = jnp.expand_dims(own, range(x.ndim - own.ndim))
    extras = [broadcast(*pair) for pair in zip(given, parameters, strict=True)]
    counted = _reduce.counted(weight, where)
    if sparse:
        y = ids.labels_of(name, labels, shape, counted)
    else:
        y = _checks.labels_like(name, labels, score_name, shape)
    y = y.astype(dtype)
    if score_name == "probs":
        _checks.check_unit_interval(name, "probs", x, counted)
    _checks.check_unit_interval(name, "labels", y, counted)
    for argument, extra in zip(given, extras, strict=True):
        if argument == "pos_weight":
            _checks.check_not_negative(name, argument, extra, counted)

    size = bound(x, y, *extras)
    a = _checks.smoothing(name, label_smoothing, dtype)
    mapped = loss.mapped(x.ndim, given, name)
    if program and weight is not None:
        size = jnp.where(is_defined(mapped, x, smoothed(y, a), *extras), size, jnp.inf)
    keep = _reduce.enters(size, weight, where)
    if keep is not None:
        # Before anything is computed of them, so that no NaN reaches a gradient.
        x, y = jnp.where(keep, x, 0), jnp.where(keep, y, 0)
        extras = [jnp.where(keep, extra, 1) for extra in extras]
        weight = None if weight is None else jnp.where(keep, weight, 0)
    y = smoothed(y, a)
    if program and keep is not None:
        # A user's loss may be infinite at the replacements too. The outer select drops its value.
        # Its slope by y may then be NaN, and y depends on label_smoothing. So y is replaced once
        # more, after the smoothing: no slope of a masked element reaches label_smoothing.
        values = jnp.where(keep, mapped(x, jnp.where(keep, y, 0), *extras).astype(dtype), 0)
    else:
        values = mapped(x, y, *extras).astype(dtype)
    if weight is not None:
        values = values * weight
    return _reduce.reduce_loss(values, unbroadcast_weight, keep, where, reduction, axes)
