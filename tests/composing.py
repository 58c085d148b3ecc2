"""Losses to put into programs, each beside the same loss written densely in plain jnp."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from heads import head
from losses import LOSSES, bce_with_logits, reduced, with_margin

import jaxbce
import jaxbce.nnx

ROWS, WIDTH, POSITIVES, LABELS = 3, 2, 4, 7  # four different numbers: a size tells its axis


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments go by name; those of a float dtype can be differentiated."""

    name: str
    ours: Callable  # arguments -> a loss, reduced or not
    dense: Callable  # the same in plain jnp, which JAX differentiates by itself
    draw: Callable  # generator, rows, labels -> arguments
    main: tuple[str, str]  # the two arguments that programs tell apart


# --- in plain jnp --------------------------------------------------------------------------------


def smoothed(labels, label_smoothing):
    return labels * (1 - label_smoothing) + label_smoothing / 2


def dense_elementwise(formula, arguments, reduction):
    given = dict(arguments)
    x, y = given.pop("scores"), given.pop("labels")
    where, weight = given.pop("where", None), given.pop("weight", 1.0)
    y = smoothed(y.astype(x.dtype), given.pop("label_smoothing", 0.0))
    extras = {name: jnp.broadcast_to(extra, x.shape) for name, extra in given.items()}
    loss = formula(x, y, **extras) * jnp.broadcast_to(weight, x.shape)
    loss = loss if where is None else jnp.where(where, loss, 0)
    return reduced(loss, weight, where, reduction=reduction)


def dense_logits(arguments):
    logits = arguments["features"] @ arguments["kernel"]
    return logits + arguments["bias"][None] if "bias" in arguments else logits


def dense_head(arguments, reduction="mean", formula=bce_with_logits, parameter="pos_weight"):
    """Its "none" is one loss per row."""
    logits = dense_logits(arguments)
    labels = arguments.get("labels")
    if labels is None:
        labels = jax.nn.one_hot(arguments["positives"], logits.shape[-1], dtype=logits.dtype)
        labels = labels.max(-2)
    labels = smoothed(labels, arguments.get("label_smoothing", 0.0))
    loss = formula(logits, labels, jnp.broadcast_to(arguments.get(parameter, 1.0), logits.shape))
    weight = jnp.expand_dims(arguments.get("weight", jnp.ones_like(loss[:, 0])), 1)
    keep = jnp.broadcast_to(arguments.get("where", True), loss.shape)
    if "ignored" in arguments:
        keep &= jax.nn.one_hot(arguments["ignored"], loss.shape[-1]).max(-2) == 0
    loss = jnp.where(keep, loss * weight, 0)
    return loss.sum(-1) if reduction == "none" else reduced(loss, weight, keep, None, reduction)


def dense_pairs(arguments):
    images, texts = arguments["image_embeddings"], arguments["text_embeddings"]
    logits = jnp.exp(arguments["log_scale"]) * (images @ texts.T) + arguments["bias"]
    if "text_bias" in arguments:
        logits += arguments["text_bias"][None]
    ids = arguments.get("positives", jnp.arange(len(images))[:, None])
    loss = bce_with_logits(logits, jax.nn.one_hot(ids, len(texts), dtype=logits.dtype).max(-2))
    if "ignored" in arguments:
        loss = jnp.where(jax.nn.one_hot(arguments["ignored"], len(texts)).max(-2) == 0, loss, 0)
    weight = arguments.get("weight", jnp.ones_like(loss[:, 0]))
    return jnp.sum(loss * weight[:, None]) / len(images)


def dense_top_k(arguments, k):
    return jax.lax.top_k(dense_logits(arguments), k)[0]


# --- cases ---------------------------------------------------------------------------------------


def in_float32(drawn):
    return {
        name: jnp.asarray(value, np.float32 if value.dtype == np.float64 else value.dtype)
        for name, value in drawn.items()
    }


def elementwise(loss, reduction):
    """A case of an entry of `LOSSES`, with every option that it takes."""

    def draw(rng, rows=ROWS, labels=LABELS):
        scores, hard = loss.draw(rng, (rows, labels))
        drawn = {
            "scores": np.clip(scores, -4, 4),
            "labels": rng.uniform(0.1, 0.9, hard.shape) if loss.dense else hard.astype(np.int32),
            "weight": rng.uniform(0.5, 2, (rows, 1)),
            **loss.required(rng, (rows, labels)),
        }
        if loss.pos_weight:
            drawn["pos_weight"] = rng.uniform(0.5, 2, labels)
        if loss.smoothing:
            drawn["label_smoothing"] = np.array(0.1)
        return in_float32(drawn | {"where": rng.random(hard.shape) < 0.7})

    def ours(arguments):
        given = dict(arguments)
        return loss.call(given.pop("scores"), given.pop("labels"), reduction=reduction, **given)

    dense = functools.partial(dense_elementwise, loss.formula, reduction=reduction)
    name = f"{loss.name}-{reduction}"
    return Case(name, ours, dense, draw, ("scores", "labels" if loss.dense else "weight"))


LAYER = ("features", "kernel")
OPTIONS = ("bias", "weight", "pos_weight", "label_smoothing")


