"""The matrix: every elementwise loss, with its oracle; a new one joins by an entry in `LOSSES`."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxbce


@dataclasses.dataclass(frozen=True)
class Loss:
    name: str
    call: Callable  # (scores, labels, *, weight, where, reduction) -> loss
    oracle: Callable  # (scores, labels) -> (loss, derivative), in float64
    probs: bool = False  # scores are probabilities
    forward: bool = False  # also differentiable in forward mode
    pos_weight: bool = False  # takes one
    smoothing: bool = True  # takes label_smoothing, also a traced one
    symmetric: bool = True  # (x, y) is as (-x, 1 - y)
    # (value, derivative) at (+∞, 0) and at (-∞, 1)
    limits: tuple = ((np.inf, 1), (np.inf, -1))
    dense: bool = True  # takes dense labels, which may be soft and have a gradient
    own_kernel: bool = True  # not one that is in the matrix under another name

    def unreduced(self, *args, **kwargs):
        return self.call(*args, reduction="none", **kwargs)

    def total(self, *args, **kwargs):
        return self.call(*args, reduction="sum", **kwargs)

    def draw(self, rng, shape, dtype=np.float32):
        """Scores and hard labels."""
        scores = rng.normal(0, 3, shape)
        if self.probs:
            scores = rng.uniform(0.01, 0.99, shape)
        return scores.astype(dtype), rng.integers(0, 2, shape).astype(np.float32)


def configured(scores, labels, *, where=None, axis=None, **options):
    """Without an axis of its own: of the reductions along one, it has "none"."""
    if axis is None:
        return jaxbce.BCEWithLogitsLoss(**options)(scores, labels, where=where)
    reduction = options.pop("reduction", "mean")
    weight = options.get("weight")
    loss = jaxbce.BCEWithLogitsLoss(**options, reduction="none")(scores, labels, where=where)
    return reduced(loss, weight, where, axis, reduction)


def reduced(loss, weight=None, where=None, axis=None, reduction="mean"):
    """An unreduced loss, weighted and masked, in plain jnp."""
    if reduction == "none":
        return loss
    kept = jnp.broadcast_to(True if where is None else where, loss.shape).astype(loss.dtype)
    counted = kept
    if reduction == "weighted_mean" and weight is not None:
        counted = jnp.where(kept > 0, jnp.broadcast_to(weight, loss.shape).astype(loss.dtype), 0)
    elif reduction == "batchmean":
        counted = kept.max(axis=tuple(range(1, loss.ndim)), initial=0)
    divisor = 1 if reduction == "sum" else counted.sum(axis)
    return jnp.where(divisor == 0, 0, loss.sum(axis) / jnp.where(divisor == 0, 1, divisor))


def reduced_by_hand(fn):
    """Of a function that peers know unreduced."""

    def call(scores, labels, *, reduction="mean", axis=None, weight=None, where=None, **options):
        loss = fn(scores, labels, weight=weight, where=where, **options)
        return reduced(loss, weight, where, axis, reduction)

    return call


def focal(gamma, alpha=None, **fields):
    options = {"gamma": gamma, "alpha": alpha}
    return Loss(
        f"focal_loss-{gamma}-{alpha}",
        functools.partial(jaxbce.focal_loss, **options),
        functools.partial(oracle.focal, **options),
        **fields,
    )


def asymmetric(gamma_neg=4.0, gamma_pos=1.0, clip=0.05, **fields):
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    return Loss(
        f"asymmetric_loss-{gamma_neg}-{gamma_pos}-{clip}",
        functools.partial(jaxbce.asymmetric_loss, **options),
        functools.partial(oracle.asymmetric, **options),
        symmetric=False,
        **fields,
    )


def of_one_logit(logit, label, pos_weight=1.0):
    return jaxbce.sigmoid_binary_cross_entropy(logit, label, pos_weight=pos_weight)


def from_positives(scores, labels, *, reduction="mean", **options):
    """Hard labels as the ids of the positives; a lone logit is a row of one label."""
    rows, labels = jnp.atleast_1d(scores, labels)
    ids = jnp.arange(labels.shape[-1])
    positives = jnp.where(labels.astype(bool), ids, -1)
    loss = jaxbce.sparse_bce_with_logits(rows, positives, reduction=reduction, **options)
    return loss.reshape(jnp.shape(scores)) if reduction == "none" else loss


LOSSES = [
    Loss(
        "bce_with_logits",
        jaxbce.bce_with_logits,
        oracle.bce_with_logits,
        pos_weight=True,
    ),
    Loss(
        "bce_with_logits-forward_mode",
        functools.partial(jaxbce.bce_with_logits, forward_mode=True),
        oracle.bce_with_logits,
        forward=True,
        pos_weight=True,
    ),
    Loss(
        "bce_with_logits-pos_weight",
        functools.partial(jaxbce.bce_with_logits, pos_weight=3.5),
        functools.partial(oracle.bce_with_logits, q=3.5),
        symmetric=False,
        limits=((np.inf, 1), (np.inf, -3.5)),
    ),
    Loss(
        "BCEWithLogitsLoss",
        configured,
        oracle.bce_with_logits,
        pos_weight=True,
        smoothing=False,
        own_kernel=False,
    ),
    Loss(
        "Loss",
        jaxbce.Loss(of_one_logit, ("pos_weight",)),
        oracle.bce_with_logits,
        pos_weight=True,
        own_kernel=False,
    ),
    Loss(
        "sigmoid_binary_cross_entropy",
        reduced_by_hand(jaxbce.sigmoid_binary_cross_entropy),
        oracle.bce_with_logits,
        pos_weight=True,
        own_kernel=False,
    ),
    Loss(
        "sparse_bce_with_logits",
        from_positives,
        oracle.bce_with_logits,
        dense=False,
        own_kernel=False,
        pos_weight=True,
    ),
    Loss("bce", jaxbce.bce, oracle.bce, probs=True),
    focal(gamma=0.5, alpha=0.25, symmetric=False, limits=((np.inf, 0.75), (np.inf, -0.25))),
    Loss(
        "sigmoid_focal_loss-array of 1.5",
        reduced_by_hand(
            lambda *args, **options: jaxbce.sigmoid_focal_loss(
                *args, gamma=jnp.float32(1.5), **options
            )
        ),
        functools.partial(oracle.focal, gamma=1.5),
        smoothing=False,
    ),
    asymmetric(limits=((-(0.95**4) * np.log(0.05), 0), (np.inf, -1))),
]

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
pos_weight_losses = pytest.mark.parametrize(
    "loss", [loss for loss in LOSSES if loss.pos_weight], ids=lambda loss: loss.name
)
dense_losses = pytest.mark.parametrize(
    "loss", [loss for loss in LOSSES if loss.dense], ids=lambda loss: loss.name
)
every_kernel = pytest.mark.parametrize(
    "loss", [loss for loss in LOSSES if loss.own_kernel], ids=lambda loss: loss.name
)
# No two of which run the same code: every kernel, and the labels as ids.
distinct_losses = pytest.mark.parametrize(
    "loss",
    [loss for loss in LOSSES if loss.own_kernel or not loss.dense],
    ids=lambda loss: loss.name,
)
logit_losses = pytest.mark.parametrize(
    "loss",
    [loss for loss in LOSSES if not loss.probs and loss.own_kernel],
    ids=lambda loss: loss.name,
)
