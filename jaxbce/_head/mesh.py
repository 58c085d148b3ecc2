"""The head on a mesh: each device makes its own pass over its own labels and rows."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxbce import _checks, _placement
from jaxbce._head import chunks
from jaxbce._head.chunks import Plan

Axis = str | tuple[str, ...] | None  # of a mesh; in a tuple the last is the finest


@dataclasses.dataclass(frozen=True)
class MeshPlan(Plan):
    """A pass over labels sharded over `label_axis` and rows sharded over `batch_axis`."""

    mesh: Mesh
    batch_axis: Axis
    label_axis: Axis

    def specs(self) -> dict[str, Any]:
        batch, label = self.batch_axis, self.label_axis
        return {
            "features": PartitionSpec(batch, None),
            "kernel": PartitionSpec(label, None) if self.transposed else PartitionSpec(None, label),
            "bias": PartitionSpec(label),
            "positives": PartitionSpec(batch, None),
            "labels": PartitionSpec(batch, label),
            "per_label": PartitionSpec(label),
            "label_smoothing": PartitionSpec(),
            "where": PartitionSpec(batch, label),
            "ignored": PartitionSpec(batch, None),
            "row_factor": PartitionSpec(batch),
            "weightless": PartitionSpec(batch),
        }

    def shard(self, local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`jax.shard_map` over the whole mesh, or over what another one around it leaves."""
        manual = _placement.manual_axes()
        return jax.shard_map(
            local,
            mesh=jax.sharding.get_abstract_mesh() if manual else self.mesh,
            axis_names=set(self.mesh.axis_names) - set(manual),
            in_specs=in_specs,
            out_specs=out_specs,
        )

    def first_label(self, kernel: jax.Array) -> jax.Array | int:
        if self.label_axis is None:
            return 0
        return jax.lax.axis_index(self.label_axis) * self.num_labels(kernel)

    def total(self, name: str, part: Any) -> Any:
        """Summed over the axes of the mesh that split the work but not the result."""
        spec = self.specs()[name]
        axes = [axis for axis in (self.batch_axis, self.label_axis) if axis not in spec]
        names = sum(map(_placement.names_of, axes), ())
        return jax.lax.psum(part, names) if names else part

    def run(
        self, operands: chunks.Operands, with_gradients: bool
    ) -> tuple[jax.Array, chunks.Gradients]:
        specs = self.specs()
        names = chunks.differentiable(operands) if with_gradients else ()
        return self.shard(
            lambda operands: self.local(operands, with_gradients),
            (self.operand_specs(operands),),
            (specs["row_factor"], {name: specs[name] for name in names}),
        )(operands)

    def spec_of_labels(self, array: jax.Array, axis: int) -> PartitionSpec:
        """Of an array with a part for each label, which `axis` counts."""
        return PartitionSpec(*(self.label_axis if i == axis else None for i in range(array.ndim)))

    def operand_specs(self, operands: chunks.Operands) -> chunks.Operands:
        """How the operands that are given are sharded; a mask is not where it is broadcast."""
        specs: dict[str, Any] = self.specs()
        for name, value in operands._asdict().items():
            if value is None:
                specs[name] = None
        if operands.where is not None:
            sizes = zip(operands.where.shape, specs["where"], strict=True)
            specs["where"] = PartitionSpec(*(None if size == 1 else axis for size, axis in sizes))
        return chunks.Operands(**specs)


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What a user says of kernel, chunks and devices. `plan` makes of it how a pass is run."""

    transposed: bool
    chunk_size: int | None
    mesh: Mesh | None
    axes: tuple[tuple[str, Axis], ...]  # argument and axis for rows and labels, or one for both

    @classmethod
    def checked(
        cls, name: str, transposed: bool, chunk_size: int | None, mesh: Mesh | None, **axes: Axis
    ) -> "PlanOptions":
        """`axes`: the arguments that name the axes of the mesh for rows and labels."""
        if not isinstance(transposed, bool):
            raise TypeError(f"{name}: transpose_kernel must be True or False, got {transposed!r}")
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
        seen = list[str]()
        for argument, axis in axes.items():
            if not isinstance(axis, str | tuple | None):
                raise TypeError(
                    f"{name}: {argument} must be the name of an axis of the mesh, or a tuple of "
                    f"names, got {axis!r}"
                )
            for one in _placement.names_of(axis):
                if mesh is not None and one not in mesh.axis_names:
                    raise ValueError(
                        f"{name}: {argument} must be an axis of the mesh, one of "
                        f"{', '.join(map(str, mesh.axis_names))}, or a tuple of them, got {axis!r}"
                    )
                if one in seen:
                    raise ValueError(
                        f"{name}: {' and '.join(axes)} must be different axes of the mesh, got "
                        f"{one!r} twice; devices cannot share rows and labels at once, so name it "
                        "in one place"
                    )
                seen.append(one)
        return cls(transposed, chunk_size, mesh, tuple(axes.items()))

    def plan(
        self,
        name: str,
        rows: int,
        labels: int,
        *,
        loss: Any = None,
        kind: type[MeshPlan] = MeshPlan,
    ) -> Plan:
        """How to run over so many rows and labels; on several devices as a `kind` of plan."""
        own_rows, batch_axis = self._share(name, *self.axes[0], rows)
        own_labels, label_axis = self._share(name, *self.axes[-1], labels)
        if self.chunk_size is not None and not isinstance(labels, int):
            raise ValueError(
                f"{name}: chunk_size must be None where the number of labels is symbolic, got "
                f"{self.chunk_size} for {labels} labels"
            )
        chunk_size = self.chunk_size or chunks.default_chunk_size(own_rows, own_labels)
        chunk_size = max(min(chunk_size, own_labels), 1)
        # Checks of values fail inside `jax.shard_map` (jax 0.12). Under `checked` the compiler
        # shares out the work of one device.
        unshared = not (batch_axis or label_axis) or _checks.values_are_checked()
        if self.mesh is None or unshared:
            return Plan(chunk_size, loss, self.transposed)
        context = jax.sharding.get_abstract_mesh()
        if _placement.manual_axes() and context.shape != self.mesh.shape:
            raise ValueError(
                f"{name}: mesh must be that of the jax.shard_map around, {dict(context.shape)}, "
                f"got {dict(self.mesh.shape)}"
            )
        kinds = (AxisType.Auto,) * len(self.mesh.axis_names)
        mesh = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=kinds)
        return kind(chunk_size, loss, self.transposed, mesh, batch_axis, label_axis)

    def _share(self, name: str, argument: str, axis: Axis, size: int) -> tuple[int, Axis]:
        """What one device has of `size`, and the axes that share it, of more than one device."""
        shape = {} if self.mesh is None else self.mesh.shape
        sharing = tuple(one for one in _placement.names_of(axis) if shape[one] > 1)
        devices = math.prod(shape[one] for one in sharing)
        if size % devices:
            new, by_rows = size + -size % devices, argument == "batch_axis"
            leave_out = "leave the rest out by where"
            if name == "linear_top_k":
                leave_out = (
                    "drop their results" if by_rows else "leave the rest out by a bias of -inf"
                )
            if name == "siglip_loss":
                leave_out = (
                    f"leave the rest out by ignored, and multiply the loss by {new} / {size}"
                )
            raise ValueError(
                f"{name}: {argument} {axis!r} has {devices} devices, which does not divide the "
                f"size {size} that it shards; pad to {new}, the next size that it divides, and "
                f"{leave_out}, or use another mesh"
            )
        around = _placement.manual_axes()
        if taken := [one for one in sharing if one in around]:
            raise ValueError(
                f"{name}: {argument} must be an axis that jax.shard_map leaves automatic, got "
                f"{taken[0]!r}, over which the arrays are sharded already"
            )
        return size // devices, sharing if len(sharing) > 1 else sharing[0] if sharing else None
