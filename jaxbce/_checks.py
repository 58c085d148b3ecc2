"""Checks of arrays and options, on request also of values, and the wording of their errors."""

import numbers
from typing import Any, TypeGuard, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

# This context is in the cache key of `jax.jit`. A function that was traced without checks is
# therefore traced again under `checked`.
value_checks = jax.make_user_context(default_value=False)


def jit_arguments(name: str, /, **arguments: Any) -> list[Any]:
    """The arguments as `jax.jit` takes them: arrays, numbers or None for what is not given."""
    return [_jit_argument(name, argument, values) for argument, values in arguments.items()]


def _jit_argument(name: str, argument: str, values: Any) -> Any:
    are_ids = argument in ("positives", "ignored")
    if not isinstance(values, jax.Array) and hasattr(values, "__jax_array__"):
        values = values.__jax_array__()  # for example of a flax.nnx.Param
    if isinstance(values, int) and not -(2**31) <= values < 2**31:
        if abs(values) > float(jnp.finfo(jnp.float32).max):
            raise ValueError(
                f"{name}: {argument} must be below 3.4e38 in size, got an integer of "
                f"{values.bit_length()} bits"
            )
        return float(values)  # JAX may have no integer as large
    if values is None or isinstance(values, (bool, int, float, complex)):
        return values
    if not isinstance(values, (jax.Array, np.ndarray, np.generic)):
        convertible = isinstance(values, (list, tuple)) or hasattr(values, "__array__")
        remedy = "wrap it in jax.numpy.asarray" if convertible else "pass an array"
        if isinstance(values, (list, tuple)) and are_ids:
            remedy = f"make one of its rows by jaxbce.positives_from_rows({argument})"
        kind = type(values).__name__
        raise TypeError(f"{name}: {argument} must be an array or a number, got {kind}; {remedy}")
    number = values.dtype == bool or jnp.issubdtype(values.dtype, jnp.number)
    if not number or values.dtype.itemsize > 8 * (1 + (values.dtype.kind == "c")):
        raise TypeError(
            f"{name}: {argument} must be an array of numbers of at most 64 bits, got dtype "
            f"{values.dtype}; pass one of a float, integer or bool dtype"
        )
    if _is_narrowed(values):
        # JAX would keep the lower 32 bits. Here an id that is too large becomes the largest one,
        # which is no label either, and other numbers become floats.
        info = np.iinfo(jax.dtypes.canonicalize_dtype(values.dtype))
        if are_ids:
            return np.clip(values, info.min, info.max).astype(info.dtype)
        narrow = values.astype(info.dtype)
        return narrow if np.array_equal(narrow, values) else values.astype(np.float32)
    return values


def _is_narrowed(values: Any) -> bool:
    """Whether `values` are integers on the host of which JAX takes only the lower 32 bits."""
    return (
        isinstance(values, (np.ndarray, np.generic))
        and values.dtype.kind in "iu"
        and values.dtype != jax.dtypes.canonicalize_dtype(values.dtype)
    )


def check_narrowing(name: str, argument: str, values: Any) -> None:
    if _is_narrowed(values):
        info = np.iinfo(jax.dtypes.canonicalize_dtype(values.dtype))
        wide = np.ravel((values < info.min) | (values > info.max))
        if wide.any():
            raise ValueError(
                f"{name}: {argument} holds {np.ravel(values)[np.argmax(wide)]}, which JAX would "
                f"cut to {info.dtype}; mend it, or set jax_enable_x64"
            )


def real(name: str, argument: str, values: Any) -> jax.Array:
    """An argument that must be float, integer or bool, as an array."""
    if values is None:
        raise TypeError(
            f"{name}: {argument} must be an array or a number, got NoneType; it is required"
        )
    array = jnp.asarray(values)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name}: {argument} must be float, integer or bool, got {array.dtype}; pass its real "
            f"part, {argument}.real"
        )
    return array


def floating(name: str, argument: str, values: Any, labels: Any = None) -> jax.Array:
    """A float array; where `labels` are one in its place, the error asks about the order."""
    array = real(name, argument, values)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        swapped = labels is not None and jnp.issubdtype(jnp.result_type(labels), jnp.floating)
        question = f"are {argument} and labels swapped? If not, " if swapped else ""
        raise TypeError(
            f"{name}: {argument} must be floating-point, got {array.dtype}; {question}"
            f"convert with jax.numpy.asarray({argument}, jax.numpy.float32)"
        )
    return array


def are_class_ids(labels: jax.Array, shape: tuple[int, ...]) -> bool:
    """Whether labels that should be dense, of `shape`, look like one id per row."""
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    return integers and labels.ndim + 1 == len(shape) and shape[-1] != 1


