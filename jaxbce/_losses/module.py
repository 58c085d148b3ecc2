"""The loss as an object, for those who configure it once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbce import _checks
from jaxbce._losses.bce import bce_with_logits
from jaxbce._reduce import Reduction


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BCEWithLogitsLoss:
    """`bce_with_logits` with its options fixed, as an immutable constant.

    Use it where a loss is configured in one place and called in another: it crosses `jax.jit` and
    `jax.vmap` boundaries and can be an attribute of a Flax or Equinox module.

    Args:
      weight: real array that broadcasts to the shape of logits and multiplies the loss; None is 1.
      pos_weight: real array that broadcasts to the shape of logits, usually (labels,), and
        multiplies the positive term only, at least 0; None is 1.
      label_smoothing: Python number a in [0, 1]; labels become y (1 − a) + a / 2.
      reduction: "mean", "weighted_mean", "sum", "batchmean" or "none", as for `bce_with_logits`.

    Returns:
      An object to call with `(logits, labels, *, where=None)`, which returns what `bce_with_logits`
      does: the loss in float32 (float64 for float64 logits). It is a pytree without leaves: weight
      and pos_weight are copied to the host and belong to the compiled program. Objects of equal
      values are equal, and `jax.jit` compiles once for them.

    Raises:
      TypeError: weight or pos_weight is not an array of numbers.
      ValueError: label_smoothing or reduction is not valid, or an object with a traced array is
        compared or crosses the boundary of a transformation. Calling it raises what
        `bce_with_logits` does.

    Differentiable: as `bce_with_logits`, but weight and pos_weight are constants, which no
    optimizer changes: to train them, pass them to `bce_with_logits`.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> loss = jaxbce.BCEWithLogitsLoss(pos_weight=jnp.array([1.0, 3.0]), reduction="sum")
      >>> loss
      BCEWithLogitsLoss(pos_weight=float32[2], reduction='sum')
      >>> print(round(float(loss(jnp.array([[2.0, -1.0]]), jnp.array([[1, 1]]))), 4))
      4.0667

    Source: PyTorch's `BCEWithLogitsLoss`, whose weights are buffers.
    """

    weight: ArrayLike | None = None
    pos_weight: ArrayLike | None = None
    label_smoothing: float = 0.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        name = type(self).__name__
        _checks.check_choice(name, "reduction", self.reduction, Reduction)
        smoothing = _checks.static_number(
            name, "label_smoothing", self.label_smoothing, "in [0, 1]", 0, 1
        )
        arrays = _checks.jit_arguments(name, weight=self.weight, pos_weight=self.pos_weight)
        weight, pos_weight = map(_constant, arrays)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "pos_weight", pos_weight)
        object.__setattr__(self, "label_smoothing", smoothing)

    def __call__(
        self, logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
    ) -> jax.Array:
        """The loss of `logits` against `labels`, with these options: see `bce_with_logits`."""
        return bce_with_logits(
            logits,
            labels,
            weight=self.weight,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            where=where,
            reduction=self.reduction,
        )

    def tree_flatten(self) -> tuple[tuple[()], BCEWithLogitsLoss]:
        """No leaves: the object itself is what `jax.jit` compiles for."""
        hash(self)
        return (), self

    @classmethod
    def tree_unflatten(cls, same: BCEWithLogitsLoss, _: Any) -> BCEWithLogitsLoss:
        return same

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        """What makes two objects equal; hashable."""
        arrays = [
            _value(type(self).__name__, argument, getattr(self, argument))
            for argument in ("weight", "pos_weight")
        ]
        return type(self), *arrays, self.label_smoothing, self.reduction

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BCEWithLogitsLoss) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew from its arguments: unpickled arrays can be written to, and a hash of bytes
        # differs from process to process.
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={value}"
            for field in dataclasses.fields(self)
            if (value := _describe(getattr(self, field.name))) != repr(field.default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


def _constant(value: Any) -> Any:
    """A copy on the host that nobody can change; what is traced has no gradient."""
    if isinstance(value, jax.core.Tracer):
        # Outside of jax.jit the value may be known, once its gradient is stopped.
        value = jnp.asarray(jax.lax.stop_gradient(value))
    if isinstance(value, (jax.Array, np.ndarray)) and not isinstance(value, jax.core.Tracer):
        value = np.array(value)
        value.flags.writeable = False
    return value


def _value(name: str, argument: str, value: Any) -> Any:
    """Equal for equal constants, and hashable."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name}: {argument} must be known where the object is compared or crosses the "
            f"boundary of a transformation, such as jax.jit, got a traced {_describe(value)}; pass "
            f"{argument} to jaxbce.bce_with_logits, or make the object of a NumPy array"
        )
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype, value.shape, value.tobytes()
    return repr(value)  # 1, 1.0 and True differ


def _describe(value: Any) -> str:
    """An array by its dtype and shape, anything else by its repr."""
    if isinstance(value, jax.Array) or (isinstance(value, np.ndarray) and value.ndim):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)
