"""The chunked head: the loss and the highest logits of features @ kernel + bias, chunk by chunk.

BCE has no normaliser across labels, so one pass over chunks of labels yields the loss and, in the
same pass, every gradient: with Z the logits of a chunk and G = scale · ∂loss/∂Z, both
[batch, chunk], the products are Z = features @ kernel, ∂features += G @ kernelᵀ and
∂kernel = featuresᵀ @ G. Nothing of the size [batch, labels] exists.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbce import _math
from jaxbce._head.loss import ChunkLoss
from jaxbce._labels.ids import ones_at
from jaxbce._loss import is_defined

Gradients = dict[str, Any]  # of every float operand that is given, whatever is wanted
Candidates = tuple[jax.Array, jax.Array]  # logits of each row and their labels


class Operands(NamedTuple):
    """The arrays of one loss. The dtype of `features` is that in which products are multiplied."""

    features: jax.Array  # [batch, width]
    kernel: jax.Array  # [width, labels]
    scale: jax.Array  # [batch], the factor of each row in the total
    bias: jax.Array | None = None  # [labels]
    positives: jax.Array | None = None  # [batch, positives] in [0, labels]; `labels` is padding
    labels: jax.Array | None = None  # [batch, labels]
    per_label: tuple[jax.Array, ...] = ()  # [labels] each: pos_weight, or what an own loss takes
    label_smoothing: jax.Array | None = None  # []
    where: jax.Array | None = None  # [batch or 1, labels or 1], False for what is left out
    ignored: jax.Array | None = None  # [batch, ignored], ids as in `positives`, left out too
    weightless: jax.Array | None = None  # [batch], True for a row of weight 0; None without weights

    def sizes(self) -> tuple[int, int]:
        """Of rows and labels."""
        return self.features.shape[0], self.kernel.shape[1]


LABELLED = ("kernel", "bias", "labels", "per_label")  # one column, or number, per label


def matmul(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=_math.accumulator(a))


def differentiable(operands: Operands) -> tuple[str, ...]:
    """The names of the operands that `full_pass` has gradients of."""
    return tuple(
        name
        for name, array in operands._asdict().items()
        if name != "scale"
        and jax.tree.leaves(array)
        and all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(array))
    )


def columns(array: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis=array.ndim - 1)


def chunk_mask(
    operands: Operands, first: jax.Array | int, start: jax.Array | int, size: int
) -> jax.Array | None:
    """What is kept of a chunk that starts at `start`, a label of the id `first`."""
    keep = operands.where
    if keep is not None and keep.shape[1] != 1:
        keep = columns(keep, start, size)
    if operands.ignored is not None:
        known = ~ones_at(operands.ignored, size, bool, first)
        keep = known if keep is None else known & keep
    return keep


def replaced(elements: dict[str, Any], hidden: jax.Array | None) -> dict[str, Any]:
    """`elements` with harmless numbers in place of what is hidden."""
    if hidden is None:
        return elements

    def harmless(name: str, element: jax.Array) -> jax.Array:
        return jnp.where(hidden, float(name == "per_label"), element)

    return {
        name: jax.tree.map(functools.partial(harmless, name), element)
        for name, element in elements.items()
    }


def gradient_dtype(operand: jax.Array) -> Any:
    """The dtype in which a gradient waits for its cotangent.

    Under a loss scale most of a gradient would be 0 in float16 before it is multiplied.
    """
    return _math.accumulator(operand) if operand.dtype == jnp.float16 else operand.dtype


def without_nan(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A kernel with 0 for what is not finite, and NaN for each label that has such a number.

    The NaN goes into the logits. A product would take it from a label that is masked to a row,
    because 0 · NaN is NaN.
    """
    finite = jnp.isfinite(kernel)
    mark = jnp.sum(jnp.where(finite, 0, jnp.nan), axis=0, dtype=_math.accumulator(kernel))
    return jnp.where(finite, kernel, 0), mark


def sum_of_rows(values: jax.Array, rounded: jax.Array) -> jax.Array:
    """Σ values over the rows; on a GPU of `values` as they were rounded for a product.

    A GPU would write the others to memory for this sum alone. In half precision the sum is then as
    exact as the gradient of the kernel.
    """

    def exact(values: jax.Array, rounded: jax.Array) -> jax.Array:
        return jnp.sum(values, axis=0)

    def of_rounded(values: jax.Array, rounded: jax.Array) -> jax.Array:
        return jnp.sum(rounded.astype(values.dtype), axis=0)

    total: jax.Array = jax.lax.platform_dependent(
        values, rounded, cuda=of_rounded, rocm=of_rounded, default=exact
    )
    return total


