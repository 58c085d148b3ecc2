"""The mean losses that the benchmarks compare, with the options they compare them under.

Each contender is a function of (logits, labels, options) that returns the mean over kept elements.
`options` holds any of pos_weight [labels], weight [batch, 1] and where ([batch, labels] or
[batch, 1]), and what a loss requires, [labels]. A contender without an option of that name gets the
line a user would write for it; some of our losses take no pos_weight.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxbce

Options = dict[str, Any]
Contender = Callable[[Any, Any, Options], jax.Array]


def mean(loss: jax.Array, weight: Any = None, where: Any = None, **_: Any) -> jax.Array:
    return jnp.mean(loss if weight is None else loss * weight, where=where)


def jaxbce_mean(logits: Any, labels: Any, options: Options) -> jax.Array:
    return jaxbce.bce_with_logits(logits, labels, **options)


def jaxbce_sum(logits: Any, labels: Any, options: Options) -> jax.Array:
    return jaxbce.bce_with_logits(logits, labels, reduction="sum", **options)


def jaxbce_weighted_mean(logits: Any, labels: Any, options: Options) -> jax.Array:
    return jaxbce.bce_with_logits(logits, labels, reduction="weighted_mean", **options)


def jaxbce_batchmean(logits: Any, labels: Any, options: Options) -> jax.Array:
    return jaxbce.bce_with_logits(logits, labels, reduction="batchmean", **options)


def jaxbce_axis(logits: Any, labels: Any, options: Options) -> jax.Array:
    return jaxbce.bce_with_logits(logits, labels, axis=-1, **options).sum()


def parameters(loss: Callable[..., jax.Array]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(loss).parameters)


# Our losses of logits and labels but `bce_with_logits`, by their public names without "_loss".
LOSSES = {
    name.removesuffix("_loss"): loss
    for name, loss in ((name, getattr(jaxbce, name)) for name in jaxbce.__all__)
    if list(parameters(loss))[:2] == ["logits", "labels"]
    and "reduction" in parameters(loss)
    and loss is not jaxbce.bce_with_logits
}
WITHOUT_POS_WEIGHT = {"optax focal"} | {
    name for name, loss in LOSSES.items() if "pos_weight" not in parameters(loss)
}
# What a call needs beside logits and labels.
REQUIRED = {
    name: [own for own, each in list(parameters(loss).items())[2:] if each.default is each.empty]
    for name, loss in LOSSES.items()
}


def mean_of(loss: Callable[..., jax.Array]) -> Contender:
    return lambda logits, labels, options: loss(logits, labels, **options)


def optax_mean(logits: Any, labels: Any, options: Options) -> jax.Array:
    loss = optax.sigmoid_binary_cross_entropy(logits, labels)
    if "pos_weight" in options:
        loss = loss * (1 + (options["pos_weight"] - 1) * labels)
    return mean(loss, **options)


def optax_focal_mean(logits: Any, labels: Any, options: Options) -> jax.Array:
    return mean(optax.sigmoid_focal_loss(logits, labels, gamma=2.0), **options)


def keras_mean(logits: Any, labels: Any, options: Options) -> jax.Array:
    from keras import ops  # only `cpu.py` needs it

    loss = ops.binary_crossentropy(labels, logits, from_logits=True)
    if "pos_weight" in options:
        loss = loss * (1 + (options["pos_weight"] - 1) * labels)
    return mean(loss, **options)


def textbook_value(x: jax.Array, y: jax.Array, q: jax.Array | None) -> jax.Array:
    softplus = jnp.log1p(jnp.exp(-jnp.abs(x)))
    if q is None:
        return jnp.maximum(x, 0) - x * y + softplus
    return (1 - y) * x + (1 + (q - 1) * y) * (softplus + jnp.maximum(-x, 0))


@jax.custom_vjp
def textbook(x: jax.Array, y: jax.Array, q: jax.Array | None) -> jax.Array:
    """max(x, 0) - x y + log1p(exp(-|x|)) with the gradient sigmoid(x) - y."""
    return textbook_value(x, y, q)


def textbook_fwd(x: jax.Array, y: jax.Array, q: jax.Array | None) -> tuple[jax.Array, Any]:
    return textbook_value(x, y, q), (x, y, q)


def textbook_bwd(residuals: Any, g: jax.Array) -> Any:
    x, y, q = residuals
    sigmoid = jax.nn.sigmoid(x)
    gradient = sigmoid - y if q is None else (1 + (q - 1) * y) * sigmoid - q * y
    return g * gradient, None, None


textbook.defvjp(textbook_fwd, textbook_bwd)


def textbook_mean(logits: Any, labels: Any, options: Options) -> jax.Array:
    return mean(textbook(logits, labels, options.get("pos_weight")), **options)


def naive(x: jax.Array, y: jax.Array) -> jax.Array:
    """The logarithm of the sigmoid, differentiated by JAX."""
    p = jax.nn.sigmoid(x)
    return -(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))


def textbook_elementwise(x: jax.Array, y: jax.Array) -> jax.Array:
    return textbook(x, y, None)


# (logits, labels) -> one loss per logit
ELEMENTWISE = {
    "jaxbce": jaxbce.sigmoid_binary_cross_entropy,
    "optax": optax.sigmoid_binary_cross_entropy,
    "textbook": textbook_elementwise,
    "naive": naive,
}
