"""Bad input: the error names the function, the argument, what was received and how to mend it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import dense_losses

import jaxbce

X = np.zeros((4, 3), np.float32)


@dense_losses
@pytest.mark.parametrize(
    ("scores", "labels", "options", "error", "message"),
    [
        (X.astype(int), X, {}, TypeError, r"must be floating-point, got int.*asarray"),
        ([0.0], X, {}, TypeError, r"must be an array or a number, got list.*asarray"),
        (X, None, {}, TypeError, r"labels must be an array or a number, got NoneType"),
        (X, X + 0j, {}, TypeError, r"labels must be float, integer or bool, got complex64"),
        (X, X[0], {}, ValueError, r"labels \(3,\) and .* \(4, 3\); nothing is broadcast.*reshape"),
        (X[:, :1], X[:, 0], {}, ValueError, r"labels\[:, None\]"),
        (X, X, {"weight": X[:, 0]}, ValueError, r"weight of shape \(4,\).*weight\[:, None\]"),
        (X[0], X[0], {"weight": X}, ValueError, r"weight of shape \(4, 3\) does not broadcast"),
        (X, X, {"where": X[:, 0] == 0}, ValueError, r"where of shape \(4,\).*where\[:, None\]"),
        (X, X, {"where": X}, TypeError, r"where must be bool, got float32; write where != 0"),
        (X, X, {"weight": [1.0]}, TypeError, r"weight must be an array or a number, got list"),
    ],
    ids=[
        "integer scores",
        "list",
        "no labels",
        "complex labels",
        "labels of another rank",
        "(N,) against (N, 1)",
        "weight per row",
        "weight enlarges",
        "where per row",
        "float where",
        "weight in a list",
    ],
)
def test_bad_arguments(loss, scores, labels, options, error, message):
    with pytest.raises(error, match=message) as raised:
        loss.total(scores, labels, **options)
    assert loss.name.split("-")[0].lower()[:3] in str(raised.value).lower()


@pytest.mark.parametrize("fn", [jaxbce.bce_with_logits, jaxbce.bce], ids=lambda fn: fn.__name__)
def test_unknown_reduction_lists_the_valid_ones(fn):
    with pytest.raises(ValueError, match="mean, sum, batchmean, none, got 'average'"):
        fn(X, X, reduction="average")


def test_pos_weight_must_broadcast():
    with pytest.raises(ValueError, match=r"pos_weight of shape \(4,\).*pos_weight\[:, None\]"):
        jaxbce.bce_with_logits(X, X, pos_weight=X[:, 0])


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")], ids=str)
def test_label_smoothing_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got"):
        jaxbce.bce_with_logits(X, X, label_smoothing=fraction)


def test_label_smoothing_must_be_one_number():
    with pytest.raises(ValueError, match=r"label_smoothing must be one number.*\(4, 3\)"):
        jaxbce.bce_with_logits(X, X, label_smoothing=X)


@pytest.mark.parametrize("traced", [False, True], ids=["number", "traced"])
@pytest.mark.parametrize("a", [0.0, 0.2, 1.0], ids="a={}".format)
def test_label_smoothing_goes_toward_one_half(a, traced, rng):
    labels = rng.integers(0, 2, X.shape).astype(np.float32)
    logits = rng.normal(size=X.shape).astype(np.float32)
    a_ = jnp.float32(a) if traced else a
    got = jaxbce.bce_with_logits(logits, labels, label_smoothing=a_)
    expected = jaxbce.bce_with_logits(logits, labels * np.float32(1 - a) + np.float32(a / 2))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


# --- checked -----------------------------------------------------------------------------------


def scanned(scores, labels, **options):
    def body(carry, row):
        return carry, jaxbce.bce_with_logits(*row, **options)

    return jax.lax.scan(body, 0, (scores, labels))[1]


WRAPPED = {
    "eager": jaxbce.bce_with_logits,
    "jit": jax.jit(jaxbce.bce_with_logits),
    "grad": jax.grad(jaxbce.bce_with_logits),
    "jit of grad": jax.jit(jax.grad(jaxbce.bce_with_logits)),
    "vmap": jax.vmap(jaxbce.bce_with_logits),
    "scan": scanned,
    "remat": jax.grad(jax.checkpoint(jaxbce.bce_with_logits)),
}
every_wrapping = pytest.mark.parametrize("fn", WRAPPED.values(), ids=WRAPPED)


@every_wrapping
@pytest.mark.parametrize("bad", [2.0, -0.5, np.nan], ids=str)
def test_checked_names_function_argument_and_value(fn, bad):
    labels = X.copy()
    labels[2, 1] = bad
    unchecked = fn(X, labels)  # traced without checks first: they must still appear
    with pytest.raises(ValueError, match=rf"bce_with_logits: labels must be .*got {bad}"):
        jaxbce.checked(fn)(X, labels)
    np.testing.assert_array_equal(fn(X, labels), unchecked)


@every_wrapping
def test_checked_changes_no_result(fn, rng):
    args = rng.normal(size=(4, 3)).astype(np.float32), X
    np.testing.assert_allclose(jaxbce.checked(fn)(*args), fn(*args), rtol=1e-6)


def test_checked_ignores_what_is_not_kept():
    labels = X.copy()
    labels[1] = np.nan
    kept = np.array([[True], [False], [True], [True]])
    jaxbce.checked(jaxbce.bce_with_logits)(X, labels, where=kept)
    jaxbce.checked(jaxbce.bce_with_logits)(X, labels, weight=kept.astype(np.float32))


def test_checked_probabilities():
    with pytest.raises(ValueError, match=r"bce: probs must be in \[0, 1\], got 1.5"):
        jaxbce.checked(jaxbce.bce)(X + 1.5, X)


def test_checked_traced_label_smoothing():
    smoothed = functools.partial(jaxbce.bce_with_logits, X, X)
    with pytest.raises(ValueError, match=r"label_smoothing must be in .* got 1\.5"):
        jaxbce.checked(lambda a: smoothed(label_smoothing=a))(jnp.float32(1.5))


def test_checked_on_an_empty_array():
    assert jaxbce.checked(jaxbce.bce_with_logits)(X[:0], X[:0]) == 0


def test_checked_nests():
    with pytest.raises(ValueError, match="bce_with_logits: labels"):
        jaxbce.checked(jaxbce.checked(jaxbce.bce_with_logits))(X, X + 2)


def test_without_checked_nothing_is_traced():
    program = str(jax.make_jaxpr(jaxbce.bce_with_logits)(X, X))
    assert "check" not in program
