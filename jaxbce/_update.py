"""A training step of the head in which the gradient of its kernel never exists as a whole."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxbce import _checks, _kernels, _linear, _operands, _placement, _reduce, _sharding


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
    loss: Callable[..., jax.Array] | None = None,
    positives: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    per_label: Sequence[ArrayLike] = (),
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    ignored: ArrayLike | None = None,
    reduction: str = "mean",
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
      features: float array [..., D].
      params: {"kernel": [D, L]} or {"kernel": [D, L], "bias": [L]}.
      opt_state: optimizer.init(params), or what the last step returned.
      loss: a function of logits, labels and numbers per label, as in `linear_loss`; None is that of
        `linear_bce_with_logits`.
      positives: integer array [..., P] of label ids, padded with -1. Exactly one of positives and
        labels is given.
      labels: float, integer or bool array [..., L].
      per_label: real arrays [L] for the loss, as in `linear_loss`.
      weight: real array [...], one number per row; None is 1.
      pos_weight: real array [L], where loss is None; None is 1.
      label_smoothing: number in [0, 1], where loss is None.
      where: bool array that broadcasts to [..., L]; None keeps everything.
      ignored: integer array [..., I] of label ids to leave out of each row, padded with -1.
      reduction: "mean", "weighted_mean", "sum" or "batchmean", as in `linear_bce_with_logits`.
      chunk_size: number of labels at a time; None chooses.
      rounding_key: a key of `jax.random`. Parameters in bfloat16 are then rounded up or down at
        random, so that the expected value is exact and a small step is not always lost. None rounds
        to the nearest.
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
        parameters, params is not such a dict, an array is of the wrong dtype, or as `linear_loss`.
      ValueError: the optimizer mixes elements, if only in some steps (clipping by a global norm,
        factored moments, trust ratios, skipping what is not finite), depends on the number of
        labels, or holds a traced value, opt_state is not that of the optimizer and params,
        pos_weight or label_smoothing are given with a loss, rounding_key without parameters in
        bfloat16, or as `linear_loss`.

    Edge values: what is masked or has a weight of 0 has no part in the step. Under `rounding_key`
    NaN and infinities stay, and no finite number becomes infinite.

    Differentiable: no; it is a step, not a loss.

    Example:
      >>> import jax.numpy as jnp, optax, jaxbce
      >>> optimizer = optax.adam(0.1)
      >>> params = {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}
      >>> step = jaxbce.linear_update(optimizer, jnp.ones((2, 3)), params, optimizer.init(params),
      ...     positives=jnp.array([[4, -1], [0, 4]]))
      >>> print(jnp.sign(step.params["bias"]))
      [ 0. -1. -1. -1.  1.]

    Source: the heads of Jain et al. 2023, "Renee", and of Lin et al. 2025, "ELMO", for any
    elementwise loss and optimizer; the rounding is that of Gupta et al. 2015.
    """
    name = "linear_update"
    _checks.check_choice(name, "reduction", reduction, _reduce.REDUCTIONS[:-1])
    devices = _sharding.Devices.named(
        name, chunk_size, mesh, batch_axis=batch_axis, label_axis=label_axis
    )
    if loss is not None and (pos_weight is not None or label_smoothing != 0):
        raise ValueError(
            f"{name}: pos_weight and label_smoothing belong to the loss that is built in, got a "
            "loss of your own; it takes its options itself, and arrays as per_label"
        )
    if loss is None and len(per_label):
        raise ValueError(
            f"{name}: per_label belongs to a loss of your own, got loss=None; pass a loss, or "
            "pos_weight"
        )
    layout = _layout(name, optimizer, params, opt_state)
    numbers = {"pos_weight": pos_weight} if loss is None else _operands.numbered(name, per_label)
    arrays = _operands.admit(
        name,
        features,
        params["kernel"],
        params.get("bias"),
        positives=positives,
        labels=labels,
        per_label=numbers,
        weight=weight,
        label_smoothing=label_smoothing,
        where=where,
        ignored=ignored,
    )
    if rounding_key is not None and params["kernel"].dtype != jnp.bfloat16:
        raise ValueError(
            f"{name}: rounding_key is for parameters in bfloat16, got {params['kernel'].dtype}; "
            "leave it out"
        )
    chunk_loss = _linear.bce if loss is None else _operands.own_loss(name, loss, len(per_label))
    step: LinearUpdate = _update(
        *arrays,
        opt_state,
        rounding_key,
        name=name,
        reduction=reduction,
        loss=chunk_loss,
        optimizer=optimizer,
        layout=layout,
        devices=devices,
    )
    return step


