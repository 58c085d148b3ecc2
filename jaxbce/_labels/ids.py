"""Label ids: from rows of ids and from multi-hot arrays, checked, and back to dense labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbce import _checks, _math, _placement


def multi_hot(
    positives: ArrayLike, num_labels: int, *, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Label ids as an array of zeros and ones.

    Use it to give label ids to a function that takes dense labels. `sparse_bce_with_logits` and
    `linear_bce_with_logits` take the ids as they are.

    Formula: result[..., l] = 1 if l is in positives[..., :], else 0.

    Args:
      positives: integer array [..., P] of label ids, padded with -1; P may be 0.
      num_labels: the number of labels L, an int.
      dtype: of the result; `bool` or `uint8` need a quarter of the memory.

    Returns:
      An array [..., L] of `dtype`.

    Raises:
      TypeError: positives are not an integer array, or dtype is none of real numbers.
      ValueError: positives have no axis, or num_labels is not a non-negative int.

    Edge values: any id outside [0, L) is padding, duplicates count once. Under `checked` an id
    outside [0, L) other than -1 is an error.

    Differentiable: no, the ids are integers.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> print(jaxbce.multi_hot(jnp.array([[0, 2], [1, -1]]), 3))
      [[1. 0. 1.]
       [0. 1. 0.]]

    Source: scikit-learn's `MultiLabelBinarizer`, with a fixed number of ids per row.
    """
    name = "multi_hot"
    check_num_labels(name, num_labels)
    _check_real_dtype(name, dtype)
    (positives,) = _checks.jit_arguments(name, positives=positives)
    return _multi_hot_of(positives, name=name, num_labels=num_labels, dtype=jnp.dtype(dtype))


def checked_ids(
    name: str,
    values: Any,
    num_labels: int,
    *,
    argument: str = "positives",
    rows_of: tuple[str, tuple[int, ...]] | None = None,
    keep: jax.Array | None = None,
) -> jax.Array:
    """Label ids [..., P] as int32, every one outside [0, num_labels) replaced by num_labels.

    They have the leading axes of `rows_of`, an argument by name and shape. Under `checked` an id
    outside is an error, unless it is -1 or its row is False in `keep`.
    """
    ids = _checks.real(name, argument, values)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            f"{name}: {argument} must be integer label ids, got {ids.dtype}; for a multi-hot array "
            "use jaxbce.positives_from_multi_hot"
        )
    if not ids.ndim:
        raise ValueError(f"{name}: {argument} must have an axis of label ids, got one number")
    against, shape = rows_of or (argument, ids.shape)
    if ids.shape[:-1] != shape[:-1]:
        one_each = f"one id per row is {argument}[..., None]"
        rows = f"each row of {against} has a row of ids, padded with -1, which may be all of it"
        raise ValueError(
            f"{name}: {argument} must have shape (..., {argument}) with the leading axes of "
            f"{against}, got {argument} {ids.shape} and {against} {shape}; "
            f"{one_each if ids.shape == shape[:-1] else rows}"
        )
    if ids.dtype.itemsize < 4:
        ids = ids.astype(jnp.int32)  # num_labels must fit; wider ids are narrowed at the end
    inside = (ids >= 0) & (ids < num_labels)
    ok = inside if jnp.issubdtype(ids.dtype, jnp.unsignedinteger) else inside | (ids == -1)
    keep = None if keep is None else keep[..., None]
    if _checks.values_are_checked() and ids.shape[-1] == num_labels and num_labels > 2:
        rule = "label ids, not a multi-hot array of zeros and ones"
        _checks.check_values(name, argument, ids, jnp.any((ids < 0) | (ids > 1)), rule)
    _checks.check_values(name, argument, ids, ok, f"in [0, {num_labels}), or -1 for padding", keep)
    return jnp.where(inside, ids, num_labels).astype(jnp.int32)