def chunk_pass(
    operands: Operands,
    loss: ChunkLoss,
    with_gradients: bool,
    offset: jax.Array | int,
    start: jax.Array | int,
    size: int,
    due: jax.Array | None = None,
) -> tuple[jax.Array, Gradients]:
    """What `size` labels from `start` add to the loss of each row, and their gradients.

    The gradients are in the dtype of the arithmetic. Only the labels that are `due` count.
    """
    chunk = {
        name: jax.tree.map(lambda array: columns(array, start, size), getattr(operands, name))
        for name in LABELLED
    }
    keep = chunk_mask(operands, offset + start, start, size)
    weightless = None if operands.weightless is None else operands.weightless[:, None]
    kernel, added = chunk["kernel"], [] if chunk["bias"] is None else [chunk["bias"]]
    if keep is not None or weightless is not None:
        kernel, mark = without_nan(kernel)
        added.append(mark)
    kernel = kernel.astype(operands.features.dtype)
    logits = matmul(operands.features, kernel, 1, 0)
    for each in added:
        logits += each.astype(logits.dtype)[None]
    if operands.positives is None:
        labels = chunk["labels"]
    else:
        labels = ones_at(operands.positives, size, jnp.uint8, offset + start)
    elements = {"logits": logits, "labels": labels.astype(logits.dtype)}
    # Unlike `broadcast_to`, sums vary over the same axes of a mesh as the logits.
    zeros = jnp.zeros_like(logits)
    if operands.per_label:
        elements["per_label"] = tuple(zeros + array[None] for array in chunk["per_label"])
    if operands.label_smoothing is not None:
        elements["label_smoothing"] = zeros + operands.label_smoothing

    def smoothed_loss(elements: Any) -> jax.Array:
        labels, a = elements["labels"], elements.get("label_smoothing")
        if a is not None:
            labels = labels * (1 - a) + a / 2
        return loss(elements["logits"], labels, *elements.get("per_label", ()))

    if due is not None:
        keep = due[None] if keep is None else keep & due[None]
    masked = None if keep is None else ~keep
    hidden, annihilated = masked, None
    if weightless is not None:
        annihilated = weightless & ~functools.reduce(
            operator.and_, map(jnp.isfinite, jax.tree.leaves(elements))
        )
        if loss.program:
            defined = is_defined(smoothed_loss, replaced(elements, masked))
            annihilated |= weightless & ~defined
        hidden = annihilated if masked is None else annihilated | masked

    def masked_loss(elements: Any) -> jax.Array:
        # Replaced before anything is computed of them, so that no NaN reaches a derivative.
        losses = smoothed_loss(replaced(elements, hidden))
        if annihilated is not None:
            losses = jnp.where(annihilated, jnp.inf, losses)  # `finite_rows` makes 0 of such a row
        return losses if masked is None else jnp.where(masked, 0, losses)

    # Also where no gradient is wanted: the rule of a loss for reverse mode alone is then applied,
    # and what is left has a derivative in forward mode.
    losses, pullback = jax.vjp(masked_loss, elements)
    rows = jnp.sum(losses, axis=1)
    if not with_gradients:
        return rows, {}

    # The scale, of which the slopes are a linear function, is not compared with 0: that would lose
    # what a second derivative needs where it is 0, and could not be transposed.
    (slopes,) = pullback(zeros + operands.scale[:, None])
    slope = jax.lax.optimization_barrier(slopes["logits"].astype(kernel.dtype))
    gradients: Gradients = {
        "features": matmul(slope, kernel, 1, 1),
        "kernel": matmul(operands.features, slope, 0, 0),
    }
    if operands.bias is not None:
        gradients["bias"] = sum_of_rows(slopes["logits"], slope)
    if operands.labels is not None and jnp.issubdtype(operands.labels.dtype, jnp.floating):
        gradients["labels"] = slopes["labels"]
    if operands.per_label:
        gradients["per_label"] = tuple(jnp.sum(each, axis=0) for each in slopes["per_label"])
    if operands.label_smoothing is not None:
        gradients["label_smoothing"] = jnp.sum(slopes["label_smoothing"])
    return rows, gradients


def write(array: jax.Array, part: jax.Array, start: jax.Array | int) -> jax.Array:
    """`array` with the columns of a chunk replaced."""
    return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=part.ndim - 1)


