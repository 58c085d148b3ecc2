"""The chunked head: the loss of features @ kernel + bias and its gradients, chunk by chunk.

An elementwise loss has no normaliser across labels, so one pass over chunks of labels yields the
loss and, in the same pass, every gradient. With Z the logits of a chunk and G = row_factor ·
∂loss/∂Z, both [batch, chunk], the products are Z = features @ kernel, ∂features += G @ kernelᵀ and
∂kernel = featuresᵀ @ G. No logits of the size [batch, labels] exist.

A kernel is [width, labels], or the table [labels, width]. A table is multiplied as it lies.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim

from jaxbce import _math
from jaxbce._head.loss import ChunkLoss
from jaxbce._labels.ids import ones_at
from jaxbce._loss import is_defined, size_bound, smoothed

# One for each name in `differentiable`. The rules of the derivatives add that of `row_factor`.
Gradients = dict[str, Any]


class Operands(NamedTuple):
    """The arrays of one loss. The dtype of `features` is that in which products are multiplied."""

    features: jax.Array  # [batch, width]
    kernel: jax.Array  # [width, labels], or [labels, width] where the pass says `transposed`
    row_factor: jax.Array  # [batch], the weight of each row over the divisor of the reduction
    bias: jax.Array | None = None  # [labels]
    positives: jax.Array | None = None  # [batch, positives] in [0, labels]; `labels` is padding
    labels: jax.Array | None = None  # [batch, labels]
    per_label: tuple[jax.Array, ...] = ()  # [labels] each: pos_weight, or what an own loss takes
    label_smoothing: jax.Array | None = None  # []
    where: jax.Array | None = None  # [batch or 1, labels or 1], False for what is left out
    ignored: jax.Array | None = None  # [batch, ignored], ids as in `positives`, left out too
    weightless: jax.Array | None = None  # [batch], True for a row of weight 0; None without weights


LABELLED = ("kernel", "bias", "labels", "per_label")  # one part per label


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to run over all labels: the size of a chunk, the loss, how the kernel lies.

    This class runs on one device. A subclass shards rows and labels, and says where the labels of a
    device start (`first_label`), what is summed over devices (`total`), and how to `run`.
    """

    chunk_size: int
    loss: ChunkLoss
    transposed: bool  # the kernel is a table, [labels, width]

    def label_dim_of(self, name: str) -> int:
        """The axis that counts the labels, of an operand in LABELLED."""
        if name == "kernel":
            return 0 if self.transposed else 1
        return -1

    def num_labels(self, kernel: jax.Array) -> Any:
        """How many labels this device has; symbolic only under `siglip_loss`."""
        return kernel.shape[self.label_dim_of("kernel")]

    def first_label(self, kernel: jax.Array) -> jax.Array | int:
        """The id of the first of them."""
        return 0

    def total(self, name: str, part: Any) -> Any:
        """What belongs to an operand, summed over the devices that share it."""
        return part

    def local(self, operands: Operands, with_gradients: bool) -> tuple[jax.Array, Gradients]:
        """The pass of one device: the unscaled loss of each row, and the gradients of the total."""
        by_row, gradients = full_pass(
            self, operands, with_gradients, self.first_label(operands.kernel)
        )
        totals = {name: self.total(name, part) for name, part in gradients.items()}
        return self.total("row_factor", by_row), totals

    def run(self, operands: Operands, with_gradients: bool) -> tuple[jax.Array, Gradients]:
        return self.local(operands, with_gradients)


def matmul(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=_math.accumulator(a))


def differentiable(operands: Operands) -> tuple[str, ...]:
    """The names of the operands that `full_pass` has gradients of."""
    return tuple(
        name
        for name, array in operands._asdict().items()
        if name != "row_factor"
        and jax.tree.leaves(array)
        and all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(array))
    )


def chunk_logits(
    plan: Plan, features: jax.Array, kernel: jax.Array, added: list[jax.Array]
) -> jax.Array:
    """The logits of a chunk; `kernel` is in the dtype of the product, `added` [chunk] each."""
    logits = matmul(features, kernel, 1, 1 - plan.label_dim_of("kernel"))
    for each in added:
        logits += each.astype(logits.dtype)[None]
    return logits


def chunk_mask(
    operands: Operands, id_of_start: jax.Array | int, start: jax.Array | int, size: int
) -> jax.Array | None:
    """Which of the `size` labels from `start` on are kept. The id of the first is `id_of_start`."""
    keep = operands.where
    if keep is not None and keep.shape[1] != 1:
        keep = dynamic_slice_in_dim(keep, start, size, 1)
    if operands.ignored is not None:
        known = ~ones_at(operands.ignored, size, bool, id_of_start)
        keep = known if keep is None else known & keep
    return keep


