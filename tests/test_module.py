"""`BCEWithLogitsLoss`: an immutable pytree that behaves as the function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbce

LOGITS = np.array([[2.0, -1.0, 0.5]], np.float32)
LABELS = np.array([[1, 0, 1]], np.float32)
OPTIONS = {"weight": np.float32(2), "pos_weight": jnp.array([1.0, 2.0, 3.0]), "reduction": "sum"}


def test_equals_the_function():
    loss = jaxbce.BCEWithLogitsLoss(**OPTIONS, label_smoothing=0.1)
    expected = jaxbce.bce_with_logits(LOGITS, LABELS, **OPTIONS, label_smoothing=0.1)
    assert loss(LOGITS, LABELS) == expected
    masked = loss(LOGITS, LABELS, where=np.array([[True, False, True]]))
    assert masked < expected


def test_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        jaxbce.BCEWithLogitsLoss().reduction = "sum"


def test_leaves_are_the_weights():
    loss = jaxbce.BCEWithLogitsLoss(**OPTIONS)
    assert jax.tree.leaves(loss) == [OPTIONS["weight"], OPTIONS["pos_weight"]]
    doubled = jax.tree.map(lambda leaf: leaf * 2, loss)
    assert doubled.weight == 4
    assert doubled.reduction == "sum"


def test_crosses_jit_grad_and_vmap():
    loss = jaxbce.BCEWithLogitsLoss(**OPTIONS)
    expected = loss(LOGITS, LABELS)
    call = jax.jit(lambda loss, logits: loss(logits, LABELS))
    np.testing.assert_allclose(call(loss, LOGITS), expected, rtol=1e-6)
    gradient = jax.grad(lambda loss: loss(LOGITS, LABELS))(loss)
    assert isinstance(gradient, jaxbce.BCEWithLogitsLoss)
    np.testing.assert_allclose(gradient.weight * OPTIONS["weight"], expected, rtol=1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), jaxbce.BCEWithLogitsLoss(2.0))
    values = jax.vmap(lambda loss: loss(LOGITS, LABELS))(stacked)
    np.testing.assert_allclose(values[1], 2 * values[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "BCEWithLogitsLoss()"),
        ({"weight": 2.0}, "BCEWithLogitsLoss(weight=2.0)"),
        (
            {"pos_weight": np.ones(14, np.float32), "label_smoothing": 0.1},
            "BCEWithLogitsLoss(pos_weight=float32[14], label_smoothing=0.1)",
        ),
    ],
    ids=["defaults", "number", "array"],
)
def test_repr(options, text):
    assert repr(jaxbce.BCEWithLogitsLoss(**options)) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "average"}, "BCEWithLogitsLoss: reduction must be one of mean"),
        ({"label_smoothing": 2.0}, r"BCEWithLogitsLoss: label_smoothing must be in \[0, 1\]"),
    ],
    ids=["reduction", "label_smoothing"],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        jaxbce.BCEWithLogitsLoss(**options)


def test_inside_a_flax_module():
    class Classifier(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(3, 3, rngs=rngs)
            self.loss = nnx.data(jaxbce.BCEWithLogitsLoss(pos_weight=jnp.ones(3)))

    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: m.loss(m.head(LOGITS), LABELS))(model)
        optimizer.update(model, grads)
        return value

    first = train_step(model, optimizer)
    assert train_step(model, optimizer) < first