def draw_head(rng, rows=ROWS, labels=LABELS, names=()):
    """The arguments of these names, and the layer."""
    drawn = {
        "features": rng.normal(size=(rows, WIDTH)),
        "kernel": rng.normal(size=(WIDTH, labels)),
        "bias": rng.normal(size=labels),
        "labels": rng.uniform(0.1, 0.9, (rows, labels)),
        "positives": rng.integers(-2, labels, (rows, POSITIVES)).clip(-1).astype(np.int32),
        "weight": rng.uniform(0.5, 2, rows),
        "pos_weight": rng.uniform(0.5, 2, labels),
        "label_smoothing": np.array(0.1),
        "margin": rng.uniform(-1, 1, labels),
        "where": rng.random((rows, labels)) < 0.7,
        "ignored": rng.integers(-2, labels, (rows, 2)).clip(-1).astype(np.int32),
    }
    return in_float32({name: drawn[name] for name in (*LAYER, *names)})


def split(arguments):
    """Features, the parameters as `linear_update` takes them, and the other arguments."""
    given = dict(arguments)
    params = {name: given.pop(name) for name in ("kernel", "bias") if name in given}
    return given.pop("features"), params, given


def linear(name, names, reduction="mean", chunk_size=4):
    def ours(arguments, **devices):
        return head(arguments, reduction=reduction, chunk_size=chunk_size, **devices)

    dense = functools.partial(dense_head, reduction=reduction)
    return Case(f"head-{name}-{reduction}", ours, dense, draw_of(*names), LAYER)


def margin_loss(x, y, m):
    return with_margin(x, y, jnp.broadcast_to(m, x.shape))


def own_loss(arguments, *, reduction="none", chunk_size=4, **devices):
    given = dict(arguments)
    layer = [given.pop(name) for name in ("features", "kernel", "bias")]
    options = {"reduction": reduction, "chunk_size": chunk_size, **devices}
    per_label = (given.pop("margin"),)
    return jaxbce.linear_loss(margin_loss, *layer, per_label=per_label, **given, **options)


def draw_of(*names):
    return functools.partial(draw_head, names=names)


def pairs(arguments, **devices):
    return jaxbce.siglip_loss(**arguments, **{"chunk_size": 2, **devices})


def draw_pairs(rng, rows=ROWS, labels=None):
    drawn = {
        "image_embeddings": rng.normal(size=(rows, WIDTH)),
        "text_embeddings": rng.normal(size=(rows + 2, WIDTH)),
        "log_scale": np.array(0.5),
        "bias": np.array(-1.0),
        "positives": rng.integers(-1, rows + 2, (rows, 2)).astype(np.int32),
        "ignored": rng.integers(-1, rows + 2, (rows, 1)).astype(np.int32),
        "weight": rng.uniform(0.5, 2, rows),
        "text_bias": rng.normal(size=rows + 2),
    }
    return in_float32(drawn)


def top_k(arguments, k):
    return jaxbce.linear_top_k(**arguments, k=k, chunk_size=4)[0]


def flax_module(arguments):
    """A `MultiLabelHead` of the parameters among the arguments, and the other arguments."""
    given = dict(arguments)
    kernel = given.pop("kernel")
    module = jaxbce.nnx.MultiLabelHead(
        *kernel.shape,
        chunk_size=4,
        param_dtype=kernel.dtype,
        kernel_init=lambda *_: kernel,
        rngs=nnx.Rngs(0),
    )
    module.bias[...] = given.pop("bias")
    return module, given


def flax_loss(arguments):
    module, given = flax_module(arguments)
    return module.loss(given.pop("features"), **given)


def flax_top_k(arguments, k):
    module, given = flax_module(arguments)
    return module.top_k(given["features"], k)[0]


ELEMENTWISE = [
    elementwise(loss, reduction)
    for loss, reduction in zip(
        LOSSES, itertools.cycle(["mean", "none", "batchmean", "weighted_mean"]), strict=False
    )
]
PLAIN = linear("plain", ["positives"])
OPTIONAL = linear("options", [*OPTIONS, "where", "ignored", "positives"])
SOFT = Case(
    "linear_loss-soft labels-none",
    own_loss,
    functools.partial(dense_head, reduction="none", formula=with_margin, parameter="margin"),
    draw_of("bias", "weight", "margin", "labels"),
    LAYER,
)
SIGLIP = Case(
    "siglip_loss", pairs, dense_pairs, draw_pairs, ("image_embeddings", "text_embeddings")
)
FLAX = Case("MultiLabelHead.loss", flax_loss, dense_head, draw_of("bias", "positives"), LAYER)
TOP_K, FLAX_TOP_K = (
    Case(
        name,
        functools.partial(ours, k=3),
        functools.partial(dense_top_k, k=3),
        draw_of("bias"),
        LAYER,
    )
    for name, ours in (("linear_top_k", top_k), ("MultiLabelHead.top_k", flax_top_k))
)
HEADS = [PLAIN, OPTIONAL, SOFT, SIGLIP]
CASES = [*ELEMENTWISE, *HEADS, FLAX, TOP_K, FLAX_TOP_K]
