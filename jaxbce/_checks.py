"""Checks of dtypes, shapes and, on request, values; the wording of every error."""

import functools
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

P = ParamSpec("P")
R = TypeVar("R")

ARRAY_TYPES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)

# Part of jit's cache key: a function traced without checks is traced again under `checked`.
_value_checks = jax.make_user_context(default_value=False)


def checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Returns `fn` with the values that jaxbce functions receive inside it checked.

    Use it while debugging, around any function that calls jaxbce: a training step, its gradient,
    under `jax.jit` or `jax.vmap`. Without it no check is traced and none costs anything.

    What is checked: kept labels and probabilities lie in [0, 1] and are not NaN; `label_smoothing`
    lies in [0, 1]; positives are label ids, or -1 for padding, and fit into `max_positives`.

    Args:
      fn: a function of arrays, or pytrees of arrays, that returns the same.

    Returns:
      A function of the same arguments and result. It is traced at every call, so keep it out of the
      final training loop. It goes outside `jax.jit`: `checked(jax.jit(fn))`.

    Raises:
      ValueError: when the returned function is called: the first failed check, with the name of the
        jaxbce function, the argument and the offending value.

    Edge values: what `where` masks, or a weight of 0 drops, may hold anything and is not checked.

    Differentiable: yes, `checked(jax.grad(loss))`.

    Example:
      >>> import jax, jaxbce
      >>> loss = jaxbce.checked(jax.jit(jaxbce.bce_with_logits))
      >>> loss(jax.numpy.zeros(2), jax.numpy.array([0.0, 2.0]))
      Traceback (most recent call last):
        ...
      ValueError: bce_with_logits: labels must be in [0, 1], got 2.0...

    Source: `jax.experimental.checkify`.
    """

    @functools.wraps(fn)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        with _value_checks(True):
            error, result = checkify.checkify(fn)(*args, **kwargs)
        try:
            error.throw()
        except checkify.JaxRuntimeError as failure:
            raise ValueError(str(failure)) from None
        return result

    return with_checks


class Arguments:
    """The array arguments of one call to `name`, checked and in the dtype of its arithmetic.

    Everything is measured against the first argument, `scores_name` in the messages.
    """

    def __init__(self, name: str, scores_name: str, scores: Any) -> None:
        self.name = name
        self.scores_name = scores_name
        dtype = self._dtype(scores_name, scores)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}: {scores_name} must be floating-point, got {dtype}; "
                f"convert with jax.numpy.asarray({scores_name}, jax.numpy.float32)"
            )
        self.dtype = np.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
        self.scores = jnp.asarray(scores).astype(self.dtype)
        self.shape = self.scores.shape

    def labels(self, values: Any) -> jax.Array:
        """Labels, in exactly the shape of the scores."""
        labels = self._real("labels", values)
        if labels.shape != self.shape:
            raise ValueError(
                f"{self.name}: labels must have the shape of {self.scores_name}, got labels "
                f"{labels.shape} and {self.scores_name} {self.shape}; nothing is broadcast, so "
                "reshape one of them, for example with labels[:, None]"
            )
        return labels

    def positives(self, values: Any) -> jax.Array:
        """Label ids, as `check_positives` returns them, with the leading axes of the scores."""
        if not self.shape:
            raise ValueError(f"{self.name}: {self.scores_name} must have an axis of labels, got ()")
        ids = check_positives(self.name, values, self.shape[-1])
        if ids.shape[:-1] != self.shape[:-1]:
            raise ValueError(
                f"{self.name}: positives must have the leading axes of {self.scores_name}, got "
                f"positives {ids.shape} and {self.scores_name} {self.shape}; one positive per row "
                "of a (batch, labels) array is positives[:, None]"
            )
        return ids

    def broadcast(self, argument: str, values: Any) -> jax.Array | None:
        """An optional argument, broadcast to the shape of the scores."""
        if values is None:
            return None
        values = self._real(argument, values)
        check_broadcasts(self.name, argument, values.shape, self.scores_name, self.shape)
        # Sharded as the scores where their type says how.
        return jnp.broadcast_to(values, self.shape, out_sharding=jax.typeof(self.scores).sharding)

    def mask(self, where: Any) -> jax.Array | None:
        """An optional mask, in its own shape but with the rank of the scores."""
        return check_mask(self.name, where, self.scores_name, self.shape)

    def number(self, argument: str, value: Any) -> jax.Array:
        number = self._real(argument, value)
        if number.ndim:
            raise ValueError(
                f"{self.name}: {argument} must be one number, got an array of shape {number.shape}"
            )
        return number

    def unit_interval(
        self, argument: str, values: jax.Array, keep: jax.Array | None = None
    ) -> None:
        """Under `checked`, every kept element of `values` must lie in [0, 1]."""
        ok = (values >= 0) & (values <= 1)
        if keep is not None:
            ok |= ~keep
        check_values(self.name, argument, values, ok, "in [0, 1]")

    def _real(self, argument: str, values: Any) -> jax.Array:
        dtype = self._dtype(argument, values)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"{self.name}: {argument} must be float, integer or bool, got {dtype}")
        return jnp.asarray(values).astype(self.dtype)

    def _dtype(self, argument: str, values: Any) -> np.dtype:
        return array_dtype(self.name, argument, values)


def array_dtype(name: str, argument: str, values: Any) -> np.dtype:
    """The dtype of an argument that must be an array or a number."""
    if not isinstance(values, ARRAY_TYPES):
        raise TypeError(
            f"{name}: {argument} must be an array or a number, got "
            f"{type(values).__name__}; wrap it in jax.numpy.asarray"
        )
    return np.dtype(jnp.result_type(values))


def check_broadcasts(
    name: str, argument: str, shape: tuple[int, ...], against: str, target: tuple[int, ...]
) -> None:
    """`shape` must broadcast to the `target` shape of the argument `against`."""
    try:
        fits = np.broadcast_shapes(shape, target) == target
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: {argument} of shape {shape} does not broadcast to {against} of shape "
            f"{target}; one value per row of a (batch, labels) array is {argument}[:, None]"
        )


def check_mask(name: str, where: Any, against: str, target: tuple[int, ...]) -> jax.Array | None:
    """An optional mask, in its own shape but with the rank of the `target` shape."""
    if where is None:
        return None
    dtype = array_dtype(name, "where", where)
    if dtype != jnp.bool_:
        raise TypeError(f"{name}: where must be bool, got {dtype}; write where != 0")
    where = jnp.asarray(where)
    check_broadcasts(name, "where", where.shape, against, target)
    return jnp.expand_dims(where, range(len(target) - where.ndim))


def check_one_of(name: str, **arguments: Any) -> None:
    """Exactly one of the arguments must be given."""
    given = [argument for argument, value in arguments.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{name}: exactly one of {' and '.join(arguments)} must be given, got "
            f"{' and '.join(given) or 'neither'}"
        )


def check_values(name: str, argument: str, values: jax.Array, ok: jax.Array, rule: str) -> None:
    """Under `checked`, `ok` must hold for every element of `values`."""
    if not _value_checks.value or not values.size:
        return
    offending = jnp.ravel(values)[jnp.argmin(ok)]
    message = f"{name}: {argument} must be {rule}, got {{value}}"
    checkify.check(jnp.all(ok), message, value=offending)


def check_positives(name: str, positives: Any, num_labels: int) -> jax.Array:
    """Label ids as int32, every one outside [0, num_labels) replaced by num_labels."""
    dtype = array_dtype(name, "positives", positives)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"{name}: positives must be integer label ids, got {dtype}; for a multi-hot array use "
            "jaxbce.positives_from_multi_hot"
        )
    if not jnp.ndim(positives):
        raise ValueError(f"{name}: positives must have an axis of label ids, got one number")
    ids = jnp.asarray(positives)
    if dtype.itemsize < 4:
        ids = ids.astype(jnp.int32)  # so that num_labels fits; a wide id is narrowed only below
    inside = (ids >= 0) & (ids < num_labels)
    ok = inside if jnp.issubdtype(ids.dtype, jnp.unsignedinteger) else inside | (ids == -1)
    check_values(name, "positives", ids, ok, f"in [0, {num_labels}), or -1 for padding")
    return jnp.where(inside, ids, num_labels).astype(jnp.int32)


def fraction_or_none(name: str, argument: str, value: Any) -> Any:
    """`value` after `check_fraction`; None, which costs nothing, for a constant 0."""
    check_fraction(name, argument, value)
    return None if isinstance(value, (int, float)) and value == 0 else value


def check_fraction(name: str, argument: str, value: Any) -> None:
    """A number known before tracing must lie in [0, 1]."""
    if isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise ValueError(f"{name}: {argument} must be in [0, 1], got {value}")


def static_number(
    name: str, argument: str, value: Any, valid: str, low: float, high: float
) -> float:
    """A number that must be known before tracing, with low <= number < high; `valid` says so."""
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name}: {argument} must be a Python number, known before tracing, got "
            f"{type(value).__name__}; pass float({argument}) outside jax.jit, or make it static: "
            f"jax.jit(..., static_argnames={argument!r})"
        )
    number = float(value)
    if not low <= number < high:
        raise ValueError(f"{name}: {argument} must be {valid}, got {value}")
    return number


def check_choice(name: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {argument} must be one of {', '.join(choices)}, got {value!r}")


def check_array(
    name: str,
    argument: str,
    values: Any,
    *,
    floating: bool = False,
    shape: tuple[int, ...] | None = None,
    axes: str = "",
) -> jax.Array:
    """A real array, of a float dtype if `floating`, of `shape` if given; `axes` names its axes."""
    dtype = array_dtype(name, argument, values)
    if floating and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name}: {argument} must be floating-point, got {dtype}; "
            f"convert with jax.numpy.asarray({argument}, jax.numpy.float32)"
        )
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{name}: {argument} must be float, integer or bool, got {dtype}")
    array = jnp.asarray(values)
    if shape is not None and array.shape != shape:
        raise ValueError(
            f"{name}: {argument} must have shape {axes} = {shape}, got {array.shape}; nothing is "
            f"broadcast, so reshape it or use jax.numpy.broadcast_to({argument}, {shape})"
        )
    return array


def check_size(
    name: str, argument: str, value: Any, largest: int | None = None, *, least: int = 1
) -> None:
    """A number of things, known while tracing: an int of at least `least`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (largest is not None and value > largest):
        limit = "" if largest is None else f" and at most {largest}"
        raise ValueError(
            f"{name}: {argument} must be an int of at least {least}{limit}, got {value!r}"
        )
