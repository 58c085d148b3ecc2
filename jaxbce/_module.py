"""The loss as an object, for those who configure it once."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxbce import _checks, _reduce
from jaxbce._losses import bce_with_logits


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "pos_weight"],
    meta_fields=["label_smoothing", "reduction"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BCEWithLogitsLoss:
    """`bce_with_logits` with its options fixed, as an immutable pytree.

    Use it where a loss is configured in one place and called in another: it crosses `jax.jit` and
    `jax.vmap` boundaries and can be an attribute of a Flax module.

    Formula: that of `bce_with_logits`.

    Args:
      weight: a leaf; real array that broadcasts to the shape of logits and multiplies the loss;
        None is 1.
      pos_weight: a leaf; real array that broadcasts to the shape of logits, usually (labels,), and
        multiplies the positive term only; None is 1.
      label_smoothing: Python number a in [0, 1]; labels become y (1 − a) + a / 2.
      reduction: "mean", "weighted_mean", "sum", "batchmean" or "none", as for `bce_with_logits`.

    Returns:
      An object to call with `(logits, labels, *, where=None)`, which returns what `bce_with_logits`
      does: the loss in float32 (float64 for float64 logits).

    Raises:
      ValueError: label_smoothing or reduction is not valid. Calling it raises what
        `bce_with_logits` does.

    Edge values: as `bce_with_logits`.

    Differentiable: as `bce_with_logits`, and with respect to the object itself (its two leaves).

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> loss = jaxbce.BCEWithLogitsLoss(pos_weight=jnp.array([1.0, 3.0]), reduction="sum")
      >>> loss
      BCEWithLogitsLoss(pos_weight=float32[2], reduction='sum')
      >>> print(round(float(loss(jnp.array([[2.0, -1.0]]), jnp.array([[1, 1]]))), 4))
      4.0667

    Source: PyTorch's `BCEWithLogitsLoss`.
    """

    weight: ArrayLike | None = None
    pos_weight: ArrayLike | None = None
    label_smoothing: float = 0.0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        name = type(self).__name__
        _checks.check_choice(name, "reduction", self.reduction, _reduce.REDUCTIONS)
        above = math.nextafter(1, 2)
        _checks.static_number(name, "label_smoothing", self.label_smoothing, "in [0, 1]", 0, above)

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

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={_describe(value)}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


def _describe(value: object) -> str:
    """An array by its dtype and shape, anything else by its repr."""
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)
