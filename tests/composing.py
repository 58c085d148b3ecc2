"""Losses beside the same losses written densely in plain jnp, and programs to put both into."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from heads import head
from losses import LOSSES

import jaxbce
import jaxbce.nnx

ROWS, WIDTH, LABELS = 3, 2, 7
softplus, sigmoid = jax.nn.softplus, jax.nn.sigmoid


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments go by name; those of a float dtype can be differentiated."""

    name: str
    ours: Callable  # arguments -> a loss, reduced or not
    dense: Callable  # the same in plain jnp, which JAX differentiates by itself
    draw: Callable  # generator -> arguments


# --- dense losses ---------------------------------------------------------------------------------


def bce_with_logits(x, y, q=1.0):
    return (1 - y) * softplus(x) + q * y * softplus(-x)


def bce(p, y):
    return -y * jnp.log(p) - (1 - y) * jnp.log1p(-p)


def focal(x, y, gamma, alpha=None):
    p = sigmoid(x)
    balance = 1.0 if alpha is None else y * alpha + (1 - y) * (1 - alpha)
    return balance * (y * (1 - p) + (1 - y) * p) ** gamma * bce_with_logits(x, y)


def asymmetric(x, y, gamma_neg, gamma_pos, clip):
    m = jnp.maximum(sigmoid(x) - clip, 0)
    return y * sigmoid(-x) ** gamma_pos * softplus(-x) - (1 - y) * m**gamma_neg * jnp.log1p(-m)


FORMULAS = {
    "bce_with_logits": bce_with_logits,
    "bce": bce,
    "focal": focal,
    "asymmetric": asymmetric,
}


def smoothed(labels, label_smoothing):
    return labels * (1 - label_smoothing) + label_smoothing / 2


def reduced(loss, reduction, keep=None):
    """Divided by what `keep` holds, or by everything."""
    if reduction == "none":
        return loss
    keep = jnp.ones_like(loss) if keep is None else jnp.broadcast_to(keep, loss.shape)
    units = keep.astype(loss.dtype)
    units = units.max(-1) if reduction == "batchmean" else units
    return loss.sum() / (1.0 if reduction == "sum" else units.sum())


def by_formula(formula, arguments, reduction):
    """An elementwise loss."""
    given = dict(arguments)
    scores, labels = given.pop("scores"), given.pop("labels").astype(arguments["scores"].dtype)
    keep, weight = given.pop("where", None), given.pop("weight", 1.0)
    labels = smoothed(labels, given.pop("label_smoothing", 0.0))
    extras = [jnp.broadcast_to(extra, scores.shape) for extra in given.values()]
    loss = formula(scores, labels, *extras) * jnp.broadcast_to(weight, scores.shape)
    return reduced(loss if keep is None else jnp.where(keep, loss, 0), reduction, keep)


def dense_head(arguments, reduction="mean"):
    """Its logits are [batch, labels]; "none" is one loss per row."""
    given = dict(arguments)
    logits = jnp.matmul(given["features"], given["kernel"])
    if "bias" in given:
        logits = logits + given["bias"][None]
    if "positives" in given:
        labels = jax.nn.one_hot(given["positives"], logits.shape[-1]).max(-2)
    else:
        labels = given["labels"]
    labels = smoothed(labels.astype(logits.dtype), given.get("label_smoothing", 0.0))
    q = jnp.broadcast_to(given.get("pos_weight", 1.0), logits.shape).astype(logits.dtype)
    rows = bce_with_logits(logits, labels, q).sum(-1) * given.get("weight", 1.0)
    return reduced(rows, reduction) / (logits.shape[-1] if reduction == "mean" else 1)


def dense_pairs(arguments):
    images, texts = arguments["image_embeddings"], arguments["text_embeddings"]
    logits = jnp.exp(arguments["log_scale"]) * (images @ texts.T) + arguments["bias"]
    same = jnp.eye(len(images), dtype=logits.dtype)
    return bce_with_logits(logits, same).sum() / len(images)


def dense_top_k(arguments, k):
    logits = arguments["features"] @ arguments["kernel"] + arguments["bias"][None]
    return jax.lax.top_k(logits, k)[0]


# --- cases ----------------------------------------------------------------------------------------


