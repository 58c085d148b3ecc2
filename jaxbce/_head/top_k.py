"""The highest logits of a linear layer, chunk by chunk and device by device."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxbce import _checks, _math, _placement
from jaxbce._head import arguments
from jaxbce._head.chunks import Plan, chunk_logits
from jaxbce._head.mesh import MeshPlan, PlanOptions

Candidates = tuple[jax.Array, jax.Array]  # logits of each row and their labels


class Wanted(NamedTuple):
    k: int
    num_labels: int | None  # what the kernel holds beyond them is padding; None without padding


class Layer(NamedTuple):
    features: jax.Array
    kernel: jax.Array
    bias: jax.Array | None


def linear_top_k(
    features: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    k: int,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    batch_axis: str | tuple[str, ...] | None = None,
    label_axis: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k highest of the logits features @ kernel + bias, which are never held, and their labels.

    Use it to predict with a head of very many labels.

    Formula: `jax.lax.top_k(features @ kernel + bias, k)`.

    Args:
      features: float array [..., D].
      kernel: float array [D, L], or [L, D] with transpose_kernel.
      bias: float array [L]; None is 0.
      k: how many, an int in [1, L].
      transpose_kernel: True for a kernel [L, D], as `linear_bce_with_logits`.
      chunk_size: number of labels at a time, at least k of them; None chooses.
      mesh: devices to share the work, with axes of any type; None uses one, or what `jax.jit` makes
        of sharded inputs.
      batch_axis: axis of the mesh, or a tuple of axes, over which features are sharded; None
        replicates them.
      label_axis: axis of the mesh, or a tuple of axes, over which kernel and bias are sharded; None
        replicates them. Each device keeps to its own labels and sends its k best.

    Returns:
      The logits [..., k] in float32 (float64 where features or kernel are), highest first, and
      their labels [..., k] in int32.

    Raises:
      TypeError: features, kernel or bias are not floating-point, or not an array.
      ValueError: a shape does not fit, an axis of the mesh does not exist, is given for both or
        does not divide its size, or k or chunk_size is not valid.

    Edge values: of equal logits the one of the lowest label comes first, as in `jax.lax.top_k`. NaN
    comes before infinity.

    Differentiable: the logits are, with respect to features, kernel and bias; on a mesh in reverse
    mode only.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> logits, labels = jaxbce.linear_top_k(jnp.ones(2), jnp.array([[1., 3, 2], [1, 1, 2]]), k=2)
      >>> print(logits, labels)
      [4. 4.] [1 2]

    Source: `jax.lax.top_k`, merged over chunks.
    """
    name = "linear_top_k"
    options = PlanOptions.checked(
        name, transpose_kernel, chunk_size, mesh, batch_axis=batch_axis, label_axis=label_axis
    )
    arrays = _checks.jit_arguments(name, features=features, kernel=kernel, bias=bias)
    shape = getattr(arrays[1], "shape", None) or (None,)
    num_labels = shape[0 if transpose_kernel else -1]
    known = len(shape) == 2 and isinstance(num_labels, int)
    _checks.check_size(name, "k", k, num_labels - arguments.padding.value if known else None)
    return _top_k(*arrays, name=name, k=k, options=options)


@_placement.compiled(result=_placement.by_row, results=2)
def _top_k(
    features: Any,
    kernel: Any,
    bias: Any,
    *,
    name: str,
    k: int,
    options: PlanOptions,
) -> tuple[jax.Array, jax.Array]:
    features, kernel, bias, num_labels = arguments.prepare_layer(
        name, features, kernel, bias, options.transposed
    )
    lead = features.shape[:-1]
    features = features.reshape(math.prod(lead), features.shape[-1])
    plan = options.plan(name, features.shape[0], num_labels)
    padding, layer = arguments.padding.value, Layer(features, kernel, bias)
    wanted = Wanted(k, num_labels - padding if padding else None)
    values, ids = (best_of_devices if isinstance(plan, MeshPlan) else candidates)(
        plan, wanted, layer
    )
    return values.reshape(*lead, k), ids.reshape(*lead, k)


# without_sign(x) = x. `jax.lax.top_k` orders NaN and 0 by their signs: that of a NaN is left to
# chance, and two zeros are equal logits.
without_sign = _math.with_jvp(
    lambda x: jnp.where(jnp.isnan(x), jnp.nan, jnp.where(x == 0, 0, x)),
    lambda x: (jnp.ones((), x.dtype),),
)


