"""The head on a mesh: each device makes its own pass over its own labels and rows."""

import dataclasses
from collections.abc import Callable
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
            "per_label": PartitionSpec(label),
            "label_smoothing": PartitionSpec(),
            "where": PartitionSpec(batch, label),
            "ignored": PartitionSpec(batch, None),
            "scale": PartitionSpec(batch),
        }

    def run(
        self, operands: _linear.Operands, with_gradients: bool
    ) -> tuple[jax.Array, _linear.Gradients]:
        specs = self.specs()
        names = _linear.differentiable(operands) if with_gradients else ()
        gradient_specs = {name: specs[name] for name in names}

        def local(operands: _linear.Operands) -> tuple[jax.Array, _linear.Gradients]:
            rows, gradients = _linear.full_pass(
                operands, self.loss, with_gradients, self.chunk_size, self.offset(operands)
            )
            totals = {name: self.total(part, specs[name]) for name, part in gradients.items()}
            return self.total(rows, specs["scale"]), totals

        run: Any = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self.operand_specs(operands),),
            out_specs=(specs["scale"], gradient_specs),
        )
        result: tuple[jax.Array, _linear.Gradients] = run(operands)
        return result

    def update(
        self,
        pass_over: Callable[..., Any],
        operands: _linear.Operands,
        columns: Any,
        others: Any,
        key: Any,
    ) -> Any:
        specs = self.specs()

        def by_label(array: jax.Array) -> PartitionSpec:
            return PartitionSpec(*[None] * (array.ndim - 1), self.label_axis)

        def local(operands: _linear.Operands, columns: Any, others: Any, key: Any) -> Any:
            rows, slope, columns, others = pass_over(
                operands,
                columns,
                others,
                key,
                self.loss,
                self.chunk_size,
                self.offset(operands),
                lambda name, part: self.total(part, specs[name]),
            )
            rows = self.total(rows, specs["scale"])
            return rows, self.total(slope, specs["features"]), columns, others

        column_specs = jax.tree.map(by_label, columns)
        other_specs = jax.tree.map(lambda _: PartitionSpec(), (others, key))
        run: Any = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self.operand_specs(operands), column_specs, *other_specs),
            out_specs=(specs["scale"], specs["features"], column_specs, other_specs[0]),
        )
        return run(operands, columns, others, key)

    def operand_specs(self, operands: _linear.Operands) -> _linear.Operands:
        """How the operands that are given are sharded; a mask is not where it is broadcast."""
        specs: dict[str, Any] = self.specs()
        for name, value in operands._asdict().items():
            if value is None:
                specs[name] = None
        if operands.where is not None:
            sizes = zip(operands.where.shape, specs["where"], strict=True)
            specs["where"] = PartitionSpec(*(None if size == 1 else axis for size, axis in sizes))
        return _linear.Operands(**specs)

    def offset(self, operands: _linear.Operands) -> jax.Array | int:
        """The id of the first label of this device."""
        shard = 0 if self.label_axis is None else jax.lax.axis_index(self.label_axis)
        return shard * operands.kernel.shape[1]

    def total(self, parts: Any, spec: PartitionSpec) -> Any:
        """The sum over the axes of the mesh that split the work but not the result."""
        axes = {self.batch_axis, self.label_axis} - {None, *spec}
        return jax.lax.psum(parts, tuple(axes)) if axes else parts


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

    def over(
        self, name: str, rows: int, labels: int, loss: _linear.ChunkLoss = _linear.bce
    ) -> _linear.OneDevice:
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
            return _linear.OneDevice(chunk_size, loss)
        batch_axis, label_axis = (*axes, None)[:2]
        kinds = (AxisType.Auto,) * len(self.mesh.axis_names)
        mesh = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=kinds)
        return OnMesh(chunk_size, loss, mesh, batch_axis, label_axis)
