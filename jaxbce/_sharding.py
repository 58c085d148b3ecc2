"""The head on a mesh: each device makes its own pass over its own labels and rows."""

import dataclasses

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxbce import _linear


@dataclasses.dataclass(frozen=True)
class OnMesh(_linear.OneDevice):
    """A pass over labels sharded over `label_axis` and rows sharded over `batch_axis`."""

    mesh: Mesh
    batch_axis: str | None
    label_axis: str | None

    def specs(self) -> _linear.Operands:
        batch, label = self.batch_axis, self.label_axis
        return _linear.Operands(
            features=PartitionSpec(batch, None),
            kernel=PartitionSpec(None, label),
            bias=PartitionSpec(label),
            positives=PartitionSpec(batch, None),
            labels=PartitionSpec(batch, label),
            pos_weight=PartitionSpec(label),
            label_smoothing=PartitionSpec(),
            scale=PartitionSpec(batch),
        )

    def run(
        self, operands: _linear.Operands, wanted: _linear.Wanted
    ) -> tuple[jax.Array, _linear.Gradients]:
        specs = self.specs()
        rows_spec = PartitionSpec(self.batch_axis)
        gradient_specs = {name: getattr(specs, name) for name in wanted}

        def total(part: jax.Array, spec: PartitionSpec) -> jax.Array:
            """The sum over the axes of the mesh that split the work but not the result."""
            axes = [a for a in (self.batch_axis, self.label_axis) if a is not None]
            axes = [axis for axis in axes if axis not in spec]
            return jax.lax.psum(part, tuple(axes)) if axes else part

        def local(operands: _linear.Operands) -> tuple[jax.Array, _linear.Gradients]:
            shard = 0 if self.label_axis is None else jax.lax.axis_index(self.label_axis)
            offset = shard * operands.kernel.shape[1]
            rows, gradients = _linear.full_pass(operands, wanted, self.chunk_size, offset)
            gradients = {n: total(part, gradient_specs[n]) for n, part in gradients.items()}
            return total(rows, rows_spec), gradients

        in_specs = jax.tree.map(
            lambda array, spec: None if array is None else spec,
            operands,
            specs,
            is_leaf=lambda leaf: leaf is None,
        )
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=(in_specs,), out_specs=(rows_spec, gradient_specs)
        )(operands)