def best(values: jax.Array, ids: jax.Array, k: int) -> Candidates:
    """The k highest of the candidates of each row; of equal ones, the first."""
    values, order = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, order, axis=1)


def candidates(plan: Plan, wanted: Wanted, layer: Layer) -> Candidates:
    """The highest logits of a device's own labels; of equal ones, the lowest label first."""
    features, kernel, bias = layer
    first_label, k = plan.first_label(kernel), min(wanted.k, plan.num_labels(kernel))
    axis = plan.label_dim_of("kernel")
    num_labels, chunk_size = plan.num_labels(kernel), max(plan.chunk_size, k)
    whole = max(num_labels // chunk_size - 1, 0)
    first_size = num_labels - whole * chunk_size

    def best_of(start: jax.Array | int, size: int) -> Candidates:
        part = dynamic_slice_in_dim(kernel, start, size, axis).astype(features.dtype)
        added = [] if bias is None else [dynamic_slice_in_dim(bias, start, size)]
        logits = chunk_logits(plan, features, part, added)
        id_of_start = first_label + start
        if wanted.num_labels is not None:
            # A bias of −∞ would not do: of an infinite feature the logits of padding are NaN.
            is_label = id_of_start + jnp.arange(size, dtype=jnp.int32)[None] < wanted.num_labels
            logits = jnp.where(is_label, logits, -jnp.inf)
        values, ids = jax.lax.top_k(without_sign(logits), k)
        return values, ids + id_of_start

    def step(found: Candidates, start: jax.Array) -> tuple[Candidates, None]:
        # The lower labels come first, and `best` prefers the first of equal values.
        values, ids = (
            jnp.concatenate(pair, axis=1)
            for pair in zip(found, best_of(start, chunk_size), strict=True)
        )
        return best(values, ids, k), None

    # The first chunk also takes the labels left over; it holds at least k.
    found = best_of(0, first_size)
    if whole:  # `jax.disable_jit` refuses a loop of no turns
        starts = first_size + jnp.arange(whole, dtype=jnp.int32) * chunk_size
        found, _ = jax.lax.scan(step, found, starts)
    return found


def layer_specs(plan: MeshPlan, layer: Layer) -> Any:
    specs: dict[str, Any] = plan.specs()
    return Layer(specs["features"], specs["kernel"], None if layer.bias is None else specs["bias"])


# best_of_devices = the best of all candidates. The cotangent of a result belongs to the candidate
# of the same label. Candidates are found once more in the backward pass: inside another
# `jax.shard_map`, JAX takes no residuals out of this one.


def best_of_devices_impl(plan: MeshPlan, wanted: Wanted, layer: Layer) -> Candidates:
    shared = plan.shard(
        lambda layer: candidates(plan, wanted, layer),
        (layer_specs(plan, layer),),
        (PartitionSpec(plan.batch_axis, plan.label_axis),) * 2,
    )
    # They are gathered on the way from one to the other. What `jax.lax.all_gather` returns counts
    # as different on every device, and could not leave a `jax.shard_map` as one array.
    by_row = (PartitionSpec(plan.batch_axis, None),) * 2
    merged = plan.shard(lambda values, ids: best(values, ids, wanted.k), by_row, by_row)
    return merged(*shared(layer))


def best_of_devices_fwd(plan: MeshPlan, wanted: Wanted, layer: Layer) -> tuple[Candidates, Any]:
    values, ids = best_of_devices_impl(plan, wanted, layer)
    return (values, ids), (layer, ids)


def best_of_devices_bwd(plan: MeshPlan, wanted: Wanted, residuals: Any, g: Any) -> tuple[Layer]:
    layer, ids = residuals

    def local(layer: Layer, ids: jax.Array, g: jax.Array) -> Layer:
        own = functools.partial(candidates, plan, wanted)
        _, pullback, found = jax.vjp(own, layer, has_aux=True)
        chosen = found[:, :, None] == ids[:, None, :]
        gradients: tuple[Layer] = pullback(jnp.sum(jnp.where(chosen, g[:, None, :], 0), axis=2))
        return gradients[0]

    specs, by_row = layer_specs(plan, layer), PartitionSpec(plan.batch_axis, None)
    return (plan.shard(local, (specs, by_row, by_row), specs)(layer, ids, g[0]),)


best_of_devices = jax.custom_vjp(best_of_devices_impl, nondiff_argnums=(0, 1))
best_of_devices.defvjp(best_of_devices_fwd, best_of_devices_bwd)
