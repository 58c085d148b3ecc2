"""The head on a mesh: each device makes its own pass over its own labels and rows."""

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

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

    def run(
        self, operands: _linear.Operands, with_gradients: bool
    ) -> tuple[jax.Array, _linear.Gradients]:
        specs = self.specs()
        given: list[Any] = [
            None if array is None else specs[name] for name, array in operands._asdict().items()
        ]
        row_spec = specs["scale"]
        names = _linear.differentiable(operands) if with_gradients else ()
        gradient_specs = {name: specs[name] for name in names}

        def total(part: jax.Array, spec: PartitionSpec) -> jax.Array:
            """The sum over the axes of the mesh that split the work but not the result."""
            axes = {self.batch_axis, self.label_axis} - {None, *spec}
            return jax.lax.psum(part, tuple(axes)) if axes else part

        def local(operands: _linear.Operands) -> tuple[jax.Array, _linear.Gradients]:
            shard = 0 if self.label_axis is None else jax.lax.axis_index(self.label_axis)
            offset = shard * operands.kernel.shape[1]
            rows, gradients = _linear.full_pass(operands, with_gradients, self.chunk_size, offset)
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


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a user says of chunks and devices; `over` makes of it how a pass is run."""

    chunk_size: int | None
    mesh: Mesh | None
    axes: tuple[tuple[str, str | None], ...]  # of rows and, if there is a second, labels

    @classmethod
    def named(
        cls, name: str, chunk_size: int | None, mesh: Mesh | None, **axes: str | None
    ) -> "Devices":
        """`axes`: the arguments that name the axes of the mesh for rows and labels."""
        if chunk_size is not None:
            _checks.check_size(name, "chunk_size", chunk_size)
        if not isinstance(mesh, Mesh | None):
            raise TypeError(
                f"{name}: mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}; make one "
                "with jax.make_mesh"
            )
        given = [axis for axis in axes.values() if axis is not None]
        if (mesh is None) != (not given):
            raise ValueError(
                f"{name}: mesh and {' or '.join(axes)} go together, got only "
                f"{'mesh' if mesh is not None else f'the axis {given[0]!r}'}"
            )
        if len(set(given)) < len(given):
            raise ValueError(
                f"{name}: {' and '.join(axes)} must be two axes of the mesh, got {given[0]!r} for "
                "both; devices cannot share rows and labels at once, so pass one of them"
            )
        for argument, axis in axes.items():
            if axis is not None and mesh is not None and axis not in mesh.shape:
                raise ValueError(
                    f"{name}: {argument} must be an axis of the mesh, one of "
                    f"{', '.join(map(str, mesh.shape))}, got {axis!r}"
                )
        return cls(chunk_size, mesh, tuple(axes.items()))

    def over(self, name: str, rows: int, labels: int) -> _linear.OneDevice:
        """How to run over so many rows and labels."""
        axes = []
        sizes = [rows, labels]
        for i, (argument, axis) in enumerate(self.axes):
            devices = 1 if self.mesh is None or axis is None else self.mesh.shape[axis]
            if sizes[i] % devices:
                raise ValueError(
                    f"{name}: {argument} {axis!r} has {devices} devices, which does not divide the "
                    f"size {sizes[i]} that it shards; pad to a multiple or use another mesh"
                )
            sizes[i] //= devices
            # Over one device nothing is reduced.
            axes.append(axis if devices > 1 else None)
        if self.chunk_size is not None and not isinstance(labels, int):
            raise ValueError(
                f"{name}: chunk_size must be None where the number of labels is symbolic, got "
                f"{self.chunk_size} for {labels} labels"
            )
        chunk_size = self.chunk_size or _linear.default_chunk_size(*sizes)
        chunk_size = max(min(chunk_size, sizes[1]), 1)
        if self.mesh is None or not any(axes):
            return _linear.OneDevice(chunk_size)
        batch_axis, label_axis = (*axes, None)[:2]
        kinds = (AxisType.Auto,) * len(self.mesh.axis_names)
        mesh = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=kinds)
        return OnMesh(chunk_size, mesh, batch_axis, label_axis)