class Layout(NamedTuple):
    """Which leaves of the optimizer's state have a column, or a number, for each label."""

    structure: Any
    by_label: tuple[bool, ...]

    def split(self, state: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        """The leaves by label, and the others, as the number of steps."""
        leaves = list(zip(jax.tree.leaves(state), self.by_label, strict=True))
        return [leaf for leaf, cut in leaves if cut], [leaf for leaf, cut in leaves if not cut]

    def join(self, by_label: Sequence[jax.Array], others: Sequence[jax.Array]) -> Any:
        sources = {True: iter(by_label), False: iter(others)}
        return jax.tree.unflatten(self.structure, [next(sources[cut]) for cut in self.by_label])


def _layout(name: str, optimizer: Any, params: Any, opt_state: Any) -> Layout:
    """How the state is cut by label, if the optimizer allows it."""
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

    def state_with(more: int) -> Any:
        """What the state looks like for so many labels more."""
        return jax.eval_shape(
            init,
            {
                argument: jax.ShapeDtypeStruct((*a.shape[:-1], a.shape[-1] + more), a.dtype)
                for argument, a in arrays.items()
            },
        )

    own, wider = state_with(0), state_with(1)
    expected = [leaf.shape for leaf in jax.tree.leaves(own)]
    got = [jnp.shape(leaf) for leaf in jax.tree.leaves(opt_state)]
    structures: list[Any] = [jax.tree.structure(opt_state), jax.tree.structure(own)]
    if structures[0] != structures[1] or got != expected:
        raise ValueError(
            f"{name}: opt_state must be optimizer.init(params), with arrays of shapes {expected}, "
            f"got {got}"
        )
    by_label = tuple(
        a.shape != b.shape and b.shape == (*a.shape[:-1], a.shape[-1] + 1)
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(wider), strict=True)
    )
    leaves = zip(expected, by_label, strict=True)
    mixed = next((shape for shape, cut in leaves if not cut and shape), None)
    if mixed is not None:
        raise ValueError(
            f"{name}: optimizer keeps state of shape {mixed}, which is not one column or number "
            "for each label; use one that treats elements independently, as optax.adam does"
        )
    dtypes = tuple((argument, _kernels.accumulator(array)) for argument, array in arrays.items())
    if _mixes(name, optimizer, dtypes):
        raise ValueError(
            f"{name}: optimizer treats elements together, as clipping by a global norm, trust "
            "ratios and tests for NaN do; its step needs the whole gradient, so use "
            "jax.value_and_grad of jaxbce.linear_bce_with_logits or linear_loss with it, or an "
            "optimizer that treats elements independently, as optax.clip does"
        )
    return Layout(jax.tree.structure(own), by_label)


def _step(optimizer: Any, gradients: Any, params: Any, state: Any) -> tuple[Any, Any]:
    with jax.numpy_dtype_promotion("standard"):  # a user's own setting may refuse what optax does
        updates, state = optimizer.update(gradients, state, params)
    return jax.tree.map(jnp.add, params, updates), state


@functools.lru_cache(maxsize=64)
def _mixes(name: str, optimizer: Any, dtypes: tuple[tuple[str, Any], ...]) -> bool:
    """Whether a step reduces over labels, if only in some steps, or is not that of its halves.

    What permutes labels, or knows their places, reduces nothing.
    """
    rng = np.random.default_rng(0)
    width, labels = 5, 6
    shapes = {"kernel": (width, labels), "bias": (labels,)}
    params, gradients = (
        {argument: rng.normal(size=shapes[argument]).astype(dtype) for argument, dtype in dtypes}
        for _ in range(2)
    )

    @jax.jit
    def step(params: Any, gradients: Any) -> list[Any]:
        return jax.tree.leaves(_step(optimizer, gradients, params, optimizer.init(params)))

    try:
        jaxpr = jax.make_jaxpr(step)(params, gradients)
    except TypeError as error:
        raise TypeError(
            f"{name}: optimizer.update must take (gradients, state, params) and no more, of any "
            f"number of labels: an array for each label belongs in its state; got {error}"
        ) from error
    if not set(_reduced(jaxpr.jaxpr)) <= {1, width}:
        return True
    # Now, while a program is traced, and whatever its settings say of transfers.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        whole, *halves = (
            step(*jax.tree.map(lambda array, part=part: array[..., part], (params, gradients)))
            for part in (slice(labels), slice(3), slice(3, labels))
        )
        if any(isinstance(leaf, jax.core.Tracer) for leaf in whole):
            raise ValueError(
                f"{name}: optimizer must hold no traced value; pass a learning rate that is "
                "traced through optax.inject_hyperparams, which keeps it in opt_state"
            )
        joined = (
            np.concatenate(apart, axis=-1) if np.ndim(together) else np.array(apart)
            for together, *apart in zip(whole, *halves, strict=True)
        )
        return not all(map(functools.partial(np.allclose, rtol=1e-5), joined, whole))


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Of a program, wherever in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _reduced(jaxpr: Any) -> Iterator[int]:
    """The sizes of the axes over which a program sums, compares or sorts."""
    for equation in _equations(jaxpr):
        primitive, params = equation.primitive.name, equation.params
        axes: Sequence[int] = ()
        if primitive.startswith(("reduce_", "arg")):
            axes = params.get("axes", ())
        elif primitive == "dot_general":
            axes = params["dimension_numbers"][0][0]
        elif primitive.startswith(("cum", "sort")):
            axes = [params.get("axis", params.get("dimension"))]
        yield from (equation.invars[0].aval.shape[axis] for axis in axes)