def replaced(elements: dict[str, Any], left_out: jax.Array | None) -> dict[str, Any]:
    """`elements` with harmless numbers in place of what is left out."""
    if left_out is None:
        return elements

    def harmless(name: str, element: Any) -> Any:
        return jax.tree.map(lambda a: jnp.where(left_out, float(name == "per_label"), a), element)

    return {name: harmless(name, element) for name, element in elements.items()}


def gradient_dtype(operand: jax.Array) -> Any:
    """The dtype in which a gradient waits for its cotangent.

    Under a loss scale most of a gradient would be 0 in float16 or float8 before it is multiplied.
    """
    short = jnp.finfo(operand.dtype).minexp > jnp.finfo(jnp.float32).minexp
    return _math.accumulator(operand) if short else operand.dtype


def without_nan(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """A kernel with 0 for what is not finite, and a mark for each label: NaN if it had such, or 0.

    `axis` counts the features. The mark is added to the logits. A NaN that stayed in the kernel
    would reach the gradient of the features also from a masked label: its slope is 0, but 0 · NaN
    is NaN.
    """
    finite = jnp.isfinite(kernel)
    # 0 · ∞ and 0 · NaN are NaN.
    mark = jnp.sum(0 * jax.lax.stop_gradient(kernel), axis, dtype=_math.accumulator(kernel))
    return jnp.where(finite, kernel, 0), mark


def sum_of_rows(values: jax.Array, rounded: jax.Array) -> jax.Array:
    """Σ values over the rows; on a GPU of `values` as they were rounded for a product.

    A GPU would write the others to memory for this sum alone. In half precision the sum is then as
    exact as the gradient of the kernel.
    """

    def exact(values: jax.Array, _: jax.Array) -> jax.Array:
        return jnp.sum(values, axis=0)

    def of_rounded(values: jax.Array, rounded: jax.Array) -> jax.Array:
        return jnp.sum(rounded.astype(values.dtype), axis=0)

    return jax.lax.platform_dependent(
        values, rounded, cuda=of_rounded, rocm=of_rounded, default=exact
    )


def chunk_pass(
    plan: Plan,
    operands: Operands,
    with_gradients: bool,
    first_label: jax.Array | int,
    start: jax.Array | int,
    size: int,
    due: jax.Array | None = None,
    layer: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, Gradients]:
    """What `size` labels from `start` add to the loss of each row, and their gradients.

    `first_label` is the id of the label 0 of these operands. The gradients are in the dtype of the
    arithmetic. `due` [size] is False for labels that an earlier chunk has counted already. `layer`
    replaces the kernel and bias of these labels: `linear_update` reads them from the arrays that it
    is writing.
    """

    def part(name: str) -> Any:
        if layer is not None and name in layer:
            return layer[name]
        axis = plan.label_dim_of(name)
        whole = getattr(operands, name)
        return jax.tree.map(lambda array: dynamic_slice_in_dim(array, start, size, axis), whole)

    id_of_start = first_label + start
    kernel, bias, label_dim = part("kernel"), part("bias"), plan.label_dim_of("kernel")
    keep = chunk_mask(operands, id_of_start, start, size)
    weightless = None if operands.weightless is None else operands.weightless[:, None]
    added = [] if bias is None else [bias]
    if keep is not None or weightless is not None:
        kernel, mark = without_nan(kernel, 1 - label_dim)
        added.append(mark)
    kernel = kernel.astype(operands.features.dtype)
    logits = chunk_logits(plan, operands.features, kernel, added)
    if operands.positives is None:
        labels = part("labels")
    else:
        labels = ones_at(operands.positives, size, jnp.uint8, id_of_start)
    elements = {"logits": logits, "labels": labels.astype(logits.dtype)}
    # For `jax.shard_map`. What belongs to a label does not vary over the axis of the rows, by its
    # type. So JAX would sum its gradient over that axis, which `plan.total` does already. Added to
    # these zeros it varies as the logits do, and JAX leaves the sum to `plan.total`.
    zeros = jnp.zeros_like(logits)
    if operands.per_label:
        elements["per_label"] = tuple(zeros + array[None] for array in part("per_label"))
    if operands.label_smoothing is not None:
        elements["label_smoothing"] = zeros + operands.label_smoothing

    def smoothed_loss(elements: Any) -> jax.Array:
        labels = smoothed(elements["labels"], elements.get("label_smoothing"))
        return plan.loss(elements["logits"], labels, *elements.get("per_label", ()))

    if due is not None:
        keep = due[None] if keep is None else keep & due[None]
    # There are two reasons to leave an element out.
    #   masked: the user masks it, or another chunk counts its label. Its loss is 0.
    #   dropped: its row has weight 0, and its loss or a slope may not be finite. Its loss is ∞,
    #     so that of the row is not finite, and `finite_rows` makes it 0. So the gradient by the
    #     weight is 0 too.
    # For either reason it is replaced before the loss sees it: a NaN would reach a gradient.
    masked = None if keep is None else ~keep
    left_out, dropped = masked, None
    if weightless is not None:
        finite = functools.reduce(operator.and_, map(jnp.isfinite, jax.tree.leaves(elements)))
        if operands.per_label:
            # The slope by a label may overflow. Without these numbers it does not, and XLA on a TPU
            # would write the logits to memory for this product.
            finite &= jnp.isfinite(size_bound(logits, *elements["per_label"]))
        if plan.loss.program:
            finite &= is_defined(smoothed_loss, replaced(elements, masked))
        dropped = weightless & ~finite
        left_out = dropped if masked is None else dropped | masked

    def masked_loss(elements: Any) -> jax.Array:
        # Replaced before anything is computed of them, so that no NaN reaches a derivative.
        losses = smoothed_loss(replaced(elements, left_out))
        if dropped is not None:
            losses = jnp.where(dropped, jnp.inf, losses)
        return losses if masked is None else jnp.where(masked, 0, losses)

    # Also without gradients. A built-in loss has a rule for reverse mode only. Once it is applied,
    # what is left can be differentiated in forward mode.
    losses, pullback = jax.vjp(masked_loss, elements)
    by_row = jnp.sum(losses, axis=1)
    if not with_gradients:
        return by_row, {}

    # A factor of 0 is multiplied like any other. To skip such a row would lose the second
    # derivative by its factor.
    (d_elements,) = pullback(zeros + operands.row_factor[:, None])
    # Written to memory once. XLA on a TPU would write the float32 logits, and compute it twice.
    d_logits = jax.lax.optimization_barrier(d_elements["logits"].astype(kernel.dtype))
    factors = (d_logits, operands.features) if plan.transposed else (operands.features, d_logits)
    gradients: Gradients = {
        "features": matmul(d_logits, kernel, 1, label_dim),
        "kernel": matmul(factors[0], factors[1], 0, 0),
    }
    if operands.bias is not None:
        gradients["bias"] = sum_of_rows(d_elements["logits"], d_logits)
    if operands.labels is not None and jnp.issubdtype(operands.labels.dtype, jnp.floating):
        gradients["labels"] = d_elements["labels"]
    if operands.per_label:
        gradients["per_label"] = tuple(jnp.sum(each, axis=0) for each in d_elements["per_label"])
    if operands.label_smoothing is not None:
        gradients["label_smoothing"] = jnp.sum(d_elements["label_smoothing"])
    return by_row, gradients


def full_pass(
    plan: Plan, operands: Operands, with_gradients: bool, first_label: jax.Array | int
) -> tuple[jax.Array, Gradients]:
    """The unscaled loss of each row and the gradients of Σ row_factor · loss.

    `first_label` is the id of the label 0 of these operands.
    """
    chunk_size, num_labels = plan.chunk_size, plan.num_labels(operands.kernel)

    def one_chunk(start: jax.Array | int, size: int) -> tuple[jax.Array, Gradients]:
        by_row, parts = chunk_pass(plan, operands, with_gradients, first_label, start, size)
        for name in {"kernel", "labels"} & parts.keys():  # as large as their operands
            parts[name] = parts[name].astype(gradient_dtype(getattr(operands, name)))
        return by_row, parts

    # A symbolic number of labels is one chunk, and cannot be divided.
    whole = 0 if num_labels == chunk_size else max(num_labels - 1, 0) // chunk_size
    start = whole * chunk_size
    # The last chunk, which may be smaller, comes first: the sums of the loop start from its own.
    by_row, parts = one_chunk(start, num_labels - start)
    if not whole:
        return by_row, parts

    def put(name: str, gradient: Any, part: Any, start: jax.Array | int) -> Any:
        """A gradient with that of a chunk written into it, or added to it."""
        if name not in LABELLED:
            return gradient + part
        axis = plan.label_dim_of(name)

        def written(array: jax.Array, own: jax.Array) -> jax.Array:
            # By its type the sum is on the mesh of `array`: see `empty`.
            return dynamic_update_slice_in_dim(array, own + jnp.zeros_like(own), start, axis)

        return jax.tree.map(written, gradient, part)

    def empty(name: str, part: Any) -> Any:
        """Zeros for all labels, into which `part` can be written once zeros are added to it.

        In a `jax.set_mesh` of explicit axes new arrays are on its mesh, by their types. Arrays made
        before are not, and JAX writes nothing of one kind into the other.
        """
        axis = plan.label_dim_of(name)

        def zeros(part: jax.Array, operand: jax.Array) -> jax.Array:
            of_one_label = jax.lax.slice_in_dim(jnp.zeros_like(part), 0, 1, axis=axis)
            return jnp.broadcast_to(of_one_label, operand.shape)

        return jax.tree.map(zeros, part, getattr(operands, name))

    gradients = {
        name: put(name, empty(name, part), part, start) if name in LABELLED else part
        for name, part in parts.items()
    }

    def step(
        carry: tuple[jax.Array, Gradients], start: jax.Array
    ) -> tuple[tuple[jax.Array, Gradients], None]:
        by_row, gradients = carry
        more, parts = one_chunk(start, chunk_size)
        gradients = {name: put(name, gradients[name], parts[name], start) for name in parts}
        return (by_row + more, gradients), None

    starts = jnp.arange(whole, dtype=jnp.int32) * chunk_size
    (by_row, gradients), _ = jax.lax.scan(step, (by_row, gradients), starts)
    return by_row, gradients


def finite_rows(by_row: jax.Array, operands: Operands) -> jax.Array:
    """The loss of each row, without what a weight of 0 drops."""
    if operands.weightless is None:
        return by_row
    return jnp.where(operands.weightless & ~jnp.isfinite(by_row), 0, by_row)


def scaled_sum(by_row: jax.Array, operands: Operands) -> jax.Array:
    return jnp.sum(finite_rows(by_row, operands) * operands.row_factor)


# JAX traces the rules below once for a compiled function, not once for each set of arguments that
# is differentiated. So they return the gradients of all operands. The compiler removes those that
# nobody uses.


def empty_operands(operands: Operands) -> Operands:
    """Residuals that tell the dtypes of the operands and keep none of them."""
    return jax.tree.map(lambda operand: jnp.zeros(0, operand.dtype), operands)


def cotangents(gradients: Gradients, operands: Operands) -> tuple[Operands]:
    """One per operand, in its dtype; None for what has no gradient."""
    given = {
        name: jax.tree.map(lambda a, b: a.astype(b.dtype), gradient, getattr(operands, name))
        for name, gradient in gradients.items()
    }
    values: list[Any] = [given.get(name) for name in Operands._fields]
    return (Operands(*values),)


# total_loss = Σ row_factor · loss of each row. The cotangent is one number, so the gradients are
# computed with the loss and multiplied by it. A higher derivative goes through that forward rule.


def total_loss_impl(plan: Plan, operands: Operands) -> jax.Array:
    by_row, _ = plan.run(operands, False)
    return scaled_sum(by_row, operands)


def total_loss_fwd(plan: Plan, operands: Operands) -> tuple[jax.Array, Any]:
    by_row, gradients = plan.run(operands, True)
    gradients["row_factor"] = finite_rows(by_row, operands)
    gradients["features"] = gradients["features"].astype(gradient_dtype(operands.features))
    return scaled_sum(by_row, operands), (gradients, empty_operands(operands))


def total_loss_bwd(plan: Plan, residuals: Any, g: jax.Array) -> tuple[Operands]:
    gradients, operands = residuals
    scaled = jax.tree.map(lambda gradient: g * gradient.astype(g.dtype), gradients)
    return cotangents(scaled, operands)


total_loss = jax.custom_vjp(total_loss_impl, nondiff_argnums=(0,))
total_loss.defvjp(total_loss_fwd, total_loss_bwd)


# row_losses = the loss of each row, without `row_factor`. The cotangent of each row is its factor
# in the gradients, so the backward pass computes them.


def row_losses_impl(plan: Plan, operands: Operands) -> jax.Array:
    return plan.run(operands, False)[0]


def row_losses_fwd(plan: Plan, operands: Operands) -> tuple[jax.Array, Operands]:
    return row_losses_impl(plan, operands), operands


def row_losses_bwd(plan: Plan, operands: Operands, g: jax.Array) -> tuple[Operands]:
    _, gradients = plan.run(operands._replace(row_factor=g), True)
    return cotangents(gradients, operands)


row_losses = jax.custom_vjp(row_losses_impl, nondiff_argnums=(0,))
row_losses.defvjp(row_losses_fwd, row_losses_bwd)


def default_chunk_size(batch: int, num_labels: int) -> int:
    """All labels where one chunk is faster than several, else a good part of them.

    On a CPU 2^19 float32 logits are 2 MB and stay in the cache of a core. `benchmarks/head.py`
    finds no fixed size that is more than 10 % faster. Elsewhere 2^23 logits, 32 MB, and at most
    2^15 labels keep the products large. The compilers' count of bytes chose that; no clock did.

    Of symbolic sizes (`jax.export`) little is known: all of so many labels, few of so many rows.
    """
    if not isinstance(num_labels, int):
        return num_labels
    if not isinstance(batch, int):
        return min(num_labels, 512)
    cells, most = (2**19, 2048) if jax.default_backend() == "cpu" else (2**23, 2**15)
    chunk_size = min(max(cells // max(batch, 1) // 128 * 128, 512), most)
    return num_labels if num_labels <= 2 * chunk_size else chunk_size
