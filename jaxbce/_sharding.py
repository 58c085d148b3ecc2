"""The head on a mesh: each device makes its own pass over its own labels and rows."""

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxbce import _checks, _linear


@dataclasses.dataclass(frozen=True)
class OnMesh(_linear.OneDevice):
    """A pass over labels sharded over `label_axis` and rows sharded over `batch_axis`."""

    mesh: Mesh
    batch_axis: str | None
    label_axis: str | None

    def specs(self) -> dict[str, Any]:
        batch, label = self.batch_axis, self.label_axis
        return {
            "features": PartitionSpec(batch, None),
            "kernel": PartitionSpec(None, label),
            "bias": PartitionSpec(label),
            "positives": PartitionSpec(batch, None),
            "labels": PartitionSpec(batch, label),
            "pos_weight": PartitionSpec(label),
            "label_smoothing": PartitionSpec(),
            "scale": PartitionSpec(batch),
        }

    def place(self, operands: _linear.Operands) -> _linear.Operands:
        """On a mesh of explicit axes, whose types tell how arrays are sharded, as `run` takes them.

        An automatic mesh needs nothing: the compiler sees to it.
        """
        if AxisType.Explicit not in self.mesh.axis_types:
            return operands
        placed: list[Any] = [
            None if array is None else jax.reshard(array, NamedSharding(self.mesh, spec))
            for array, spec in zip(operands, self.specs().values(), strict=True)
        ]
        return _linear.Operands(*placed)

    def run(
        self, operands: _linear.Operands, wanted: _linear.Wanted
    ) -> tuple[jax.Array, _linear.Gradients]:
        specs = self.specs()
        given: list[Any] = [
            None if array is None else specs[name] for name, array in operands._asdict().items()
        ]
        row_spec = specs["scale"]
        gradient_specs = {name: specs[name] for name in wanted}

        def total(part: jax.Array, spec: PartitionSpec) -> jax.Array:
            """The sum over the axes of the mesh that split the work but not the result."""
            axes = {self.batch_axis, self.label_axis} - {None, *spec}
            return jax.lax.psum(part, tuple(axes)) if axes else part

        def local(operands: _linear.Operands) -> tuple[jax.Array, _linear.Gradients]:
            shard = 0 if self.label_axis is None else jax.lax.axis_index(self.label_axis)
            offset = shard * operands.kernel.shape[1]
            rows, gradients = _linear.full_pass(operands, wanted, self.chunk_size, offset)
            totals = {name: total(part, specs[name]) for name, part in gradients.items()}
            return total(rows, row_spec), totals

        run: Any = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(_linear.Operands(*given),),
            out_specs=(row_spec, gradient_specs),
        )
        result: tuple[jax.Array, _linear.Gradients] = run(operands)
        return result


def choose_devices(
    name: str,
    sizes: tuple[int, int],
    chunk_size: int | None,
    mesh: Mesh | None,
    axes: dict[str, str | None],
) -> _linear.OneDevice:
    """How to run over the given numbers of rows and labels.

    `axes`: the arguments that name the axes of the mesh for rows and, if there is a second, labels.
    """
    if chunk_size is not None:
        _checks.check_size(name, "chunk_size", chunk_size)
    batch_axis, label_axis = (*axes.values(), None, None)[:2]
    if (mesh is None) != (batch_axis is None and label_axis is None):
        raise ValueError(f"{name}: mesh and {' or '.join(axes)} go together, got only one of them")
    rows, labels = sizes
    if mesh is not None:
        for (argument, axis), size in zip(axes.items(), sizes, strict=False):
            if axis is not None:
                _check_axis(name, argument, axis, mesh, size)
        rows //= mesh.shape.get(batch_axis, 1)
        labels //= mesh.shape.get(label_axis, 1)
    chunk_size = max(min(chunk_size or _linear.default_chunk_size(rows, labels), labels), 1)
    if mesh is None:
        return _linear.OneDevice(chunk_size)
    return OnMesh(chunk_size, mesh, batch_axis, label_axis)


def _check_axis(name: str, argument: str, axis: str, mesh: Mesh, size: int) -> None:
    if axis not in mesh.shape:
        raise ValueError(
            f"{name}: {argument} must be an axis of the mesh, one of "
            f"{', '.join(map(str, mesh.shape))}, got {axis!r}"
        )
    if size % mesh.shape[axis]:
        raise ValueError(
            f"{name}: {argument} {axis!r} has {mesh.shape[axis]} devices, which does not divide "
            f"the size {size} that it shards; pad to a multiple or use another mesh"
        )
