"""Identities that hold for any input, searched for counterexamples by hypothesis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from losses import LOSSES, every_kernel

import jaxbce

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("compile_fast")]

# Few, so that most examples find their program compiled; other shapes are for `test_fuzz.py`.
SHAPES = st.sampled_from([(7,), (3, 5)])
FINITE = st.floats(-1e4, 1e4, width=32)
UNIT = st.floats(0, 1, width=32)


@st.composite
def examples(draw, elements=FINITE):
    """(scores, labels, where) of one shape."""
    shape = draw(SHAPES)
    scores = draw(hnp.arrays(np.float32, shape, elements=elements))
    labels = draw(hnp.arrays(np.float32, shape, elements=UNIT | st.sampled_from([0.0, 1.0])))
    return scores, labels, draw(hnp.arrays(np.bool_, shape))


symmetric_kernels = pytest.mark.parametrize(
    "loss",
    [loss for loss in LOSSES if loss.own_kernel and loss.symmetric and not loss.probs],
    ids=lambda loss: loss.name,
)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def scores_for(loss, scores):
    return 1 / (1 + np.exp(-scores / 1e3)) if loss.probs else scores


@every_kernel
@given(example=examples(), factor=st.floats(0, 8, width=32), seed=st.integers(0, 2**16))
def test_sums_masks_weights_and_order(loss, example, factor, seed):
    """What holds of every loss, whatever it is."""
    scores, labels, where = example
    scores = scores_for(loss, scores)
    losses = np.asarray(loss.unreduced(scores, labels, where=where))
    # The sum is that of the elements.
    close(loss.total(scores, labels, where=where), losses.sum())
    # Masking is as removing.
    kept = np.asarray(loss.unreduced(scores, labels))[where]
    close(loss.call(scores, labels, where=where), kept.sum() / max(kept.size, 1))
    # A weight is a factor.
    weighted = loss.unreduced(scores, labels, where=where, weight=np.float32(factor))
    close(weighted, factor * losses)
    # No element knows of another.
    order = np.random.default_rng(seed).permutation(scores.size)
    scores, labels, where = (
        values.ravel()[order].reshape(values.shape) for values in (scores, labels, where)
    )
    shuffled = np.asarray(loss.unreduced(scores, labels, where=where))
    close(shuffled.ravel(), losses.ravel()[order])


@symmetric_kernels
@given(example=examples())
def test_swapping_the_classes(loss, example):
    """(x, y) and (-x, 1 - y) are the same example, with the weight of the other class."""
    x, y, _ = example
    close(loss.unreduced(-x, 1 - y), loss.unreduced(x, 1 - (1 - y)))


@given(example=examples(), q=st.floats(0, 8, width=32))
def test_pos_weight_weights_the_positive_part(example, q):
    x, y, _ = example
    loss = functools.partial(jaxbce.bce_with_logits, reduction="none")
    got = loss(x, y, pos_weight=np.float32(q))
    positive, negative = np.asarray(loss(x, np.ones_like(y))), np.asarray(loss(x, np.zeros_like(y)))
    close(got, (1 - y) * negative + np.float32(q) * y * positive)


of_optax = jax.jit(optax.sigmoid_binary_cross_entropy)


@given(example=examples(elements=st.floats(-15, 15, width=32)))
def test_agrees_with_optax_where_optax_is_right(example):
    x, y, _ = example
    close(jaxbce.sigmoid_binary_cross_entropy(x, y), of_optax(x, y))


def test_is_a_drop_in_for_optax(rng):
    x, y = rng.normal(size=(4, 3)).astype(np.float32), rng.integers(0, 2, (4, 3))
    ours, theirs = jaxbce.sigmoid_binary_cross_entropy, optax.sigmoid_binary_cross_entropy
    for transform in (lambda f: f, jax.jit, jax.vmap):
        y_ = y.astype(np.float32)
        close(transform(ours)(x, y_), transform(theirs)(jnp.asarray(x), jnp.asarray(y_)))
    gradients = [jax.grad(lambda x, f=f: f(x, jnp.asarray(y_)).mean())(x) for f in (ours, theirs)]
    close(*gradients)
