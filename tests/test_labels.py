"""Label ids to multi-hot and back, the loss from ids, class balance."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import collectives

import jaxbce

POSITIVES = np.array([[0, 2, -1], [1, 4, 1], [-1, -1, -1], [3, 9, -7]])
DENSE = np.array([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]])

every_jit = pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])


# --- positives and multi-hot -------------------------------------------------------------------


@every_jit
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "int8"])
def test_multi_hot(transform, dtype):
    """Unsorted, duplicate, padded, negative and too large ids."""
    got = transform(functools.partial(jaxbce.multi_hot, num_labels=5, dtype=dtype))(POSITIVES)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, DENSE.astype(got.dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
def test_multi_hot_of_any_integer_dtype(dtype):
    """300 labels do not fit into 8 bits, and an unsigned -1 is a large id."""
    got = jaxbce.multi_hot(np.array([3, -1]).astype(dtype), 300)
    expected = [3, 255] if dtype == "uint8" else [3]
    np.testing.assert_array_equal(np.flatnonzero(got), expected)


def test_multi_hot_does_not_wrap_a_wide_id():
    with jax.enable_x64(True):
        assert not jaxbce.multi_hot(np.array([2**32 + 1]), 3).any()


@pytest.mark.parametrize(
    ("positives", "num_labels", "shape"),
    [((3, 0), 4, (3, 4)), ((0, 2), 4, (0, 4)), ((2,), 0, (0,)), ((2, 3, 1), 4, (2, 3, 4))],
    ids=["no positives", "no rows", "no labels", "three axes"],
)
def test_multi_hot_shapes(positives, num_labels, shape):
    assert jaxbce.multi_hot(np.zeros(positives, int), num_labels).shape == shape


def test_multi_hot_maps_over_any_axis():
    mapped = jax.vmap(lambda p: jaxbce.multi_hot(p, 5), in_axes=1)(POSITIVES.T)
    np.testing.assert_array_equal(mapped, DENSE)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("max_positives", "expected"),
    [
        (None, [[0, 2], [1, 4], [-1, -1], [3, -1]]),
        (3, [[0, 2, -1], [1, 4, -1], [-1, -1, -1], [3, -1, -1]]),
        (1, [[0], [1], [-1], [3]]),
        (0, np.zeros((4, 0))),
    ],
    ids=["largest row", "padded", "cut off", "none"],
)
def test_positives_from_multi_hot(max_positives, expected, dtype):
    labels = jnp.asarray(DENSE).astype(dtype)
    got = jaxbce.positives_from_multi_hot(labels, max_positives)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected)


def test_round_trip(rng):
    labels = (rng.random((2, 7, 31)) < 0.2).astype(np.float32)
    positives = jax.jit(lambda labels: jaxbce.positives_from_multi_hot(labels, 31))(labels)
    np.testing.assert_array_equal(jaxbce.multi_hot(positives, 31), labels)
    fewest = jaxbce.positives_from_multi_hot(labels)
    assert fewest.shape[-1] == labels.sum(-1).max()
    np.testing.assert_array_equal(jaxbce.multi_hot(fewest, 31), labels)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
def test_positives_of_nothing(shape):
    assert jaxbce.positives_from_multi_hot(np.zeros(shape)).shape == (*shape[:-1], 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jaxbce.multi_hot([1], 3), TypeError, "positives must be an array.*got list"),
        (lambda: jaxbce.multi_hot(DENSE * 1.0, 3), TypeError, "float.*positives_from_multi_hot"),
        (lambda: jaxbce.multi_hot(DENSE == 1, 3), TypeError, "integer label ids, got bool"),
        (lambda: jaxbce.multi_hot(np.array(1), 3), ValueError, "positives must have an axis"),
        (
            lambda: jaxbce.multi_hot(DENSE, -3),
            ValueError,
            "num_labels must be an int of at least 0, got -3",
        ),
        (lambda: jaxbce.multi_hot(DENSE, 3.0), ValueError, "num_labels must be an int.*got 3.0"),
        (lambda: jax.jit(jaxbce.multi_hot)(DENSE, 3), ValueError, "num_labels must be an int"),
        (
            lambda: jaxbce.positives_from_multi_hot(np.array(1)),
            ValueError,
            "labels must have an axis",
        ),
        (
            lambda: jaxbce.positives_from_multi_hot(DENSE, 1.5),
            ValueError,
            "max_positives must be an int.*1.5",
        ),
        (
            lambda: jax.jit(jaxbce.positives_from_multi_hot)(DENSE),
            ValueError,
            "max_positives must be given.*pass the largest",
        ),
        (
            lambda: jaxbce.positives_from_multi_hot(DENSE * 1j, 2),
            TypeError,
            "labels must be float, integer or bool, got complex",
        ),
    ],
    ids=[
        "list",
        "float positives",
        "bool positives",
        "one number",
        "negative num_labels",
        "float num_labels",
        "traced num_labels",
        "one label",
        "float max_positives",
        "traced labels",
        "complex labels",
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- sparse_bce_with_logits --------------------------------------------------------------------


OPTIONS = {
    "plain": {},
    "weight": {"weight": np.array([[0.5], [2.0], [0.0], [1.0]], np.float32)},
    "pos_weight": {"pos_weight": np.array([1, 2, 3, 0, 5], np.float32)},
    "label_smoothing": {"label_smoothing": 0.2},
    "where": {"where": DENSE.T.repeat(4, axis=1)[1:, :5] == 0},
    "none": {"reduction": "none"},
    "batchmean": {"reduction": "batchmean"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sparse_loss_equals_the_dense_one_exactly(options, dtype, rng):
    logits = jnp.asarray(rng.normal(0, 5, DENSE.shape)).astype(dtype)

    def value_and_gradient(loss, labels):
        @jax.jit
        def total(logits):
            value = loss(logits, labels, **options)
            return value.sum(), value

        (_, value), gradient = jax.value_and_grad(total, has_aux=True)(logits)
        return value, gradient

    sparse = value_and_gradient(jaxbce.sparse_bce_with_logits, POSITIVES)
    dense = value_and_gradient(jaxbce.bce_with_logits, DENSE)
    chex.assert_trees_all_equal(sparse, dense)


def test_sparse_loss_keeps_infinite_logits_right():
    logits = np.where(DENSE == 1, np.inf, -np.inf).astype(np.float32)
    assert jaxbce.sparse_bce_with_logits(logits, POSITIVES) == 0
    assert jaxbce.sparse_bce_with_logits(-logits, POSITIVES) == np.inf


def test_sparse_loss_of_sharded_logits_moves_only_scalars(mesh, rng):
    logits = rng.normal(size=(16, 32)).astype(np.float32)
    positives = rng.integers(-1, 32, (16, 3))
    both = jax.jit(jax.value_and_grad(jaxbce.sparse_bce_with_logits))
    expected = both(logits, positives)
    for axes in (("batch", None), ("batch", "labels")):
        args = (
            jax.device_put(logits, jax.NamedSharding(mesh, jax.P(*axes))),
            jax.device_put(positives, jax.NamedSharding(mesh, jax.P("batch"))),
        )
        chex.assert_trees_all_close(both(*args), expected, rtol=1e-5)
        program = both.lower(*args).compile().as_text()
        assert set(collectives(program)) == {1}


@pytest.mark.parametrize(
    ("logits", "positives", "error", "message"),
    [
        (DENSE, POSITIVES, TypeError, "logits must be floating-point"),
        (DENSE * 1.0, POSITIVES * 1.0, TypeError, "positives must be integer label ids"),
        (
            DENSE * 1.0,
            POSITIVES[0],
            ValueError,
            r"\(3,\) and logits \(4, 5\).*positives\[:, None\]",
        ),
        (DENSE * 1.0, POSITIVES[:1], ValueError, r"positives \(1, 3\) and logits \(4, 5\)"),
        (np.float32(1), POSITIVES[0], ValueError, r"logits must have an axis of labels, got \(\)"),
    ],
    ids=["integer logits", "float positives", "one row", "broadcast", "one logit"],
)
def test_sparse_loss_errors(logits, positives, error, message):
    with pytest.raises(error, match=f"sparse_bce_with_logits: .*{message}"):
        jaxbce.sparse_bce_with_logits(logits, positives)


# --- checked -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [5, -2], ids=["too large", "negative"])
@pytest.mark.parametrize(
    "call",
    [
        lambda positives: jaxbce.multi_hot(positives, 5),
        lambda positives: jaxbce.sparse_bce_with_logits(DENSE * 1.0, positives),
        lambda positives: jaxbce.prior_bias(positives=positives, num_labels=5),
    ],
    ids=["multi_hot", "sparse_bce_with_logits", "prior_bias"],
)
def test_checked_positives(call, bad):
    positives = np.where(POSITIVES == -7, bad, np.minimum(POSITIVES, 4))
    call(positives)
    with pytest.raises(ValueError, match=rf"positives must be in \[0, 5\), or -1 .*, got {bad}"):
        jaxbce.checked(call)(positives)
    jaxbce.checked(call)(np.clip(positives, -1, 4))


@pytest.mark.parametrize(
    ("labels", "message"),
    [(DENSE, r"at most 1 \(max_positives\) in a row, got 2"), (DENSE * 0.5, "be 0 or 1, got 0.5")],
    ids=["too many", "soft"],
)
def test_checked_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        jaxbce.checked(lambda labels: jaxbce.positives_from_multi_hot(labels, 1))(labels)


def test_checked_counts():
    with pytest.raises(ValueError, match=r"prior_bias: labels must be in \[0, 1\], got 2.0"):
        jaxbce.checked(jaxbce.prior_bias)(DENSE * 2.0)


# --- class balance -----------------------------------------------------------------------------


MASKS = {
    "no mask": None,
    "rows": np.array([[True], [False], [True], [True]]),
    "labels": np.array([True, False, True, True, True]),
    "elements": np.random.default_rng(0).random((4, 5)) < 0.6,
    "scalar": np.array(True),
    "nothing kept": np.zeros((4, 5), bool),
}
every_mask = pytest.mark.parametrize("where", MASKS.values(), ids=MASKS)
every_form = pytest.mark.parametrize(
    "arguments",
    [{"labels": DENSE}, {"labels": DENSE * 1.0}, {"positives": POSITIVES, "num_labels": 5}],
    ids=["integer", "float", "positives"],
)


def counts(where):
    """Positives and negatives of each label."""
    where = np.broadcast_to(True if where is None else where, DENSE.shape)
    return (DENSE * where).sum(0), ((1 - DENSE) * where).sum(0)


@every_form
@every_mask
@pytest.mark.parametrize("max_weight", [None, 1.5], ids="max_weight={}".format)
def test_balanced_pos_weight(arguments, where, max_weight):
    positives, negatives = counts(where)
    got = jaxbce.balanced_pos_weight(**arguments, where=where, max_weight=max_weight)
    expected = np.minimum(negatives / np.maximum(positives, 1), max_weight or np.inf)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@every_form
@every_mask
def test_prior_bias(arguments, where):
    positives, negatives = counts(where)
    got = jaxbce.prior_bias(**arguments, where=where)
    np.testing.assert_allclose(got, np.log((positives + 0.5) / (negatives + 0.5)), rtol=1e-6)


def test_an_untrained_head_predicts_the_base_rate(rng):
    labels = (rng.random((1000, 4)) < [0.5, 0.1, 0.01, 0.9]).astype(np.float32)
    probabilities = jax.nn.sigmoid(jaxbce.prior_bias(labels))
    np.testing.assert_allclose(probabilities, labels.mean(0), atol=1e-3)


def test_the_balanced_weight_balances(rng):
    """At logit 0 both classes then have the same loss."""
    labels = (rng.random((1000, 4)) < [0.5, 0.1, 0.01, 0.9]).astype(np.float32)
    pos_weight = jaxbce.balanced_pos_weight(labels)
    gradient = jax.grad(jaxbce.bce_with_logits)(
        np.zeros_like(labels), labels, pos_weight=pos_weight
    )
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-6)


def test_soft_labels_count_in_parts():
    labels = np.array([[0.25], [0.75], [1.0], [1.0]], np.float32)
    np.testing.assert_allclose(jaxbce.balanced_pos_weight(labels), [1 / 3], rtol=1e-6)


def test_unknown_labels_are_left_out():
    labels = np.array([[1, np.nan], [np.nan, 0], [0, 1]], np.float32)
    got = jaxbce.balanced_pos_weight(labels, where=~np.isnan(labels))
    np.testing.assert_array_equal(got, [1, 1])


def test_counts_keep_their_dtype_and_transform():
    with jax.enable_x64(True):
        assert jaxbce.prior_bias(DENSE.astype(np.float64)).dtype == jnp.float64
    assert jaxbce.prior_bias(jnp.asarray(DENSE, jnp.bfloat16)).dtype == jnp.float32
    stacked = np.stack([DENSE, DENSE[::-1]])
    expected = np.stack([jaxbce.prior_bias(DENSE)] * 2)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jaxbce.prior_bias))(stacked), expected)
    np.testing.assert_array_equal(
        jaxbce.prior_bias(stacked), jaxbce.prior_bias(np.concatenate(stacked))
    )


def test_counting_ids_needs_no_dense_labels():
    def call(positives, where):
        return jaxbce.balanced_pos_weight(positives=positives, num_labels=2**20, where=where)

    args = jnp.zeros((256, 4), jnp.int32), jnp.ones((256, 1), bool)
    memory = jax.jit(call).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * 2**20


@pytest.mark.parametrize("fn", [jaxbce.balanced_pos_weight, jaxbce.prior_bias])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of labels and positives must be given, got neither"),
        ({"labels": DENSE, "positives": POSITIVES}, ValueError, "got labels and positives"),
        ({"positives": POSITIVES}, ValueError, "num_labels must be an int of at least 0, got None"),
        ({"labels": DENSE, "num_labels": 5}, ValueError, "num_labels goes with positives"),
        ({"labels": np.float32(1)}, ValueError, "labels must have an axis"),
        ({"labels": DENSE, "where": DENSE}, TypeError, "where must be bool"),
        ({"labels": DENSE, "where": DENSE[:, 0] == 0}, ValueError, r"where\[:, None\]"),
    ],
    ids=[
        "neither",
        "both",
        "no num_labels",
        "labels and num_labels",
        "one label",
        "integer where",
        "where per row",
    ],
)
def test_count_errors(fn, arguments, error, message):
    with pytest.raises(error, match=f"{fn.__name__}: .*{message}"):
        fn(**arguments)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")], ids=str)
def test_max_weight_must_be_positive(limit):
    with pytest.raises(ValueError, match="balanced_pos_weight: max_weight must be positive, got"):
        jaxbce.balanced_pos_weight(DENSE, max_weight=limit)
