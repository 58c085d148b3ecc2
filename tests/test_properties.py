"""Identities that hold for any input, searched for counterexamples by hypothesis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from losses import every_kernel, logit_losses

import jaxbce

SHAPES = st.sampled_from([(), (1,), (7,), (0,), (3, 5), (1, 4), (2, 3, 4), (0, 2)])
FINITE = st.floats(-1e4, 1e4, width=32)
UNIT = st.floats(0, 1, width=32)


@st.composite
def examples(draw, elements=FINITE):
    """(scores, labels, where) of one shape."""
    shape = draw(SHAPES)
    scores = draw(hnp.arrays(np.float32, shape, elements=elements))
    labels = draw(hnp.arrays(np.float32, shape, elements=UNIT | st.sampled_from([0.0, 1.0])))
    return scores, labels, draw(hnp.arrays(np.bool_, shape))


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def scores_for(loss, scores):
    return 1 / (1 + np.exp(-scores / 1e3)) if loss.probs else scores


@every_kernel
@given(example=examples())
def test_unreduced_sums_to_the_sum(loss, example):
    scores, labels, where = example
    scores = scores_for(loss, scores)
    unreduced = loss.unreduced(scores, labels, where=where)
    close(unreduced.sum(), loss.total(scores, labels, where=where))


@logit_losses
@given(example=examples())
def test_swapping_the_classes(loss, example):
    """(x, y) and (-x, 1 - y) are the same example, with the weight of the other class."""
    if not loss.symmetric:
        return
    x, y, _ = example
    y = y if loss.dense else y.round()
    np.testing.assert_allclose(
        loss.unreduced(-x, 1 - y), loss.unreduced(x, 1 - (1 - y)), rtol=1e-5, atol=1e-6
    )


@every_kernel
@given(example=examples(), seed=st.integers(0, 2**16))
def test_permuting_examples_permutes_losses(loss, example, seed):
    scores, labels, where = (values.reshape(-1) for values in example)
    scores = scores_for(loss, scores)
    order = np.random.default_rng(seed).permutation(scores.size)
    got = loss.unreduced(scores[order], labels[order], where=where[order])
    close(got, loss.unreduced(scores, labels, where=where)[order])


@every_kernel
@given(example=examples())
def test_masking_equals_removing(loss, example):
    scores, labels, where = example
    scores = scores_for(loss, scores)
    masked = loss.call(scores, labels, where=where)
    close(masked, loss.call(scores[where], labels[where]))


@every_kernel
@given(example=examples(), factor=st.floats(0, 8, width=32))
def test_weight_scales_the_loss(loss, example, factor):
    scores, labels, where = example
    scores = scores_for(loss, scores)
    weighted = loss.unreduced(scores, labels, weight=np.float32(factor), where=where)
    close(weighted, factor * loss.unreduced(scores, labels, where=where))


@given(example=examples(), q=st.floats(0, 8, width=32))
def test_pos_weight_weights_the_positive_part(example, q):
    x, y, _ = example
    loss = functools.partial(jaxbce.bce_with_logits, reduction="none")
    got = loss(x, y, pos_weight=np.float32(q))
    positive = q * y * loss(x, np.ones_like(y))
    close(got, (1 - y) * loss(x, np.zeros_like(y)) + positive)


@given(example=examples(elements=st.floats(-15, 15, width=32)))
def test_agrees_with_optax_where_optax_is_right(example):
    x, y, _ = example
    got = jaxbce.sigmoid_binary_cross_entropy(x, y)
    close(got, optax.sigmoid_binary_cross_entropy(jnp.asarray(x), jnp.asarray(y)))


def test_is_a_drop_in_for_optax(rng):
    x, y = rng.normal(size=(4, 3)).astype(np.float32), rng.integers(0, 2, (4, 3))
    ours, theirs = jaxbce.sigmoid_binary_cross_entropy, optax.sigmoid_binary_cross_entropy
    for transform in (lambda f: f, jax.jit, jax.vmap):
        y_ = y.astype(np.float32)
        close(transform(ours)(x, y_), transform(theirs)(jnp.asarray(x), jnp.asarray(y_)))
    gradients = [jax.grad(lambda x, f=f: f(x, jnp.asarray(y_)).mean())(x) for f in (ours, theirs)]
    close(*gradients)