def shaped(name: str, argument: str, values: Any, shape: tuple[int, ...], axes: str) -> jax.Array:
    """A real array of exactly `shape`, whose axes are named by `axes`."""
    array = real(name, argument, values)
    if array.shape != shape:
        remedy = f"nothing is broadcast, so {_remedy(argument, array.shape, shape)}"
        if argument == "labels" and are_class_ids(array, shape):
            remedy = "class ids are positives=labels[..., None]"
        raise ValueError(
            f"{name}: {argument} must have shape {axes} = {shape}, got {array.shape}; {remedy}"
        )
    return array


def _remedy(argument: str, got: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What makes an array of the shape `got` one of `shape`, if only its axes differ."""
    if not got:
        return f"use jax.numpy.broadcast_to({argument}, {shape})"
    if got == shape[::-1]:
        return f"pass {argument}.T"
    if got == (*shape, 1):
        return f"pass {argument}[..., 0]"
    if got == (1, *shape):
        return f"pass {argument}[0]"
    if shape == (*got, 1):
        return f"pass {argument}[..., None]"
    return "all sizes must be equal"


def labels_like(name: str, labels: Any, score_name: str, shape: tuple[int, ...]) -> jax.Array:
    """Dense labels of the shape of the scores."""
    array = real(name, "labels", labels)
    if array.shape == shape:
        return array
    remedy = f"nothing is broadcast, so {_remedy('labels', array.shape, shape)}"
    if are_class_ids(array, shape):
        remedy = (
            f"class ids become labels by jaxbce.multi_hot(labels[..., None], {shape[-1]}), and "
            "jaxbce.sparse_bce_with_logits takes them as positives"
        )
    raise ValueError(
        f"{name}: labels must have the shape of {score_name}, got labels {array.shape} and "
        f"{score_name} {shape}; {remedy}"
    )


def number(name: str, argument: str, value: Any, *, most_axes: int = 0) -> jax.Array:
    """One number, which may come in an array of up to so many axes of size 1."""
    array = real(name, argument, value)
    if array.shape not in [(1,) * ndim for ndim in range(most_axes + 1)]:
        raise ValueError(
            f"{name}: {argument} must be one number, got an array of shape {array.shape}"
        )
    return array.reshape(())


def broadcast(
    name: str, argument: str, values: Any, against: str, target: tuple[int, ...]
) -> jax.Array:
    """A real array, broadcast to the `target` shape of the argument `against`."""
    array = real(name, argument, values)
    _check_broadcasts(name, argument, array.shape, against, target)
    return jnp.broadcast_to(array, target)


def _check_broadcasts(
    name: str, argument: str, shape: tuple[int, ...], against: str, target: tuple[int, ...]
) -> None:
    """`shape` must broadcast to `target` without enlarging it; either may be symbolic."""
    pairs = zip(shape, target[len(target) - len(shape) :], strict=False)
    if len(shape) > len(target) or any(own not in (1, size) for own, size in pairs):
        remedy = f"counted from the last axis, each of its sizes must be 1 or that of {against}"
        if len(shape) > len(target):
            remedy = "it must have no more axes"
        elif shape == target[: len(shape)]:
            axes = ", ".join([":"] * len(shape) + ["None"] * (len(target) - len(shape)))
            remedy = f"one value per row is {argument}[{axes}]"
        raise ValueError(
            f"{name}: {argument} of shape {shape} does not broadcast to {against} of shape "
            f"{target}; {remedy}"
        )


def mask(name: str, where: Any, against: str, target: tuple[int, ...]) -> jax.Array | None:
    """An optional mask, in its own shape but with the rank of the `target` shape."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(
            f"{name}: where must be bool, got {where.dtype}; write where != 0, or weight=where if "
            "it holds weights"
        )
    _check_broadcasts(name, "where", where.shape, against, target)
    return jnp.expand_dims(where, range(len(target) - where.ndim))


def check_hashable(name: str, argument: str, fn: Any, arrays: str) -> None:
    try:
        hash(fn)
    except TypeError:
        raise TypeError(
            f"{name}: {argument} must be hashable, got {type(fn).__name__}; pass its arrays as "
            f"{arrays}, and make a dataclass with eq=False"
        ) from None


def check_one_of(name: str, **arguments: Any) -> None:
    """Exactly one of the arguments must be given."""
    given = [argument for argument, value in arguments.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{name}: exactly one of {' and '.join(arguments)} must be given, got "
            f"{' and '.join(given) or 'neither'}; give one by its name"
        )


def values_are_checked() -> bool:
    """Whether this is traced under `checked`."""
    return bool(value_checks.value)


def check_values(
    name: str,
    argument: str,
    values: jax.Array,
    ok: jax.Array,
    rule: str,
    keep: jax.Array | None = None,
) -> None:
    """Under `checked`, `ok` must hold for every element of `values` that is kept."""
    if not values_are_checked() or not values.size:
        return
    ok = ok if keep is None else ok | ~keep
    offending = jnp.ravel(values)[jnp.argmin(jnp.broadcast_to(ok, values.shape))]
    message = f"{name}: {argument} must be {rule}, got {{value}}"
    checkify.check(jnp.all(ok), message, value=offending)