def _outline(optimizer: Any, params: dict[str, jax.Array], num_labels: int) -> list[str]:
    """What the optimizer does to so many labels, but for the shapes: operations and numbers."""
    shapes = {
        argument: jax.ShapeDtypeStruct((*a.shape[:-1], num_labels), _kernels.accumulator(a))
        for argument, a in params.items()
    }
    jaxpr = jax.make_jaxpr(lambda p: _step(optimizer, p, p, optimizer.init(p)))(shapes)
    outline = []
    for equation in _equations(jaxpr.jaxpr):
        literals = [each.val for each in equation.invars if hasattr(each, "val")]
        given = [each for each in equation.params.values() if isinstance(each, (int, float, str))]
        outline.append(f"{equation.primitive.name} {literals} {given}")
    return outline


def _specs(features: Any, kernel: Any, bias: Any, *others: Any, **_: Any) -> Any:
    """The results are sharded as what they replace, new state also as its parameter."""

    def of_state(array: Any) -> PartitionSpec:
        like = [each for each in (kernel, bias) if jnp.shape(each) == jnp.shape(array)]
        return _placement.common_spec(array, *like)

    own: Any = jax.tree.map(_placement.common_spec, (features, kernel, bias))
    state = jax.tree.map(of_state, others[-2])
    params = {"kernel": own[1]} | ({} if bias is None else {"bias": own[2]})
    specs: tuple[Any, ...] = (PartitionSpec(), own[0], params, state)
    return LinearUpdate(*specs)


@_placement.compiled("name", "reduction", "loss", "optimizer", "layout", "devices", result=_specs)
def _update(
    *arrays: Any,
    name: str,
    reduction: str,
    loss: _linear.ChunkLoss,
    optimizer: Any,
    layout: Layout,
    devices: _sharding.Devices,
) -> LinearUpdate:
    *given, opt_state, key = arrays
    _, operands, _ = _operands.prepare(*given, name=name, reduction=reduction, loss=loss)
    params = {"kernel": operands.kernel}
    if operands.bias is not None:
        params["bias"] = operands.bias
    state, others = layout.split(jax.tree.map(jnp.asarray, opt_state))

    def new_columns(gradients: Any, columns: Any, others: Any, key: Any) -> tuple[Any, Any]:
        """(Parameters, state) of some labels, and the rest of the state, after a step."""
        (params, state), wide_others = jax.tree.map(_widened, (columns, others))
        whole_state = layout.join(state, wide_others)
        params, new_state = _step(optimizer, gradients, params, whole_state)
        state, new_others = layout.split(new_state)
        rounded = {
            argument: _rounded(params[argument], old.dtype, _key(key, i))
            for i, (argument, old) in enumerate(columns[0].items())
        }
        new_others = jax.tree.map(_like, new_others, others)
        return (rounded, jax.tree.map(_like, state, columns[1])), new_others

    how = devices.over(name, *operands.sizes(), loss)
    num_labels = operands.kernel.shape[1]
    if how.chunk_size != num_labels and (
        _outline(optimizer, params, how.chunk_size) != _outline(optimizer, params, num_labels)
    ):
        raise ValueError(
            f"{name}: optimizer treats a chunk of {how.chunk_size} labels differently from all "
            f"{num_labels}, as a mask or a scale that depends on a size does; let it depend on the "
            "name or the number of axes of a parameter"
        )
    pass_over = functools.partial(update_pass, new_columns)
    rows, slope, (params, state), others = how.update(
        pass_over, operands, (params, state), others, key
    )
    features = jnp.asarray(given[0])
    return LinearUpdate(
        _linear.scaled_sum(rows, operands.scale),
        slope.reshape(features.shape).astype(features.dtype),
        params,
        layout.join(state, others),
    )


