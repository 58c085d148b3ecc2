"""The chunked head: the loss and the highest logits of features @ kernel + bias, chunk by chunk.

BCE has no normaliser across labels, so one pass over chunks of labels yields the loss and, in the
same pass, every gradient: with Z the logits of a chunk and G = scale · ∂loss/∂Z, both
[batch, chunk], the products are Z = features @ kernel, ∂features += G @ kernelᵀ and
∂kernel = featuresᵀ @ G. Nothing of the size [batch, labels] exists.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbce import _kernels

Gradients = dict[str, jax.Array]  # of every float operand that is given, whatever is wanted
Candidates = tuple[jax.Array, jax.Array]  # logits of each row and their labels


class Operands(NamedTuple):
    """The arrays of one loss. The dtype of `features` is that in which products are multiplied."""

    features: jax.Array  # [batch, width]
    kernel: jax.Array  # [width, labels]
    bias: jax.Array | None  # [labels]
    positives: jax.Array | None  # [batch, positives] in [0, labels]; `labels` is padding
    labels: jax.Array | None  # [batch, labels]
    pos_weight: jax.Array | None  # [labels]
    label_smoothing: jax.Array | None  # []
    scale: jax.Array  # [batch], the factor of each row in the total


LABELLED = ("kernel", "bias", "labels", "pos_weight")  # one column, or number, per label


def product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=_kernels.accumulator(a))


def differentiable(operands: Operands) -> tuple[str, ...]:
    """The names of the operands that `full_pass` has gradients of."""
    return tuple(
        name
        for name, array in operands._asdict().items()
        if name != "scale" and array is not None and jnp.issubdtype(array.dtype, jnp.floating)
    )


def columns(array: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis=array.ndim - 1)


def chunk_logits(
    features: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The logits of a chunk, and its kernel in the dtype of the product."""
    kernel = kernel.astype(features.dtype)
    logits = product(features, kernel, 1, 0)
    return (logits if bias is None else logits + bias[None]), kernel


def chunk_signs(positives: jax.Array, first: jax.Array | int, size: int, dtype: Any) -> jax.Array:
    """−1 at the positives among the labels first, ..., first + size − 1, and 1 elsewhere."""
    local = positives - first
    # One past the end is dropped; a negative index would wrap around even so.
    local = jnp.where((local >= 0) & (local < size), local, size)
    rows = jnp.arange(positives.shape[0])[:, None]
    signs = jnp.ones((positives.shape[0], size), jnp.int8).at[rows, local].set(-1, mode="drop")
    return signs.astype(dtype)


def elementwise_loss(
    signs: jax.Array | None,
    logits: jax.Array,
    labels: jax.Array | None = None,
    pos_weight: jax.Array | None = None,
    label_smoothing: jax.Array | None = None,
) -> jax.Array:
    dense = labels is not None
    if labels is None:
        assert signs is not None
        if pos_weight is None and label_smoothing is None:
            return _kernels.over(_kernels.softplus, 2)(signs * logits)
        labels = jnp.maximum(-signs, 0)
    if label_smoothing is not None:
        labels = labels * (1 - label_smoothing) + label_smoothing / 2
    if dense:
        return _kernels.over(_kernels.bce_with_logits_forward, 2)(logits, labels, pos_weight)
    # One array of a chunk less, where no gradient of the labels themselves is wanted.
    positive = (
        labels if pos_weight is None else _kernels.over(_kernels.annihilate, 2)(labels, pos_weight)
    )
    return _kernels.over(_kernels.softplus_mix, 2)(logits, 1 - labels, positive)


def gradient_dtype(operand: jax.Array) -> Any:
    """The dtype in which a gradient waits for its cotangent.

    Under a loss scale most of a gradient would be 0 in float16 before it is multiplied.
    """
    return _kernels.accumulator(operand) if operand.dtype == jnp.float16 else operand.dtype