def full_pass(
    operands: Operands,
    loss: ChunkLoss,
    with_gradients: bool,
    chunk_size: int,
    offset: jax.Array | int = 0,
) -> tuple[jax.Array, Gradients]:
    """The unscaled loss of each row and the gradients of Σ scale · loss.

    `offset` is the id of the first label of `kernel`.
    """
    num_labels = operands.kernel.shape[1]

    def one_chunk(start: jax.Array | int, size: int) -> tuple[jax.Array, Gradients]:
        rows, parts = chunk_pass(operands, loss, with_gradients, offset, start, size)
        for name in {"kernel", "labels"} & parts.keys():  # as large as their operands
            parts[name] = parts[name].astype(gradient_dtype(getattr(operands, name)))
        return rows, parts

    whole = 0 if num_labels == chunk_size else max(num_labels - 1, 0) // chunk_size
    start = whole * chunk_size
    # The last chunk, which may be smaller, comes first: the sums of the loop start from its own.
    rows, parts = one_chunk(start, num_labels - start)
    if not whole:
        return rows, parts

    def put(gradients: Gradients, parts: Gradients, start: jax.Array | int) -> Gradients:
        """The gradients with those of a chunk written into them, or added to them."""
        add = {
            name: (lambda array, part: write(array, part, start)) if name in LABELLED else jnp.add
            for name in parts
        }
        return {name: jax.tree.map(add[name], gradients[name], parts[name]) for name in parts}

    def empty(part: jax.Array) -> jax.Array:
        return jnp.zeros((*part.shape[:-1], num_labels), part.dtype)

    gradients = {
        name: jax.tree.map(empty if name in LABELLED else jnp.zeros_like, part)
        for name, part in parts.items()
    }
    gradients = put(gradients, parts, start)

    def step(
        carry: tuple[jax.Array, Gradients], start: jax.Array
    ) -> tuple[tuple[jax.Array, Gradients], None]:
        rows, gradients = carry
        more, parts = one_chunk(start, chunk_size)
        return (rows + more, put(gradients, parts, start)), None

    starts = jnp.arange(whole, dtype=jnp.int32) * chunk_size
    (rows, gradients), _ = jax.lax.scan(step, (rows, gradients), starts)
    return rows, gradients


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """How a pass over all labels is run."""

    chunk_size: int
    loss: ChunkLoss

    def run(self, operands: Operands, with_gradients: bool) -> tuple[jax.Array, Gradients]:
        return full_pass(operands, self.loss, with_gradients, self.chunk_size)

    def update(
        self, pass_over: Callable[..., Any], operands: Operands, columns: Any, others: Any, key: Any
    ) -> Any:
        """`pass_over` writes `columns`, which have a column for each label."""
        return pass_over(operands, columns, others, key, self.loss, self.chunk_size)


def finite_rows(rows: jax.Array, operands: Operands) -> jax.Array:
    """The loss of each row, of which a weight of 0 annihilates what is not finite."""
    if operands.weightless is None:
        return rows
    return jnp.where(operands.weightless & ~jnp.isfinite(rows), 0, rows)


def scaled_sum(rows: jax.Array, operands: Operands) -> jax.Array:
    return jnp.sum(finite_rows(rows, operands) * operands.scale)


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
        name: jax.tree.map(lambda a, b: a.astype(b.dtype), gradient, getattr(operands, name))
        for name, gradient in gradients.items()
    }
    values: list[Any] = [given.get(name) for name in Operands._fields]
    return (Operands(*values),)


# total_loss = Σ scale · loss of each row. The cotangent is one number, so the gradients are
# computed with the loss and multiplied by it. A higher derivative goes through that forward rule.


def total_loss_impl(plan: OneDevice, operands: Operands) -> jax.Array:
    rows, _ = plan.run(operands, False)
    return scaled_sum(rows, operands)


def total_loss_fwd(plan: OneDevice, operands: Operands) -> tuple[jax.Array, Any]:
    rows, gradients = plan.run(operands, True)
    gradients["scale"] = finite_rows(rows, operands)
    gradients["features"] = gradients["features"].astype(gradient_dtype(operands.features))
    return scaled_sum(rows, operands), (gradients, empty_operands(operands))


def total_loss_bwd(plan: OneDevice, residuals: Any, g: jax.Array) -> tuple[Operands]:
    gradients, operands = residuals
    scaled = jax.tree.map(lambda gradient: g * gradient.astype(g.dtype), gradients)
    return cotangents(scaled, operands)


total_loss = jax.custom_vjp(total_loss_impl, nondiff_argnums=(0,))
total_loss.defvjp(total_loss_fwd, total_loss_bwd)


# row_losses = the loss of each row, `scale` apart. The cotangent of each row is its scale in the
# gradients, so the backward pass computes them.


def row_losses_impl(plan: OneDevice, operands: Operands) -> jax.Array:
    return plan.run(operands, False)[0]


def row_losses_fwd(plan: OneDevice, operands: Operands) -> tuple[jax.Array, Operands]:
    return row_losses_impl(plan, operands), operands


def row_losses_bwd(plan: OneDevice, operands: Operands, g: jax.Array) -> tuple[Operands]:
    _, gradients = plan.run(operands._replace(scale=g), True)
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