def _widened(array: jax.Array) -> jax.Array:
    """In the dtype of the arithmetic, if it is of a floating dtype."""
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(_kernels.accumulator(array)) if floating else array


def _like(array: jax.Array, old: jax.Array) -> jax.Array:
    return array.astype(old.dtype)


def _key(key: jax.Array | None, i: jax.Array | int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, i)


def _rounded(values: jax.Array, dtype: Any, key: jax.Array | None) -> jax.Array:
    if key is None or dtype != jnp.bfloat16:
        return values.astype(dtype)
    return round_with(jax.random.bits(key, values.shape, jnp.uint16), values.astype(jnp.float32))


def round_with(noise: jax.Array, values: jax.Array) -> jax.Array:
    """`values` in float32 rounded to bfloat16, up with the probability of what is cut off.

    A bfloat16 is the upper half of a float32. 16 random bits added to the lower half carry into the
    upper one as often as the lower half is a part of 2¹⁶.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    upper = (bits + noise.astype(jnp.uint32)) >> 16
    infinity, largest, sign = (jnp.uint32(code) for code in (0x7F80, 0x7F7F, 0x8000))
    upper = jnp.where((upper & ~sign) >= infinity, largest | (upper & sign), upper)
    rounded = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(values), rounded, values.astype(jnp.bfloat16))


def update_pass(
    new_columns: Callable[..., Any],
    operands: _linear.Operands,
    columns: Any,
    others: Any,
    key: jax.Array | None,
    loss: _linear.ChunkLoss,
    chunk_size: int,
    offset: jax.Array | int = 0,
    total: Callable[[str, jax.Array], jax.Array] = lambda name, part: part,
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """The loss of each row, the gradient of the features, and what `columns`, others` become.

    `total` sums the gradient of a parameter over the devices that share its labels.

    A chunk is written one turn after it was read, and waits in the loop's carry. So no array is
    read after it is written in the same turn, which would make XLA copy the whole of it.
    """
    num_labels = operands.kernel.shape[1]

    def read(columns: Any, start: jax.Array | int) -> Any:
        return jax.tree.map(lambda array: _linear.columns(array, start, chunk_size), columns)

    def write(columns: Any, part: Any, start: jax.Array | int) -> Any:
        return jax.tree.map(lambda array, new: _linear.write(array, new, start), columns, part)

    def one_chunk(columns: Any, first: jax.Array | int) -> tuple[jax.Array, ...]:
        """Of the labels from `first` on: the loss of each row, the gradients, what they become."""
        # The last chunk is as large as the others and starts among labels that are done.
        start = jnp.minimum(first, num_labels - chunk_size)
        due = None
        if num_labels % chunk_size:
            due = start + jnp.arange(chunk_size, dtype=jnp.int32) >= first
        params = columns[0]
        now = operands._replace(kernel=params["kernel"], bias=params.get("bias"))
        rows, parts = _linear.chunk_pass(now, loss, True, offset, start, chunk_size, due)
        gradients = {
            argument: total(argument, parts[argument]).astype(_kernels.accumulator(array))
            for argument, array in params.items()
        }
        old = read(columns, start)
        new, new_others = new_columns(gradients, old, others, _key(key, offset + start))
        if due is not None:
            new = jax.tree.map(lambda after, before: jnp.where(due, after, before), new, old)
        return rows, parts["features"], new, start, new_others

    if chunk_size == num_labels:
        rows, slope, columns, _, others = one_chunk(columns, 0)
        return rows, slope, columns, others

    def turn(carry: Any, first: jax.Array) -> tuple[Any, None]:
        rows, slope, columns, new, written_at, _ = carry
        columns = write(columns, new, written_at)
        more, more_slope, *rest = one_chunk(columns, first)
        return (rows + more, slope + more_slope, columns, *rest), None

    batch, width = operands.features.shape
    dtype = _kernels.accumulator(operands.features)
    sums = jnp.zeros(batch, dtype), jnp.zeros((batch, width), dtype)
    (rows, slope), _ = _placement.vary_together((sums, operands))
    firsts = jnp.arange(-(-num_labels // chunk_size), dtype=jnp.int32) * chunk_size
    start = firsts[0]
    carry = rows, slope, columns, read(columns, start), start, others
    (rows, slope, columns, new, start, others), _ = jax.lax.scan(turn, carry, firsts)
    return rows, slope, write(columns, new, start), others