def ones_at(
    ids: jax.Array, num_labels: int, dtype: DTypeLike, first: jax.Array | int = 0
) -> jax.Array:
    """[..., num_labels], with 1 for the labels from `first` on that are among the ids of their row.

    An accelerator compares ids and labels inside the loop that reads the result, which then never
    exists; on a CPU a scatter is faster.
    """

    if ids.shape[-1] == 0:
        return jnp.zeros((*ids.shape[:-1], num_labels), dtype)

    def compared(ids: jax.Array, first: jax.Array) -> jax.Array:
        labels = first + jnp.arange(num_labels, dtype=ids.dtype)
        labels = jnp.expand_dims(labels, range(ids.ndim))
        return jnp.any(ids[..., None] == labels, axis=-2).astype(dtype)

    def scattered(ids: jax.Array, first: jax.Array) -> jax.Array:
        # mode="drop" drops an index past the end, but lets a negative one wrap around.
        local = jnp.where(ids < first, num_labels, ids - first)

        def row(local: jax.Array) -> jax.Array:
            return jnp.zeros(num_labels, dtype).at[local].set(jnp.ones((), dtype), mode="drop")

        return _math.over(row, ids.ndim - 1)(local)

    return jax.lax.platform_dependent(
        ids, jnp.asarray(first, ids.dtype), cpu=scattered, default=compared
    )


def labels_of(
    name: str, positives: Any, shape: tuple[int, ...], counted: jax.Array | None
) -> jax.Array:
    """Dense labels of `shape`; ids in rows of which nothing is counted are not checked."""
    if not shape:
        raise ValueError(f"{name}: logits must have an axis of labels, got ()")
    rows = None if counted is None else jnp.any(counted, axis=-1)
    ids = checked_ids(name, positives, shape[-1], rows_of=("logits", shape), keep=rows)
    # uint8, which XLA converts in the loop of the loss. On a CPU some versions of XLA scatter
    # bfloat16 as float32.
    return ones_at(ids, shape[-1], jnp.uint8)


@_placement.compiled(result=_placement.by_row)
def _multi_hot_of(positives: Any, *, name: str, num_labels: int, dtype: jnp.dtype) -> jax.Array:
    ids = checked_ids(name, positives, num_labels)
    return ones_at(ids, num_labels, dtype)


def positives_from_multi_hot(labels: ArrayLike, max_positives: int | None = None) -> jax.Array:
    """The ids of the labels that are not 0.

    Use it to turn dense labels, once and before training, into the much smaller `positives`.

    Formula: the l with labels[..., l] ≠ 0, ascending, then -1 up to max_positives.

    Args:
      labels: bool, integer or float array [..., L] of zeros and ones.
      max_positives: the number of ids per row P, an int; None takes the largest number of
        positives that a row has, which must then be known: not under `jax.jit`.

    Returns:
      An int32 array [..., P].

    Raises:
      TypeError: labels are not a real array.
      ValueError: labels have no axis, max_positives is not a non-negative int, or it is None while
        labels are traced.

    Edge values: of a row with more than P positives the first P are kept. Under `checked` such a
    row is an error, and so is a label other than 0 and 1.

    Differentiable: no, the ids are integers.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> print(jaxbce.positives_from_multi_hot(jnp.array([[1, 0, 1], [0, 1, 0]])))
      [[ 0  2]
       [ 1 -1]]

    Source: `jax.numpy.nonzero`, by row, in a fraction of its memory.
    """
    name = "positives_from_multi_hot"
    (labels,) = _checks.jit_arguments(name, labels=labels)
    if max_positives is not None:
        _checks.check_size(name, "max_positives", max_positives, least=0)
    elif isinstance(labels, jax.core.Tracer):
        raise ValueError(
            f"{name}: max_positives must be given where labels are traced (under jax.jit, "
            "jax.vmap, jaxbce.checked), got None; pass the largest number of positives of a row"
        )
    else:
        counts = jnp.count_nonzero(check_labels(name, labels), axis=-1)
        max_positives = int(counts.max(initial=0))
    return _positives_of(labels, name=name, max_positives=max_positives)


