"""What the head and `checked` need of Flax: parameters, the state of an optimizer, copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def created(
    make: Callable[..., jax.Array], names: tuple[Any, ...], mesh: Mesh | None, *args: Any
) -> nnx.Param[jax.Array]:
    """The parameter make(*args), made where it belongs on the mesh, which it says to Flax."""
    if mesh is None:
        return nnx.Param(make(*args))
    sharding = NamedSharding(mesh, PartitionSpec(*names))
    made: jax.Array = jax.jit(make, out_shardings=sharding)(*args)
    if AxisType.Auto not in mesh.axis_types:  # under `jax.jit` the type then says it
        made = jax.sharding.reshard(made, sharding)

    eager = _flax_places(made, mesh)
    return nnx.Param(nnx.with_partitioning(lambda: made, names, mesh, eager_sharding=eager)())


def _flax_places(made: jax.Array, mesh: Mesh) -> bool:
    """Whether Flax is to place what is made of a parameter, as the moments of an optimizer.

    Under `jax.jit` nothing else places moments on automatic axes. Types say it of explicit ones.
    """
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return False
    # Flax 0.12.0 knows the mesh of `jax.set_mesh` alone, and fails where there is none.
    set_around = isinstance(made, jax.core.Tracer) and not jax.sharding.get_abstract_mesh().empty
    return set_around or flax.__version__ != "0.12.0"


@dataclasses.dataclass(frozen=True)
class OfHead:
    """An optimizer that gets the trained parameters in an `nnx.State`, as Flax gives them."""

    tx: Any
    trained: frozenset[str]

    def _own(self, tree: dict[str, Any]) -> Any:
        return nnx.State({name: value for name, value in tree.items() if name in self.trained})

    def init(self, params: dict[str, Any]) -> Any:
        return self.tx.init(self._own(params))

    def update(self, slopes: dict[str, Any], state: Any, params: dict[str, Any]) -> Any:
        updates, state = self.tx.update(self._own(slopes), state, self._own(params))
        return jax.tree.map(jnp.zeros_like, slopes) | dict(updates), state


def taken(
    optimizer: nnx.Optimizer[Any], head: nnx.Module, own: dict[str, nnx.Param[jax.Array]]
) -> tuple[OfHead, Any]:
    """The optimizer of a head with its `own` parameters, as optax has it: rule and state."""
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            "MultiLabelHead: optimizer must be a flax.nnx.Optimizer, got "
            f"{type(optimizer).__name__}; make one of this head alone, "
            "flax.nnx.Optimizer(head, tx, wrt=flax.nnx.Param)"
        )
    if type(optimizer).update is not nnx.Optimizer.update:
        raise TypeError(
            f"MultiLabelHead: optimizer has an update of its own, {type(optimizer).__name__}, "
            "which needs the whole gradient; put what it does into its transformation"
        )
    if changed := [name for name, variable in own.items() if not _is_plain(variable)]:
        raise TypeError(
            f"MultiLabelHead: {changed[0]} must be a flax.nnx.Param as it is, got "
            f"{type(own[changed[0]]).__name__}, which changes its value when it is read or "
            "set; train it with MultiLabelHead.loss and optimizer.update"
        )
    trained = nnx.state(head, optimizer.wrt).keys()
    if further := sorted(trained - own.keys()):
        raise ValueError(
            f"MultiLabelHead: update trains kernel and bias, got a wrt that also selects "
            f"{further[0]}; hold that in another kind of nnx.Variable, or train all with "
            "MultiLabelHead.loss"
        )
    tx = OfHead(optimizer.tx, frozenset(trained & own.keys()))
    places = _places(optimizer.opt_state)
    expected = jax.eval_shape(tx.init, {name: variable[...] for name, variable in own.items()})
    likes, structure = jax.tree.flatten(expected)
    got = [jnp.shape(jax.tree.leaves(place)[0]) for place in places]
    shapes = [like.shape for like in likes]
    if not trained or shapes != got:
        raise ValueError(
            "MultiLabelHead: optimizer must be one of this head alone, "
            "flax.nnx.Optimizer(head, tx, wrt=flax.nnx.Param); got one whose wrt selects "
            f"{sorted(trained)} of the head, with a state of {got} instead of {shapes}"
        )
    return tx, jax.tree.unflatten(structure, map(_held, places, likes))


def _is_plain(variable: nnx.Variable[Any]) -> bool:
    """Whether a Variable holds the value that it gives."""
    hooks = {"on_get_value", "on_set_value"} & variable.get_metadata().keys()
    methods = [
        getattr(type(variable), name, None) is getattr(nnx.Param, name, None)
        for name in ("get_value", "set_value")
    ]
    return not hooks and all(methods)


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)


def _places(opt_state: Any) -> list[Any]:
    """A Variable for each array of the state, or what a user has put in place of the Variable."""
    places = jax.tree.leaves(opt_state, is_leaf=_is_variable)
    return [place for place in places if jax.tree.leaves(place)]  # what optax masks holds nothing


def put(place: nnx.Variable[Any], value: jax.Array) -> None:
    """Replaces what a Variable holds.

    `place[...] = value` would write into an array of NumPy, which may be the user's checkpoint.
    """
    if hasattr(place, "set_value"):
        place.set_value(value)
    else:  # Flax 0.12.0, where it replaces the array
        place[...] = value


def _held(place: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    held = jax.tree.leaves(place)[0]
    if isinstance(held, bool | int | float):  # which has no dtype
        return jnp.asarray(held, like.dtype)
    return place[...] if _is_variable(place) else jnp.asarray(held)


def on_copies(
    run: Callable[..., Any], fn: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """run(fn, *args, **kwargs) where `run` traces fn, and NNX modules among its arguments change.

    A trace may change only modules that it has made. So fn gets copies. Afterwards the modules take
    over what has become of these, as they do under `nnx.jit`.
    """
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    others = [leaf for leaf in leaves if not _is_node(leaf)]
    if len(others) == len(leaves):
        return run(fn, *args, **kwargs)
    update = "jaxbce.checked"

    def pure(state: Any, others: Any) -> Any:
        with nnx.merge_context(update, inner=True) as context:
            copies = context.merge(graph, state)
        sources = {True: iter(copies), False: iter(others)}
        args, kwargs = jax.tree.unflatten(structure, [next(sources[_is_node(x)]) for x in leaves])
        result = fn(*args, **kwargs)
        with nnx.split_context(update) as context:
            return context.split((copies, result))

    with nnx.update_context(update):
        with nnx.split_context(update) as context:
            graph, state = context.split(tuple(filter(_is_node, leaves)))
        state = jax.tree.map(jnp.array, state)  # fn may donate arrays, or write into those of NumPy
        changed = run(pure, state, others)
        with nnx.merge_context(update, inner=False) as context:
            _, result = context.merge(*changed)
    return result


def _is_node(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def write(optimizer: nnx.Optimizer[Any], values: list[jax.Array]) -> None:
    """Makes the values, one for each of `_places`, the state of the optimizer."""
    places, structure = jax.tree.flatten(optimizer.opt_state, is_leaf=_is_variable)
    left = iter(values)
    for i, place in enumerate(places):
        if not jax.tree.leaves(place):
            continue
        if _is_variable(place):
            put(place, next(left))
        else:
            places[i] = next(left)
    if all(map(_is_variable, places)):
        return
    state = jax.tree.unflatten(structure, places)
    try:
        nnx.update(optimizer.opt_state, nnx.state(state))  # dictionaries that a user may hold
    except ValueError:  # an array where a named tuple had a Variable
        optimizer.opt_state = nnx.data(state)