def check_unit_interval(
    name: str, argument: str, values: jax.Array, keep: jax.Array | None = None
) -> None:
    """Under `checked`, every kept element of `values` must lie in [0, 1]."""
    check_values(name, argument, values, (values >= 0) & (values <= 1), "in [0, 1]", keep)


def check_not_negative(
    name: str, argument: str, values: jax.Array, keep: jax.Array | None = None
) -> None:
    """Under `checked`, no kept element of `values` may be negative, or NaN."""
    check_values(name, argument, values, values >= 0, "at least 0", keep)


def is_static(value: Any) -> TypeGuard[float]:
    """Whether `value` is one number whose value is at hand: not traced, not on a device."""
    array = isinstance(value, np.ndarray) and not value.ndim and value.dtype.kind in "biufV"
    return array or isinstance(value, numbers.Real)


def fraction_or_none(name: str, argument: str, value: Any) -> Any:
    """`value`, which must lie in [0, 1] if it is known. A known 0 is None: no code is compiled."""
    if value is None:
        raise TypeError(f"{name}: {argument} must be a number, got None; pass 0.0 for none of it")
    if is_static(value) and not 0 <= value <= 1:
        raise ValueError(f"{name}: {argument} must be in [0, 1], got {value}")
    return None if is_static(value) and value == 0 else value


def smoothing(name: str, value: Any, dtype: Any) -> jax.Array | None:
    """An optional label_smoothing as a number of `dtype`."""
    if value is None:
        return None
    a = number(name, "label_smoothing", value).astype(dtype)
    check_unit_interval(name, "label_smoothing", a)
    return a


def static_number(
    name: str, argument: str, value: Any, valid: str, low: float, high: float
) -> float:
    """A number that must be known before tracing, with low <= number <= high; `valid` says so."""
    if value is None:
        raise TypeError(f"{name}: {argument} must be a number, got None; pass 0.0 for none of it")
    if np.ndim(value):
        raise TypeError(
            f"{name}: {argument} must be one Python number, got an array of shape "
            f"{np.shape(value)}; all labels share it"
        )
    if not is_static(value):
        raise TypeError(
            f"{name}: {argument} must be a Python number, known before tracing, got "
            f"{type(value).__name__}; pass float({argument}) outside jax.jit, or make it static: "
            f"jax.jit(..., static_argnames={argument!r})"
        )
    # A Python number, which has no largest one. What is beyond float32 would become infinite.
    value = np.asarray(value).item()
    if not low <= value <= min(high, float(jnp.finfo(jnp.float32).max)):
        raise ValueError(f"{name}: {argument} must be {valid}, got {value}")
    return float(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def axes_or_none(name: str, axis: Any, reduction: str) -> tuple[int, ...] | None:
    """`axis`, known while tracing, as a tuple; None stands for all axes."""
    if axis is None:
        return None
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    if not all(map(_is_int, axes)):
        raise TypeError(f"{name}: axis must be None, an int or a tuple of ints, got {axis!r}")
    if reduction in ("none", "batchmean"):
        raise ValueError(
            f'{name}: axis must be None with reduction="{reduction}", got {axis!r}; "mean", '
            '"weighted_mean" and "sum" take one'
        )
    return tuple(map(int, axes))


def axes_of(name: str, axes: tuple[int, ...] | None, against: str, ndim: int) -> tuple[int, ...]:
    """The axes of an array of `ndim` axes, in order and not negative."""
    if axes is None:
        return tuple(range(ndim))
    known_axes = [axis + ndim if axis < 0 else axis for axis in axes]
    if len(set(known_axes)) < len(axes) or not set(known_axes) <= set(range(ndim)):
        raise ValueError(
            f"{name}: axis must name different axes of {against}, which has {ndim} of them, got "
            f"{axes}; the last axis is -1"
        )
    return tuple(sorted(known_axes))


def check_choice(name: str, argument: str, value: str, literal: Any) -> None:
    """One of the strings of a `Literal`."""
    choices = get_args(literal)
    if value not in choices:
        raise ValueError(f"{name}: {argument} must be one of {', '.join(choices)}, got {value!r}")


def check_size(
    name: str, argument: str, value: Any, largest: int | None = None, *, least: int = 1
) -> None:
    """A number of things, known while tracing: an int of at least `least`."""
    if not _is_int(value) or value < least or (largest is not None and value > largest):
        limit = "" if largest is None else f" and at most {largest}"
        raise ValueError(
            f"{name}: {argument} must be an int of at least {least}{limit}, got {value!r}"
        )
