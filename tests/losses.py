"""The matrix: every elementwise loss, with its formula and its oracle.

A new one joins by an entry in `LOSSES`: every test of all losses finds it there.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxbce

softplus, sigmoid = jax.nn.softplus, jax.nn.sigmoid


@dataclasses.dataclass(frozen=True)
class Loss:
    name: str  # the public name, and behind a "-" what tells its entries apart
    fn: Callable  # (scores, labels, *, weight, where, reduction) -> loss
    truth: Callable  # (scores, labels) -> (loss, derivative), in float64
    formula: Callable  # (scores, labels) -> loss, in plain jnp, which JAX differentiates by itself
    # (generator, shape of the scores) -> what the three need beside scores and labels, by name
    required: Callable = lambda rng, shape: {}
    probs: bool = False  # scores are probabilities
    forward: bool = False  # also differentiable in forward mode
    pos_weight: bool = False  # takes one
    smoothing: bool = True  # takes label_smoothing, also a traced one
    symmetric: bool = True  # (x, y) is as (-x, 1 - y)
    # (value, derivative) at (+∞, 0) and at (-∞, 1)
    limits: tuple = ((np.inf, 1), (np.inf, -1))
    dense: bool = True  # takes dense labels, which may be soft and have a gradient
    own_kernel: bool = True  # not one that is in the matrix under another name
    logarithm: bool = False  # takes one of something else than of 1 + an exponential

    @property
    def public_name(self):
        return self.name.split("-")[0]

    @functools.cached_property
    def numbers(self):
        """What it requires as one number each, which serves scores of any shape."""
        drawn = self.required(np.random.default_rng(0), ())
        return {name: float(np.float32(value)) for name, value in drawn.items()}

    def call(self, *args, **options):
        return self.fn(*args, **(self.numbers | options))

    def oracle(self, *args):
        return self.truth(*args, **self.numbers)

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


def of_one_logit(logit, label, pos_weight=1.0):
    return jaxbce.sigmoid_binary_cross_entropy(logit, label, pos_weight=pos_weight)


def of_one_logit_with_margin(logit, label, margin):
    return jaxbce.sigmoid_binary_cross_entropy(logit - label * margin, label)


def from_positives(scores, labels, *, reduction="mean", **options):
    """Hard labels as the ids of the positives; a lone logit is a row of one label."""
    rows, labels = jnp.atleast_1d(scores, labels)
    ids = jnp.arange(labels.shape[-1])
    positives = jnp.where(labels.astype(bool), ids, -1)
    loss = jaxbce.sparse_bce_with_logits(rows, positives, reduction=reduction, **options)
    return loss.reshape(jnp.shape(scores)) if reduction == "none" else loss


# --- formulas, in plain jnp ----------------------------------------------------------------------


def bce_with_logits(x, y, pos_weight=1.0):
    return (1 - y) * softplus(x) + pos_weight * y * softplus(-x)


def bce(p, y):
    return -y * jnp.log(p) - (1 - y) * jnp.log1p(-p)


def focal(x, y, gamma, alpha=None):
    p = sigmoid(x)
    balance = 1.0 if alpha is None else y * alpha + (1 - y) * (1 - alpha)
    return balance * (y * (1 - p) + (1 - y) * p) ** gamma * bce_with_logits(x, y)


def asymmetric(x, y, gamma_neg=4.0, gamma_pos=1.0, clip=0.05):
    m = jnp.maximum(sigmoid(x) - clip, 0)
    return y * sigmoid(-x) ** gamma_pos * softplus(-x) - (1 - y) * m**gamma_neg * jnp.log1p(-m)


def with_margin(x, y, margin, of=bce_with_logits):
    return of(x - y * margin, y)


def with_options(*functions, **options):
    return [functools.partial(fn, **options) for fn in functions]


# --- the matrix ----------------------------------------------------------------------------------

LOSSES = [
    Loss(
        "bce_with_logits",
        jaxbce.bce_with_logits,
        oracle.bce_with_logits,
        bce_with_logits,
        pos_weight=True,
    ),
    Loss(
        "bce_with_logits-forward_mode",
        functools.partial(jaxbce.bce_with_logits, forward_mode=True),
        oracle.bce_with_logits,
        bce_with_logits,
        forward=True,
        pos_weight=True,
    ),
    Loss(
        "bce_with_logits-pos_weight",
        functools.partial(jaxbce.bce_with_logits, pos_weight=3.5),
        functools.partial(oracle.bce_with_logits, q=3.5),
        functools.partial(bce_with_logits, pos_weight=3.5),
        symmetric=False,
        limits=((np.inf, 1), (np.inf, -3.5)),
    ),
    Loss(
        "BCEWithLogitsLoss",
        configured,
        oracle.bce_with_logits,
        bce_with_logits,
        pos_weight=True,
        smoothing=False,
        own_kernel=False,
    ),
    Loss(
        "Loss",
        jaxbce.Loss(of_one_logit, ("pos_weight",)),
        oracle.bce_with_logits,
        bce_with_logits,
        pos_weight=True,
        own_kernel=False,
    ),
    Loss(
        "sigmoid_binary_cross_entropy",
        reduced_by_hand(jaxbce.sigmoid_binary_cross_entropy),
        oracle.bce_with_logits,
        bce_with_logits,
        pos_weight=True,
        own_kernel=False,
    ),
    Loss(
        "sparse_bce_with_logits",
        from_positives,
        oracle.bce_with_logits,
        bce_with_logits,
        dense=False,
        own_kernel=False,
        pos_weight=True,
    ),
    Loss("bce", jaxbce.bce, oracle.bce, bce, probs=True, logarithm=True),
    Loss(
        "focal_loss-0.5-0.25",
        *with_options(jaxbce.focal_loss, oracle.focal, focal, gamma=0.5, alpha=0.25),
        symmetric=False,
        limits=((np.inf, 0.75), (np.inf, -0.25)),
        logarithm=True,
    ),
    Loss(
        "sigmoid_focal_loss-array of 1.5",
        reduced_by_hand(
            lambda *args, **options: jaxbce.sigmoid_focal_loss(
                *args, gamma=jnp.float32(1.5), **options
            )
        ),
        *with_options(oracle.focal, focal, gamma=1.5),
        smoothing=False,
        logarithm=True,
    ),
    Loss(
        "asymmetric_loss",
        jaxbce.asymmetric_loss,
        oracle.asymmetric,
        asymmetric,
        symmetric=False,
        limits=((-(0.95**4) * np.log(0.05), 0), (np.inf, -1)),
        logarithm=True,
    ),
    Loss(
        "Loss-margin",
        jaxbce.Loss(of_one_logit_with_margin, ("margin",)),
        functools.partial(with_margin, of=oracle.bce_with_logits),
        with_margin,
        required=lambda rng, shape: {"margin": rng.uniform(-1, 1, shape[-1:])},
        symmetric=False,
        own_kernel=False,
    ),
]

# The first entry of each public name.
FIRST = {loss.public_name: loss for loss in reversed(LOSSES)}
# The functions of a score and a label for each element, found by their arguments.
FUNCTIONS = [
    name
    for name in jaxbce.__all__
    if inspect.isfunction(getattr(jaxbce, name))
    and list(inspect.signature(getattr(jaxbce, name)).parameters)[:2]
    in (["logits", "labels"], ["logits", "positives"], ["probs", "labels"])
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