@_placement.compiled(result=_placement.by_row)
def _positives_of(labels: Any, *, name: str, max_positives: int) -> jax.Array:
    labels = check_labels(name, labels)
    if labels.dtype != jnp.bool_:
        _checks.check_values(name, "labels", labels, (labels == 0) | (labels == 1), "0 or 1")
    counts = jnp.count_nonzero(labels, axis=-1)
    rule = f"at most {max_positives} (max_positives) in a row"
    _checks.check_values(name, "positives", counts, counts <= max_positives, rule)

    if not labels.shape[-1]:
        return jnp.full((*labels.shape[:-1], max_positives), -1, jnp.int32)

    def row(labels: jax.Array) -> jax.Array:
        # `jax.numpy.nonzero` would hold several int32 for each label. With eight labels in a byte,
        # only bytes are counted: the nth positive is in the first byte up to which n are counted.
        packed = jnp.packbits(labels.astype(bool), bitorder="little")
        in_byte = jax.lax.population_count(packed).astype(jnp.int32)
        counted = jnp.cumsum(in_byte)
        nth = jnp.arange(1, max_positives + 1, dtype=jnp.int32)
        at = jnp.searchsorted(counted, nth)
        byte = packed.at[at].get(mode="clip")
        rank = nth - (counted - in_byte).at[at].get(mode="clip")
        for lower in range(1, 8):
            byte = jnp.where(rank > lower, byte & (byte - 1), byte)  # without its lowest bit
        # Its lowest bit is now the positive. The number of bits below is its place in the byte.
        place = jax.lax.population_count(~byte & (byte - 1)).astype(jnp.int32)
        return jnp.where(at < packed.size, 8 * at + place, -1)

    return _math.over(row, labels.ndim - 1)(labels)


def positives_from_rows(rows: Any, max_positives: int | None = None) -> jax.Array:
    """Rows of label ids, each of its own length, as one array padded with -1.

    Use it to turn label ids as data sets have them into `positives`: lists of lists, ragged NumPy
    arrays, sparse matrices of SciPy. It works on the host, outside `jax.jit`, and SciPy need not be
    installed. Give all batches the same `max_positives`: each new width compiles a jitted step
    anew.

    Formula: result[i] = the ids of row i, in their order, then -1 up to max_positives.

    Args:
      rows: one row of ids per example: lists, tuples or integer arrays in a list, in an array or in
        another iterable. What the mask of a NumPy array hides is left out. Or a `scipy.sparse`
        matrix or array [rows, labels], best in CSR: the ids are the columns whose value is not 0.
      max_positives: the number of ids per row P, an int; None takes the longest row of this call.

    Returns:
      An int32 array [rows, P] of JAX, as `positives_from_multi_hot` returns.

    Raises:
      TypeError: rows are not rows, or an id is not an integer.
      ValueError: a row has more than max_positives ids, an id is negative or does not fit int32,
        rows are a multi-hot array, or max_positives is not a non-negative int. The error names the
        row.

    Edge values: a row may be empty. Duplicates stay, and count once wherever jaxbce takes ids; of a
    sparse matrix, entries for one place add up. No rows give an array [0, P].

    Differentiable: no, the ids are integers.

    Example:
      >>> import jaxbce
      >>> print(jaxbce.positives_from_rows([[7], [], [4, 0]], max_positives=3))
      [[ 7 -1 -1]
       [-1 -1 -1]
       [ 4  0 -1]]

    Source: the padding of sequences in `keras.utils.pad_sequences`, which cuts a long row silently.
    """
    name = "positives_from_rows"
    if max_positives is not None:
        _checks.check_size(name, "max_positives", max_positives, least=0)
    rows = rows.tocsr() if hasattr(rows, "tocsr") else rows
    ids, lengths = _of_csr(rows) if hasattr(rows, "indptr") else _of_rows(name, rows)
    outside = (ids < 0) | (ids > np.iinfo(np.int32).max)
    if outside.any():
        at = np.argmax(outside)
        row = np.searchsorted(np.cumsum(lengths), at, side="right")
        raise ValueError(
            f"{name}: rows must hold ids in [0, {np.iinfo(np.int32).max}], got {int(ids[at])} in "
            f"row {row}; number the labels from 0; rows padded with -1 are positives as they are"
        )
    longest = int(lengths.max(initial=0))
    # Ids of 0 and 1 alone may be right in lists. Three or more in each row of an array are not.
    if getattr(rows, "ndim", 1) == 2 and longest > 2 and not (ids > 1).any():
        raise ValueError(
            f"{name}: rows must be rows of ids, got an array of shape {rows.shape} of zeros and "
            "ones; for a multi-hot array use jaxbce.positives_from_multi_hot"
        )
    width = longest if max_positives is None else max_positives
    if longest > width:
        row = np.argmax(lengths > width)
        raise ValueError(
            f"{name}: rows must have at most {width} ids (max_positives), got {lengths[row]} in "
            f"row {row}; pass max_positives={longest}, the longest row, or shorten the rows before"
        )
    positives = np.full((lengths.size, width), -1, np.int32)
    positives[np.arange(width)[None] < lengths[:, None]] = ids
    return jnp.asarray(positives)