def chunk_pass(
    operands: Operands,
    with_gradients: bool,
    offset: jax.Array | int,
    start: jax.Array | int,
    size: int,
) -> tuple[jax.Array, Gradients]:
    """What `size` labels from `start` add to the loss of each row, and their gradients."""
    chunk = {
        name: columns(array, start, size)
        for name in LABELLED
        if (array := getattr(operands, name)) is not None
    }
    logits, kernel = chunk_logits(operands.features, chunk["kernel"], chunk.get("bias"))
    signs, elements = None, {"logits": logits}
    if operands.positives is not None:
        signs = chunk_signs(operands.positives, offset + start, size, logits.dtype)
    else:
        elements["labels"] = chunk["labels"].astype(logits.dtype)
    # Unlike `broadcast_to`, sums vary over the same axes of a mesh as the logits.
    zeros = jnp.zeros_like(logits)
    if operands.pos_weight is not None:
        elements["pos_weight"] = zeros + chunk["pos_weight"][None]
    if operands.label_smoothing is not None:
        elements["label_smoothing"] = zeros + operands.label_smoothing

    if not with_gradients:
        return jnp.sum(elementwise_loss(signs, **elements), axis=1), {}

    scale = operands.scale

    def scaled_loss(elements: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        loss = elementwise_loss(signs, **elements)
        return jnp.sum(loss * scale[:, None]), jnp.sum(loss, axis=1)

    slopes, rows = jax.grad(scaled_loss, has_aux=True)(elements)
    slopes = {name: jnp.where(scale[:, None] == 0, 0, slope) for name, slope in slopes.items()}
    slope = slopes["logits"].astype(kernel.dtype)
    gradients = {
        "features": product(slope, kernel, 1, 1),
        "kernel": product(operands.features, slope, 0, 0).astype(gradient_dtype(operands.kernel)),
    }
    if operands.bias is not None:
        gradients["bias"] = jnp.sum(slopes["logits"], axis=0)
    if operands.labels is not None and jnp.issubdtype(operands.labels.dtype, jnp.floating):
        gradients["labels"] = slopes["labels"].astype(gradient_dtype(operands.labels))
    if operands.pos_weight is not None:
        gradients["pos_weight"] = jnp.sum(slopes["pos_weight"], axis=0)
    if operands.label_smoothing is not None:
        gradients["label_smoothing"] = jnp.sum(slopes["label_smoothing"])
    return rows, gradients


def put(gradients: Gradients, name: str, part: jax.Array, start: jax.Array | int) -> jax.Array:
    """The gradient of an operand with that of a chunk written into it, or added to it."""
    if name in LABELLED:
        axis = part.ndim - 1
        return jax.lax.dynamic_update_slice_in_dim(gradients[name], part, start, axis)
    return gradients[name] + part


def full_pass(
    operands: Operands, with_gradients: bool, chunk_size: int, offset: jax.Array | int = 0
) -> tuple[jax.Array, Gradients]:
    """The unscaled loss of each row and the gradients of Σ scale · loss.

    `offset` is the id of the first label of `kernel`.
    """
    num_labels = operands.kernel.shape[1]
    whole = 0 if num_labels == chunk_size else max(num_labels - 1, 0) // chunk_size
    start = whole * chunk_size
    # The last chunk, which may be smaller, comes first: the sums of the loop start from its own.
    rows, parts = chunk_pass(operands, with_gradients, offset, start, num_labels - start)
    if not whole:
        return rows, parts
    empty = {
        name: jnp.zeros((*part.shape[:-1], num_labels), part.dtype)
        if name in LABELLED
        else jnp.zeros_like(part)
        for name, part in parts.items()
    }
    gradients = {name: put(empty, name, part, start) for name, part in parts.items()}

    def step(
        carry: tuple[jax.Array, Gradients], start: jax.Array
    ) -> tuple[tuple[jax.Array, Gradients], None]:
        rows, gradients = carry
        more, parts = chunk_pass(operands, with_gradients, offset, start, chunk_size)
        gradients = {name: put(gradients, name, part, start) for name, part in parts.items()}
        return (rows + more, gradients), None

    starts = jnp.arange(whole, dtype=jnp.int32) * chunk_size
    (rows, gradients), _ = jax.lax.scan(step, (rows, gradients), starts)
    return rows, gradients


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """How a pass over all labels is run."""

    chunk_size: int

    def run(self, operands: Operands, with_gradients: bool) -> tuple[jax.Array, Gradients]:
        return full_pass(operands, with_gradients, self.chunk_size)

    def top_k(
        self, features: jax.Array, kernel: jax.Array, bias: jax.Array | None, k: int
    ) -> Candidates:
        return top_k_pass(features, kernel, bias, k, self.chunk_size)


def scaled_sum(rows: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(scale == 0, 0, rows * scale))


# The residuals of the rules below have one structure, whatever is differentiated: JAX shares it
# between all calls of a compiled function. What is computed for an operand that is not
# differentiated, the compiler removes.


def empty_operands(operands: Operands) -> Operands:
    """Residuals that tell the dtypes of the operands and keep none of them."""
    empty: Operands = jax.tree.map(lambda operand: jnp.zeros(0, operand.dtype), operands)
    return empty


def cotangents(gradients: Gradients, operands: Operands) -> tuple[Operands]:
    """One per operand, in its dtype; None for what has no gradient."""
    given = {
        name: gradient.astype(getattr(operands, name).dtype) for name, gradient in gradients.items()
    }
    values: list[Any] = [given.get(name) for name in Operands._fields]
    return (Operands(*values),)


# total_loss = Σ scale · loss of each row. The cotangent is one number, so the gradients are
# computed with the loss and multiplied by it. A higher derivative goes through that forward rule.


def total_loss_impl(how: OneDevice, operands: Operands) -> jax.Array:
    rows, _ = how.run(operands, False)
    return scaled_sum(rows, operands.scale)


def total_loss_fwd(how: OneDevice, operands: Operands) -> tuple[jax.Array, Any]:
    rows, gradients = how.run(operands, True)
    scale = operands.scale
    gradients["scale"] = jnp.where((scale == 0) & ~jnp.isfinite(rows), 0, rows)
    gradients["features"] = gradients["features"].astype(gradient_dtype(operands.features))
    return scaled_sum(rows, scale), (gradients, empty_operands(operands))


def total_loss_bwd(how: OneDevice, residuals: Any, g: jax.Array) -> tuple[Operands]:
    gradients, operands = residuals
    scaled = {name: g * gradient.astype(g.dtype) for name, gradient in gradients.items()}
    return cotangents(scaled, operands)


total_loss = jax.custom_vjp(total_loss_impl, nondiff_argnums=(0,))
total_loss.defvjp(total_loss_fwd, total_loss_bwd)


# row_losses = the loss of each row, `scale` apart. The cotangent of each row is its scale in the
# gradients, so the backward pass computes them.


def row_losses_impl(how: OneDevice, operands: Operands) -> jax.Array:
    return how.run(operands, False)[0]


def row_losses_fwd(how: OneDevice, operands: Operands) -> tuple[jax.Array, Operands]:
    return row_losses_impl(how, operands), operands


def row_losses_bwd(how: OneDevice, operands: Operands, g: jax.Array) -> tuple[Operands]:
    _, gradients = how.run(operands._replace(scale=g), True)
    return cotangents(gradients, operands)


row_losses = jax.custom_vjp(row_losses_impl, nondiff_argnums=(0,))
row_losses.defvjp(row_losses_fwd, row_losses_bwd)


def default_chunk_size(batch: int, num_labels: int) -> int:
    """All labels where one chunk is faster than several, else a good part of them.

    On a CPU that is one whose logits stay in the cache; elsewhere larger products are faster. Of
    symbolic sizes (`jax.export`) little is known: all of so many labels, few of so many rows.
    """
    if not isinstance(num_labels, int):
        return num_labels
    if not isinstance(batch, int):
        return min(num_labels, 512)
    cells, most = (2**19, 2048) if jax.default_backend() == "cpu" else (2**23, 2**15)
    chunk_size = min(max(cells // max(batch, 1) // 128 * 128, 512), most)
    return num_labels if num_labels <= 2 * chunk_size else chunk_size


def best(values: jax.Array, ids: jax.Array, k: int) -> Candidates:
    """The k highest of the candidates of each row; of equal ones, the first."""
    values, order = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, order, axis=1)


def top_k_pass(
    features: jax.Array, kernel: jax.Array, bias: jax.Array | None, k: int, chunk_size: int
) -> Candidates:
    """The k highest logits of each row and their labels; of equal ones, the lowest label first."""
    num_labels = kernel.shape[1]
    chunk_size = max(chunk_size, k)
    whole = max(num_labels // chunk_size - 1, 0)
    first = num_labels - whole * chunk_size

    def best_of(start: jax.Array | int, size: int) -> Candidates:
        part = columns(kernel, start, size)
        logits, _ = chunk_logits(
            features, part, None if bias is None else columns(bias, start, size)
        )
        values, ids = jax.lax.top_k(logits, k)
        return values, ids + start

    def step(found: Candidates, start: jax.Array) -> tuple[Candidates, None]:
        # The lower labels come first, and `best` prefers the first of equal values.
        values, ids = (
            jnp.concatenate(pair, axis=1)
            for pair in zip(found, best_of(start, chunk_size), strict=True)
        )
        return best(values, ids, k), None

    # The first chunk also takes the labels left over; it holds at least k.
    starts = first + jnp.arange(whole, dtype=jnp.int32) * chunk_size
    found, _ = jax.lax.scan(step, best_of(0, first), starts)
    return found
