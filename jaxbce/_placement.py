"""Where arrays live: on meshes whose types say how arrays are sharded, and in `jax.shard_map`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

Arrays = TypeVar("Arrays")
Function = TypeVar("Function", bound=Callable[..., Any])


def _axes_of(mesh: AbstractMesh, wanted: AxisType) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == wanted)


def manual_axes() -> tuple[str, ...]:
    """Those over which a `jax.shard_map` around has sharded the arrays."""
    return _axes_of(jax.sharding.get_abstract_mesh(), AxisType.Manual)


def _explicit_mesh(arrays: Any) -> AbstractMesh | None:
    """The mesh with explicit axes that the types of the arrays speak of."""
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array)]
    meshes = (jax.typeof(array).sharding.mesh for array in leaves)
    return next((mesh for mesh in meshes if _axes_of(mesh, AxisType.Explicit)), None)


def names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of a mesh that an argument, or an entry of a `PartitionSpec`, names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry


def common_spec(*arrays: jax.Array | None) -> PartitionSpec:
    """How a result of the shape of `arrays[0]` is sharded; the others broadcast to that shape.

    For each dimension the first array decides that shards it. An axis of the mesh shards one
    dimension only, so an entry with an axis that is taken is skipped.
    """
    first = arrays[0]
    if first is None:  # which its check refuses
        return PartitionSpec()
    spec: list[Any] = [None] * first.ndim
    used: set[str] = set()
    for array in arrays:
        if array is not None and array.ndim <= first.ndim:
            own = jax.typeof(array).sharding.spec
            for axis, entry in zip(range(-array.ndim, 0), own, strict=True):
                names = set(names_of(entry))
                # An axis of the mesh shards only one axis of an array.
                if spec[axis] is None and not names & used:
                    spec[axis] = entry
                    used |= names
    return PartitionSpec(*spec)


# How a result is sharded, for `compiled`, which gives these rules what the function gets.


def replicated(*_: Any, **__: Any) -> PartitionSpec:
    """Whole on every device."""
    return PartitionSpec()


def as_first(first: Any, *_: Any, **__: Any) -> PartitionSpec:
    """As the first argument."""
    return common_spec(first)


def by_row(first: Any, *_: Any, **__: Any) -> PartitionSpec:
    """By row as the first argument, and each row whole."""
    return PartitionSpec(*common_spec(first)[:-1], None)


def by_label(first: Any, *_: Any, **__: Any) -> PartitionSpec:
    """As the last axis of the first argument."""
    return PartitionSpec(*common_spec(first)[-1:])


def automatic(fn: Callable[..., Any], arrays: Any, out_specs: Any) -> Any:
    """fn(*arrays) as on a mesh of automatic axes, with the result sharded as `out_specs` say.

    On explicit axes, which `jax.make_mesh` makes by default, `jax.vmap` and a loop over slices
    refuse arguments that are not all sharded in the same way, and indexing asks for the sharding of
    its result. Inside, the compiler sees to all that.
    """
    mesh = _explicit_mesh(arrays)
    if mesh is None:
        # Where no array is on the explicit mesh of a `jax.set_mesh` around, jax 0.8 and 0.9 put new
        # arrays there all the same, and refuse the mixture.
        around = jax.sharding.get_abstract_mesh()
        mixed = (
            jax.__version_info__ < (0, 10)
            and _axes_of(around, AxisType.Explicit)
            and not manual_axes()
        )
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ()) if mixed else around):
            return fn(*arrays)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        out_specs,
        is_leaf=lambda spec: isinstance(spec, PartitionSpec),
    )
    axes = _axes_of(mesh, AxisType.Explicit)
    return jax.sharding.auto_axes(fn, axes=axes, out_sharding=shardings)(*arrays)


def compiled(result: Callable[..., Any], results: int = 1) -> Callable[[Function], Function]:
    """`jax.jit` of a function of arrays, by position, and of options, by name, which are static.

    It runs `automatic`ally, with each of its `results` sharded as the rule `result` says.
    """

    def decorate(fn: Function) -> Function:
        @functools.wraps(fn)
        def run(*given: Any, **options: Any) -> Any:
            # Under `jax.disable_jit` numbers and NumPy arrays come as they were given.
            arrays = jax.tree.map(jnp.asarray, given)
            spec = result(*arrays, **options)
            out_specs = spec if results == 1 else (spec,) * results
            return automatic(functools.partial(fn, **options), arrays, out_specs)

        options = inspect.getfullargspec(fn).kwonlyargs
        return cast(Function, jax.jit(run, static_argnames=tuple(options)))

    return decorate


def vary_together(arrays: Arrays) -> Arrays:
    """Inside `jax.shard_map`, the arrays marked as varying over every axis that any of them does.

    Then they can be combined, and JAX sums the gradient of an array that is the same on several
    devices. The mark comes with a 0 that is computed from all arrays.
    """
    if not manual_axes():
        return arrays
    # The sum of an empty part is 0. JAX marks it as varying wherever the array does.
    zero = jnp.float32(0)
    for array in jax.tree.leaves(jax.lax.stop_gradient(arrays)):
        zero += jnp.sum(jnp.ravel(array)[:0].astype(jnp.float32))
    return jax.tree.map(lambda array: array + zero.astype(array.dtype), arrays)