def elementwise(loss, reduction):
    oracle = loss.oracle
    formula = FORMULAS[getattr(oracle, "func", oracle).__name__]
    formula = functools.partial(formula, **getattr(oracle, "keywords", {}))

    def draw(rng):
        scores, labels = loss.draw(rng, (ROWS, LABELS))
        drawn = {"scores": np.clip(scores, -4, 4)}
        drawn["labels"] = rng.uniform(0.1, 0.9, scores.shape) if loss.dense else labels.astype(int)
        drawn["weight"] = rng.uniform(0.5, 2, (ROWS, 1))
        if loss.pos_weight:
            drawn["pos_weight"] = rng.uniform(0.5, 2, LABELS)
        if loss.pos_weight and loss.name != "BCEWithLogitsLoss":
            drawn["label_smoothing"] = np.array(0.1)
        drawn["where"] = rng.random(scores.shape) < 0.7
        return in_float32(drawn)

    def ours(arguments):
        given = dict(arguments)
        return loss.call(given.pop("scores"), given.pop("labels"), reduction=reduction, **given)

    dense = functools.partial(by_formula, formula, reduction=reduction)
    return Case(loss.name, ours, dense, draw)


def in_float32(drawn):
    return {
        name: jnp.asarray(value, np.float32 if value.dtype == np.float64 else None)
        for name, value in drawn.items()
    }


def draw_head(rng, names):
    """The arguments of these names of a small head."""
    drawn = {
        "features": rng.normal(size=(ROWS, WIDTH)),
        "kernel": rng.normal(size=(WIDTH, LABELS)),
        "bias": rng.normal(size=LABELS),
        "labels": rng.uniform(0.1, 0.9, (ROWS, LABELS)),
        "positives": np.array([[0, 5, 5], [-1, -1, -1], [6, 2, -1]], np.int32),
        "weight": rng.uniform(0.5, 2, ROWS),
        "pos_weight": rng.uniform(0.5, 2, LABELS),
        "label_smoothing": np.array(0.1),
    }
    return in_float32({name: drawn[name] for name in names})


LAYER = ("features", "kernel")
OPTIONS = ("bias", "weight", "pos_weight", "label_smoothing")


def linear(target, names, reduction="mean", chunk_size=4):
    return Case(
        f"linear_bce_with_logits-{target}-{len(names)} options-{reduction}-{chunk_size}",
        functools.partial(head, reduction=reduction, chunk_size=chunk_size),
        functools.partial(dense_head, reduction=reduction),
        functools.partial(draw_head, names=(*LAYER, *names, target)),
    )


def pairs(arguments):
    return jaxbce.siglip_loss(**arguments, chunk_size=2)


def draw_pairs(rng):
    drawn = {
        "image_embeddings": rng.normal(size=(ROWS, WIDTH)),
        "text_embeddings": rng.normal(size=(ROWS, WIDTH)),
        "log_scale": np.array(0.5),
        "bias": np.array(-1.0),
    }
    return in_float32(drawn)


def top_k(arguments, k):
    return jaxbce.linear_top_k(**arguments, k=k, chunk_size=4)[0]


def flax_module(kernel, bias):
    """A `MultiLabelHead` of these parameters."""
    module = jaxbce.nnx.MultiLabelHead(
        *kernel.shape, chunk_size=4, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0)
    )
    module.bias[...] = bias
    return module


def flax_head(arguments):
    given = dict(arguments)
    module = flax_module(given.pop("kernel"), given.pop("bias"))
    return module.loss(given.pop("features"), **given)


ELEMENTWISE = [
    elementwise(loss, reduction)
    for loss, reduction in zip(LOSSES, itertools.cycle(["mean", "none", "batchmean"]), strict=False)
]
HEADS = [
    linear("positives", ()),
    linear("positives", OPTIONS),
    linear("positives", ("bias", "weight"), "none", None),
    linear("labels", OPTIONS, "none"),
    Case("siglip_loss", pairs, dense_pairs, draw_pairs),
]
MODULE = Case(
    "MultiLabelHead",
    flax_head,
    dense_head,
    functools.partial(draw_head, names=(*LAYER, "bias", "positives", "pos_weight")),
)
TOP_K = Case(
    "linear_top_k",
    functools.partial(top_k, k=3),
    functools.partial(dense_top_k, k=3),
    functools.partial(draw_head, names=(*LAYER, "bias")),
)
CASES = [*ELEMENTWISE, *HEADS, MODULE, TOP_K]
