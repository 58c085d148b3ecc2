"""A training step of the head in which the gradient of its kernel never exists as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxbce import _checks, _math, _placement
from jaxbce._head import arguments, chunks, optimizers, rounding
from jaxbce._head.arguments import Given
from jaxbce._head.chunks import Plan
from jaxbce._head.loss import ChunkLoss, built_in_loss, own_loss
from jaxbce._head.mesh import MeshPlan, PlanOptions
from jaxbce._loss import Loss
from jaxbce._reduce import ScalarReduction


class Optimizer(Protocol):
    """What `linear_update` needs of an optax transformation."""

    @property
    def init(self) -> Callable[..., Any]: ...
    @property
    def update(self) -> Callable[..., Any]: ...


class LinearUpdate(NamedTuple):
    """What `linear_update` returns: loss and gradient are those before the step."""

    loss: jax.Array
    features_gradient: jax.Array  # [..., D], in the dtype of the features
    params: dict[str, jax.Array]
    opt_state: Any


def linear_update(
    optimizer: Optimizer,
    features: ArrayLike,
    params: dict[str, jax.Array],
    opt_state: Any,
    *,
    loss: Loss | Callable[..., jax.Array] | None = None,
    positives: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    per_label: Sequence[ArrayLike] = (),
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    ignored: ArrayLike | None = None,
    reduction: ScalarReduction = "mean",
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    rounding_key: jax.Array | None = None,
    mesh: Mesh | None = None,
    batch_axis: str | tuple[str, ...] | None = None,
    label_axis: str | tuple[str, ...] | None = None,
) -> LinearUpdate:
    """One step of an optimizer on a linear layer, without the gradient of its kernel.

    Use it where the gradient of the kernel, which is as large as the kernel, has no room: each
    chunk of the parameters and of the optimizer's state is updated as soon as its gradient is
    known. With `params` and `opt_state` donated to `jax.jit` the memory beyond them is a few
    chunks. The gradient of the features goes on into the model below:
    `features, backward = jax.vjp(model, w)`, then `backward(step.features_gradient)`.

    Formula: the step is that of `jax.value_and_grad` of the loss, `optimizer.update` and
    `optax.apply_updates`, to rounding.

    Args:
      optimizer: an optax transformation that treats elements independently: sgd, adam, adamw, lion,
        rmsprop, schedules, weight decay, chains of them. Keep one: a new one is compiled anew.
        Numbers that it reads elsewhere are compiled in, and a call without `jax.jit` compiles anew
        when they change.
      features: float array [..., D].
      params: {"kernel": [D, L]} or {"kernel": [D, L], "bias": [L]}; [L, D] with transpose_kernel.
        A kernel in float8_e4m3fn or float8_e5m2 is multiplied in bfloat16, or in a wider dtype of
        the features.
      opt_state: optimizer.init(params), or what the last step returned. Each array keeps its dtype:
        init of parameters in float32 is a state in float32. It cannot be in float8.
      loss: a `jaxbce.Loss`, or a function of logits, labels and numbers per label, as in
        `linear_loss`; None is that of `linear_bce_with_logits`.
      positives: integer array [..., P] of label ids, padded with -1. Exactly one of positives and
        labels is given.
      labels: float, integer or bool array [..., L].
      per_label: real arrays [L] for the loss, as in `linear_loss`.
      weight: real array [...], one number per row; None is 1.
      pos_weight: real array [L], at least 0, where loss is None; None is 1.
      label_smoothing: number in [0, 1], where loss is None.
      where: bool array that broadcasts to [..., L]; None keeps everything.
      ignored: integer array [..., I] of label ids to leave out of each row, padded with -1.
      reduction: "mean", "weighted_mean", "sum" or "batchmean", as in `linear_bce_with_logits`.
      transpose_kernel: True for a kernel [L, D]; so are its moments.
      chunk_size: number of labels at a time; None chooses.
      rounding_key: a key of `jax.random`, another one for each step. Parameters and state in half
        precision, and parameters in float8, are then rounded up or down at random, so that the
        expected value is exact and a small step is not always lost. None rounds to the nearest:
        float8 then loses most steps.
      mesh: devices to share the work; None uses one.
      batch_axis: axis of the mesh, or a tuple, over which the rows are sharded; None replicates
        them.
      label_axis: axis of the mesh, or a tuple, over which the labels, the parameters and the state
        are sharded; None replicates them.

    Returns:
      `LinearUpdate(loss, features_gradient, params, opt_state)`: the loss and its gradient with
      respect to the features before the step, the parameters and the state after it.

    Raises:
      TypeError: optimizer has no init and update, its update needs more than gradients, state and
        parameters, params is not such a dict, an array is of the wrong dtype, as state in float8,
        or as `linear_loss`.
      ValueError: the program of the optimizer does not prove that it treats each label apart in
        every step (clipping by a global norm, factored moments, trust ratios, noise, sorting,
        skipping what is not finite), it depends on the number of labels, or holds a traced value,
        opt_state is not that of the optimizer and params, pos_weight or label_smoothing are given
        with a loss, rounding_key without parameters or state of less than 32 bits, or as
        `linear_loss`.

    Edge values: what is masked or has a weight of 0 has no part in the step. Under `rounding_key`
    NaN and infinities stay, and no finite number becomes infinite or NaN; float8_e4m3fn has no
    infinity, so there an infinite number becomes NaN.

    Differentiable: no; it is a step, not a loss.

    Example:
      >>> import jax.numpy as jnp, optax, jaxbce
      >>> optimizer = optax.adam(0.1)
      >>> params = {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}
      >>> step = jaxbce.linear_update(optimizer, jnp.ones((2, 3)), params, optimizer.init(params),
      ...     positives=jnp.array([[4, -1], [0, 4]]))
      >>> print(jnp.sign(step.params["bias"]))
      [ 0. -1. -1. -1.  1.]

    Source: the heads of Jain et al. 2023, "Renee", and of Zhang et al. 2025, "ELMO", for any
    elementwise loss and optimizer; the rounding is that of Gupta et al. 2015.
    """
    name = "linear_update"
    _checks.check_choice(name, "reduction", reduction, ScalarReduction)
    options = PlanOptions.checked(
        name, transpose_kernel, chunk_size, mesh, batch_axis=batch_axis, label_axis=label_axis
    )
    smoothing = _checks.fraction_or_none(name, "label_smoothing", label_smoothing)
    if loss is not None and (pos_weight is not None or smoothing is not None):
        raise ValueError(
            f"{name}: pos_weight and label_smoothing belong to the loss that is built in, got a "
            "loss of your own; it takes its options itself, and arrays as per_label"
        )
    if loss is None and (per_label is None or len(per_label)):
        raise ValueError(
            f"{name}: per_label belongs to a loss of your own, got loss=None; pass a loss, or "
            "pos_weight"
        )
    layout = optimizers.layout_of(name, optimizer, params, opt_state, transpose_kernel)
    rounding.check(name, rounding_key, params, opt_state)
    if loss is None:
        chunk_loss, per_label = built_in_loss(pos_weight)
    else:
        chunk_loss = own_loss(name, loss, per_label, features, params["kernel"])
    layer, targets = (features, params["kernel"], params.get("bias")), (positives, labels)
    given = Given(*layer, *targets, weight, label_smoothing, where, ignored, per_label)
    return _update(
        arguments.for_jit(name, chunk_loss, given),
        opt_state,
        rounding_key,
        name=name,
        reduction=reduction,
        loss=chunk_loss,
        optimizer=optimizer,
        layout=layout,
        options=options,
    )


def _specs(given: Given, opt_state: Any, *_: Any, **__: Any) -> Any:
    """The results are sharded as what they replace, new state also as its parameter."""
    params = {"kernel": given.kernel} | ({} if given.bias is None else {"bias": given.bias})

    def of_state(array: Any) -> PartitionSpec:
        like = [each for each in params.values() if jnp.shape(each) == jnp.shape(array)]
        return _placement.common_spec(array, *like)

    specs: tuple[Any, ...] = (
        PartitionSpec(),
        *jax.tree.map(_placement.common_spec, (given.features, params)),
        jax.tree.map(of_state, opt_state),
    )
    return LinearUpdate(*specs)


@_placement.compiled(result=_specs)
def _update(
    given: Given,
    opt_state: Any,
    key: jax.Array | None,
    *,
    name: str,
    reduction: ScalarReduction,
    loss: ChunkLoss,
    optimizer: Any,
    layout: optimizers.Layout,
    options: PlanOptions,
) -> LinearUpdate:
    _, operands, _, (batch, num_labels) = arguments.prepare(
        given, name=name, reduction=reduction, loss=loss, transposed=options.transposed
    )
    params = {"kernel": operands.kernel}
    if operands.bias is not None:
        params["bias"] = operands.bias
    opt_state = jax.tree.map(jnp.asarray, opt_state)
    plan = options.plan(name, batch, num_labels, loss=loss)
    axes = optimizers.label_dims(params, options.transposed)
    # The second size of the proof is that of a chunk, which is run. Without chunks any will do.
    other = plan.chunk_size if plan.chunk_size < num_labels else num_labels + 1
    optimizers.check_by_label(name, optimizer, layout, params, axes, opt_state, other)

    def new_parts(gradients: Any, parts: Any, others: Any, key: Any, start: Any) -> tuple[Any, Any]:
        """(Parameters, state) of the labels from `start` on, and the other state, after a step."""
        params, state = parts
        params, state = optimizers.step(optimizer, gradients, params, layout.join(state, others))
        state, new_others = layout.split(state)
        # State without an axis of labels, such as the number of steps, must come out the same in
        # every chunk. So it is rounded with the same key, that of a label after the last one.
        return (
            rounding.rounded((params, state), parts, rounding.key_of(key, start)),
            rounding.rounded(new_others, others, rounding.key_of(key, num_labels)),
        )

    state, others = layout.split(opt_state)
    by_label = ByLabel(
        arrays=(params, state),
        axes=(axes, [axis for axis in layout.axes if axis is not None]),
        dtypes=jax.tree.map(lambda array: array.dtype, (params, state)),
    )

    def on_values(operands: chunks.Operands, arrays: Any, others: Any, key: Any) -> Any:
        return update_pass(plan, new_parts, operands, by_label._replace(arrays=arrays), others, key)

    def on_bits(operands: chunks.Operands, arrays: Any, others: Any, key: Any) -> Any:
        *sums, arrays, others = on_values(
            operands, jax.tree.map(rounding.as_bits, arrays), others, key
        )
        return *sums, jax.tree.map(rounding.with_bits, arrays, by_label.dtypes), others

    def on_tables(operands: chunks.Operands, arrays: Any, others: Any, key: Any) -> Any:
        def new_tables(slopes: Any, parts: Any, *rest: Any) -> tuple[Any, Any]:
            new, new_others = new_parts(turned(slopes), turned(parts), *rest)
            return turned(new), new_others

        operands = operands._replace(kernel=operands.kernel.T)
        axes = jax.tree.map(lambda array, axis: array.ndim - 1 - axis, arrays, by_label.axes)
        held = by_label._replace(arrays=turned(arrays), axes=axes)
        tables = dataclasses.replace(plan, transposed=True)
        *sums, arrays, others = update_pass(tables, new_tables, operands, held, others, key)
        return *sums, turned(arrays), others

    def local(operands: chunks.Operands, arrays: Any, others: Any, key: Any) -> Any:
        forms: dict[str, Any] = {}
        if any(rounding.is_float_below(array, 16) for array in params.values()):
            # XLA on a CPU would convert all of the kernel to float16 and back for each chunk.
            forms["cpu"] = on_bits
        if not plan.transposed and lies_transposed(operands.kernel):
            forms["tpu"] = on_tables
        given = operands, arrays, others, key
        if not forms:
            return on_values(*given)
        return jax.lax.platform_dependent(*given, **forms, default=on_values)

    run = local
    if isinstance(plan, MeshPlan):
        specs = plan.specs()
        placed = jax.tree.map(plan.spec_of_labels, by_label.arrays, by_label.axes)
        whole = jax.tree.map(lambda _: PartitionSpec(), (others, key))
        run = plan.shard(
            local,
            (plan.operand_specs(operands), placed, *whole),
            (specs["row_factor"], specs["features"], placed, whole[0]),
        )
    by_row, d_features, (params, state), others = run(operands, by_label.arrays, others, key)
    features = jnp.asarray(given.features)
    return LinearUpdate(
        chunks.scaled_sum(by_row, operands),
        d_features.reshape(features.shape).astype(features.dtype),
        params,
        layout.join(state, others),
    )


def lies_transposed(array: jax.Array) -> bool:
    """Whether XLA on a TPU lays a matrix out column by column, because it needs less padding so.

    Tiles have 128 columns, and 8 rows in float32. A step that reads and writes columns would copy
    the matrix to lay it out row by row. A step on the transposed one, a table, copies nothing.
    """
    (rows, columns), tile = array.shape, 32 // array.dtype.itemsize

    def padded(size: int, to: int) -> int:
        return size + -size % to

    return padded(columns, tile) * padded(rows, 128) < padded(rows, tile) * padded(columns, 128)


def turned(arrays: Any) -> Any:
    """The arrays, with every matrix transposed."""
    return jax.tree.map(jnp.transpose, arrays)


class ByLabel(NamedTuple):
    """Parameters and state with a part for each label, and the axes that count the labels."""

    arrays: Any
    axes: Any
    dtypes: Any  # of parameters and state, of which `arrays` may hold float8 as uint8

    def read(self, start: jax.Array | int, size: int) -> Any:
        def part(array: jax.Array, axis: int, dtype: Any) -> jax.Array:
            return rounding.with_bits(jax.lax.dynamic_slice_in_dim(array, start, size, axis), dtype)

        return jax.tree.map(part, self.arrays, self.axes, self.dtypes)

    def written(self, parts: Any, start: jax.Array | int) -> ByLabel:
        def one(array: jax.Array, axis: int, part: jax.Array) -> jax.Array:
            part = rounding.with_bits(part, array.dtype)
            return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis)

        return self._replace(arrays=jax.tree.map(one, self.arrays, self.axes, parts))

    def chosen(self, labels: jax.Array, new: Any, old: Any) -> Any:
        """The `new` parts of some `labels`, and the `old` ones of the others."""

        def one(new: jax.Array, axis: int, old: jax.Array) -> jax.Array:
            others = [i for i in range(new.ndim) if i != axis]
            return jnp.where(jnp.expand_dims(labels, others), new, old)

        return jax.tree.map(one, new, self.axes, old)


def update_pass(
    plan: Plan,
    new_parts: Callable[..., Any],
    operands: chunks.Operands,
    by_label: ByLabel,
    others: Any,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """The loss of each row, the gradient of the features, and what `by_label` and others become.

    A chunk is written one turn late: a turn writes the chunk of the turn before, then reads its own
    from the result. The array as it was has no later reader, so XLA writes in place. If a turn read
    and wrote the same chunk, XLA would copy the whole array.

    All chunks have one size, unlike those of `full_pass`, because the optimizer is proven for that
    size and for all labels. Where the size does not divide the labels, the last chunk overlaps the
    one before it. The labels that both have are neither counted nor updated again.
    """
    chunk_size, num_labels = plan.chunk_size, plan.num_labels(operands.kernel)
    first_label = plan.first_label(operands.kernel)

    def one_chunk(by_label: ByLabel, first: jax.Array | int) -> tuple[Any, ...]:
        """Of the labels from `first` on: the loss of each row, the gradients, what they become."""
        start = jnp.minimum(first, num_labels - chunk_size)
        due = None
        if num_labels % chunk_size:
            due = start + jnp.arange(chunk_size, dtype=jnp.int32) >= first
        old = by_label.read(start, chunk_size)
        by_row, gradients = chunks.chunk_pass(
            plan, operands, True, first_label, start, chunk_size, due, old[0]
        )
        of_params = {
            name: plan.total(name, gradients[name]).astype(_math.accumulator(array))
            for name, array in old[0].items()
        }
        new, new_others = new_parts(of_params, old, others, key, first_label + start)
        if due is not None:
            new = by_label.chosen(due, new, old)
        return by_row, gradients["features"], new, start, new_others

    if chunk_size == num_labels:
        by_row, d_features, arrays, _, others = one_chunk(by_label, 0)
    else:

        def turn(carry: Any, first: jax.Array) -> tuple[Any, None]:
            by_row, d_features, arrays, new, written_at, _ = carry
            now = by_label._replace(arrays=arrays).written(new, written_at)
            more, more_of_features, *rest = one_chunk(now, first)
            sums = by_row + more, d_features + more_of_features
            return (*sums, now.arrays, *rest), None

        batch, width = operands.features.shape
        dtype = _math.accumulator(operands.features)
        zeros = jnp.zeros(batch, dtype), jnp.zeros((batch, width), dtype)
        sums, _ = _placement.vary_together((zeros, operands))
        firsts = jnp.arange(-(-num_labels // chunk_size), dtype=jnp.int32) * chunk_size
        start = firsts[0]
        carry = *sums, by_label.arrays, by_label.read(start, chunk_size), start, others
        carry, _ = jax.lax.scan(turn, carry, firsts)
        by_row, d_features, arrays, new, start, others = carry
        arrays = by_label._replace(arrays=arrays).written(new, start).arrays
    return plan.total("row_factor", by_row), plan.total("features", d_features), arrays, others
