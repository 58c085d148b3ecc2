"""The head on a ring: rows and labels are sharded over one axis, and the labels travel."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbce import _placement
from jaxbce._head import chunks
from jaxbce._head.mesh import MeshPlan


class RingPlan(MeshPlan):
    """A pass over rows and labels that are sharded over the same axis.

    The labels travel: each device meets those of one other at a time, so what it holds does not
    grow with the number of devices.
    """

    def to_the_next(self) -> tuple[tuple[str, ...], list[tuple[int, int]]]:
        """What `jax.lax.ppermute` needs to send from each device to that of the next labels.

        It counts devices in the order of the axes of the mesh, whatever the order of the names.
        """
        names = _placement.names_of(self.label_axis)
        order = sorted(range(len(names)), key=lambda i: self.mesh.axis_names.index(names[i]))
        shape = [self.mesh.shape[name] for name in names]
        labels = np.arange(math.prod(shape)).reshape(shape).transpose(order).ravel()
        devices = np.argsort(labels).tolist()
        steps = list(zip(devices, devices[1:] + devices[:1], strict=True))
        return tuple(names[i] for i in order), steps

    def local(
        self, operands: chunks.Operands, with_gradients: bool
    ) -> tuple[jax.Array, chunks.Gradients]:
        arrays, dtype = operands._asdict(), operands.features.dtype
        here, size = jax.lax.axis_index(self.label_axis), self.num_labels(operands.kernel)
        names, steps = self.to_the_next()

        def pass_on(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return {
                name: jax.lax.ppermute(array, names, steps) if name in chunks.LABELLED else array
                for name, array in arrays.items()
            }

        def step(carry: Any, distance: jax.Array) -> tuple[Any, None]:
            travelling, by_row, gradients = carry
            met = operands._replace(**travelling)
            # The gradient of a kernel of half precision is rounded once, not by every device.
            met = met._replace(kernel=met.kernel.astype(dtype))
            first_label = (here - distance) % len(steps) * size
            more, parts = chunks.full_pass(self, met, with_gradients, first_label)
            gradients = {name: gradients[name] + part for name, part in parts.items()}
            return (pass_on(travelling), by_row + more, pass_on(gradients)), None

        travelling = {
            name: arrays[name] for name in chunks.LABELLED if jax.tree.leaves(arrays[name])
        }
        wanted = chunks.differentiable(operands) if with_gradients else ()
        gradients = {name: jnp.zeros_like(arrays[name], dtype) for name in wanted}
        start = travelling, jnp.zeros_like(operands.row_factor), gradients
        # After a step for each device, labels and gradients are at home.
        (_, by_row, gradients), _ = jax.lax.scan(
            step, start, jnp.arange(len(steps), dtype=jnp.int32)
        )
        return by_row, gradients
