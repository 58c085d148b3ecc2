"""Any shape, dtype, mask, weight, extreme value and transformation, with the oracle as judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from losses import every_kernel

pytestmark = pytest.mark.newest

SHAPES = [(), (0,), (5,), (0, 3), (2, 0), (3, 4), (2, 1, 3)]
EXTREMES = [0.0, -0.0, 1e-30, -1e-30, 16.7, -16.7, 88.0, -88.0, 104.0, 3e4, -3e4]
EXTREMES += [np.inf, -np.inf, np.nan]
LOGITS = st.sampled_from(EXTREMES) | st.floats(-50, 50, width=16)
PROBS = st.sampled_from([0.0, 1.0, 1e-4, np.nan]) | st.floats(0, 1, width=16)
LABELS = st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=16)
WEIGHTS = st.sampled_from([0.0, 1.0, -2.0, 0.5])

POS_WEIGHTS = st.sampled_from([0.0, 1.0, 3.5, 1e-3])


def scanned(fn):
    return lambda *args: jax.lax.scan(lambda carry, row: (carry, fn(*row)), None, args)[1]


TRANSFORMS = {
    "eager": lambda fn: fn,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "jit of remat": lambda fn: jax.jit(jax.checkpoint(fn)),
}
# Over the first axis, which must have an element.
MAPPED = {"vmap": jax.vmap, "jit of vmap": lambda fn: jax.jit(jax.vmap(fn)), "scan": scanned}


@st.composite
def calls(draw, loss):
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32]))
    elements = PROBS if loss.probs else LOGITS

    def array(elements, dtype=np.float32):
        return draw(hnp.arrays(dtype, shape, elements=elements))

    options = {}
    if draw(st.booleans()):
        options["where"] = array(st.booleans(), np.bool_)
    if draw(st.booleans()):
        options["weight"] = array(WEIGHTS)
    if loss.pos_weight and draw(st.booleans()):
        options["pos_weight"] = array(POS_WEIGHTS)
    scores = jnp.asarray(array(elements)).astype(dtype)
    transforms = TRANSFORMS | (MAPPED if shape and shape[0] else {})
    return scores, array(LABELS), options, transforms[draw(st.sampled_from(list(transforms)))]


def expected_of(loss, scores, labels, options):
    """The contract, element by element: value and gradient."""
    arguments = np.float64(scores), np.float64(labels)
    if "pos_weight" in options:
        arguments += (np.float64(options["pos_weight"]),)
    with np.errstate(invalid="ignore", divide="ignore"):
        value, slope = loss.oracle(*arguments)
    weight = np.float64(options.get("weight", 1.0))
    keep = options.get("where", True) & (weight != 0)
    with np.errstate(invalid="ignore"):
        return np.where(keep, weight * value, 0.0), np.where(keep, weight * slope, 0.0)


@every_kernel
@settings(max_examples=14)
@given(data=st.data())
def test_any_call(loss, data):
    scores, labels, options, transform = data.draw(calls(loss))
    value, slope = expected_of(loss, scores, labels, options)

    def value_and_gradient(scores, labels, options):
        def both(scores):
            unreduced = loss.unreduced(scores, labels, **options)
            return unreduced.sum(), unreduced

        return jax.grad(both, has_aux=True)(scores)

    gradient, got = transform(value_and_gradient)(scores, labels, options)
    assert got.dtype == jnp.float32
    assert gradient.dtype == scores.dtype
    np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-37)
    scale = np.abs(np.float64(options.get("weight", 1.0)))
    scale = np.maximum(np.abs(slope), scale * np.maximum(options.get("pos_weight", 1.0), 1))
    info = jnp.finfo(scores.dtype)
    with np.errstate(invalid="ignore"):
        close = np.abs(np.float64(gradient) - slope) <= float(info.eps) * scale + 1e-6
    overflow = np.abs(slope) > float(info.max)
    same = (np.float64(gradient) == slope) | np.isnan(np.float64(gradient)) & np.isnan(slope)
    assert (close | same | overflow).all(), (gradient, slope)