def _of_csr(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """The columns of what is not 0 in a CSR matrix, row after row, and how many each row has."""
    if not getattr(matrix, "has_canonical_format", True):
        matrix = matrix.copy()
        matrix.sum_duplicates()  # entries of one place may add up to 0
    start = np.asarray(matrix.indptr)
    kept = np.asarray(matrix.data)[: start[-1]] != 0
    before = np.concatenate([[0], np.cumsum(kept)])
    return np.asarray(matrix.indices)[: start[-1]][kept], np.diff(before[start])


def _of_rows(name: str, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """All ids, row after row, and how many each row has."""
    if not isinstance(rows, Iterable):
        raise TypeError(
            f"{name}: rows must be lists of ids, got {type(rows).__name__}; pass one list per row"
        )
    arrays = [_row_of_ids(name, i, row) for i, row in enumerate(rows)]
    lengths = np.array([array.size for array in arrays], np.int64)
    # NumPy makes float64 of an empty list, and of all ids beside one. It holds every int32 exactly.
    return np.concatenate([np.zeros(0, np.int32), *arrays]), lengths


def _row_of_ids(name: str, i: int, row: Any) -> np.ndarray:
    if isinstance(row, jax.core.Tracer):
        raise TypeError(
            f"{name}: rows must be known, got a traced array; call it outside of jax.jit, where "
            "batches are made"
        )
    try:
        array = np.asarray(row.compressed() if isinstance(row, np.ma.MaskedArray) else row)
        if array.dtype == object and array.ndim == 1:
            array = np.asarray(array.tolist())  # Python integers in an array of objects
    except ValueError:  # lists of several lengths
        array = np.zeros((1, 1))
    if array.ndim != 1:
        raise TypeError(
            f"{name}: row {i} of rows must be a flat list of ids, got {type(row).__name__}; one id "
            "is a list too, [id], and a set becomes one by list(row)"
        )
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(
            f"{name}: row {i} of rows must hold integer ids below 2**31, got {array.dtype}; "
            "convert them to int, or for a multi-hot array use jaxbce.positives_from_multi_hot"
        )
    return array


def _check_real_dtype(name: str, dtype: Any) -> None:
    try:
        real_numbers = jnp.dtype(dtype).kind != "c" and jnp.zeros((), dtype).dtype.kind in "biufV"
    except TypeError:
        real_numbers = False
    if not real_numbers:
        raise TypeError(
            f"{name}: dtype must be a float, integer or bool dtype, got {dtype!r}; "
            "jax.numpy.uint8 is one"
        )


def check_num_labels(name: str, num_labels: Any) -> None:
    if num_labels is None:
        raise ValueError(
            f"{name}: num_labels must be given with positives, which do not tell it, got None; "
            "pass the number of labels, logits.shape[-1]"
        )
    _checks.check_size(name, "num_labels", num_labels, least=0)


def check_labels(name: str, labels: Any) -> jax.Array:
    """Dense labels with a label axis, in their own dtype."""
    array = _checks.real(name, "labels", labels)
    if not array.ndim:
        raise ValueError(f"{name}: labels must have an axis of labels, got one number")
    return array
