"""Bad input: the error names the function, the argument, what was received and how to mend it."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from losses import FIRST, FUNCTIONS, LOSSES, dense_losses

import jaxbce
import jaxbce.nnx

pytestmark = pytest.mark.usefixtures("compile_fast")

X = np.zeros((4, 3), np.float32)
IDS = np.array([[2], [0], [1], [2]])


@dense_losses
@pytest.mark.parametrize(
    ("scores", "labels", "options", "error", "message"),
    [
        (X.astype(int), X > 0, {}, TypeError, r"must be floating-point, got int\d+; convert with"),
        (X > 0, X, {}, TypeError, r"got bool; are .* and labels swapped\? If not, convert with"),
        (X.astype(int), X, {}, TypeError, r"got int\d+; are .* and labels swapped\? If not,"),
        ([0.0], X, {}, TypeError, r"must be an array or a number, got list.*asarray"),
        (X, None, {}, TypeError, r"labels must be an array or a number, got NoneType"),
        (X, X + 0j, {}, TypeError, r"labels must be float, integer or bool, got complex64"),
        (
            X,
            X[0],
            {},
            ValueError,
            r"labels \(3,\) and .* \(4, 3\); nothing is broadcast.*sizes must",
        ),
        (X[:, :1], X[:, 0], {}, ValueError, r"pass labels\[..., None\]"),
        (X[:, :1], IDS[:, 0], {}, ValueError, r"pass labels\[..., None\]"),
        (
            X,
            IDS[:, 0],
            {},
            ValueError,
            r"labels \(4,\) and .*multi_hot\(labels\[..., None\], 3\), .*sparse_bce_with_logits",
        ),
        (X, X, {"weight": X[:, 0]}, ValueError, r"weight of shape \(4,\).*weight\[:, None\]"),
        (X[0], X[0], {"weight": X}, ValueError, r"weight of shape \(4, 3\) does not broadcast"),
        (X, X, {"where": X[:, 0] == 0}, ValueError, r"where of shape \(4,\).*where\[:, None\]"),
        (X, X, {"where": X}, TypeError, r"where must be bool, got float32; write where != 0"),
        (X, X, {"weight": [1.0]}, TypeError, r"weight must be an array or a number, got list"),
    ],
    ids=[
        "integer scores",
        "bool scores, float labels",
        "integer scores, float labels",
        "list",
        "no labels",
        "complex labels",
        "labels of another rank",
        "(N,) against (N, 1)",
        "integers (N,) against (N, 1)",
        "class ids",
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
    with pytest.raises(
        ValueError, match="mean, weighted_mean, sum, batchmean, none, got 'average'"
    ):
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


# --- what is given: arrays of numbers ------------------------------------------------------------

FEATURES = np.ones((4, 2), np.float32)
KERNEL = np.ones((2, 3), np.float32)


def of_scores(name):
    """The call of a loss of the matrix, of its scores."""
    fn = getattr(jaxbce, name)
    argument = next(iter(inspect.signature(fn).parameters))
    return argument, X, lambda v: fn(v, X, **FIRST[name].numbers)


# Every function, of the one argument that a test replaces.
CALLS = {name: of_scores(name) for name in FUNCTIONS} | {
    "bce_with_logits": ("labels", X, lambda v: jaxbce.bce_with_logits(X, v)),
    "sigmoid_focal_loss": ("gamma", X, lambda v: jaxbce.sigmoid_focal_loss(X, X, gamma=v)),
    "softplus": ("x", X, jaxbce.softplus),
    "log_sigmoid": ("x", X, jaxbce.log_sigmoid),
    "sigmoid": ("x", X, jaxbce.sigmoid),
    "asymmetric_loss": ("weight", X, lambda v: jaxbce.asymmetric_loss(X, X, weight=v)),
    "sparse_bce_with_logits": ("positives", IDS, lambda v: jaxbce.sparse_bce_with_logits(X, v)),
    "linear_bce_with_logits": (
        "kernel",
        KERNEL,
        lambda v: jaxbce.linear_bce_with_logits(FEATURES, v, positives=IDS),
    ),
    "linear_loss": (
        "features",
        FEATURES,
        lambda v: jaxbce.linear_loss(jnp.multiply, v, KERNEL, positives=IDS),
    ),
    "linear_update": (
        "features",
        FEATURES,
        lambda v: jaxbce.linear_update(
            optax.sgd(1.0), v, {"kernel": KERNEL}, optax.sgd(1.0).init(KERNEL), positives=IDS
        ),
    ),
    "linear_top_k": ("features", FEATURES, lambda v: jaxbce.linear_top_k(v, KERNEL, k=1)),
    "siglip_loss": (
        "text_embeddings",
        FEATURES,
        lambda v: jaxbce.siglip_loss(FEATURES, v, 0.0, 0.0),
    ),
    "multi_hot": ("positives", IDS, lambda v: jaxbce.multi_hot(v, 3)),
    "positives_from_multi_hot": ("labels", X, lambda v: jaxbce.positives_from_multi_hot(v, 1)),
    "balanced_pos_weight": ("labels", X, jaxbce.balanced_pos_weight),
    "prior_bias": ("labels", X, jaxbce.prior_bias),
}
every_call = pytest.mark.parametrize(("argument", "value", "call"), CALLS.values(), ids=list(CALLS))


def test_every_function_is_called_here():
    public = {name for name in jaxbce.__all__ if inspect.isfunction(getattr(jaxbce, name))}
    # What takes no arrays of numbers has its errors elsewhere: `test_labels.py` has those of rows.
    assert set(CALLS) == public - {"checked", "positives_from_rows"}


class Parameter:
    """What a library wraps around an array, such as `flax.nnx.Param`."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return jnp.asarray(self.value)


class Series:
    """An array of another library, such as that of pandas."""

    def __init__(self, value):
        self.value = value

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.value, dtype)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: jaxbce.bce_with_logits(None, X), "logits"),
        (lambda: jaxbce.sigmoid_binary_cross_entropy(None, X), "logits"),
        (lambda: jaxbce.sigmoid_binary_cross_entropy(X, None), "labels"),
        (lambda: jaxbce.bce(None, X, reduction="none"), "probs"),
        (lambda: jaxbce.sparse_bce_with_logits(X, None), "positives"),
        (lambda: jaxbce.linear_bce_with_logits(None, KERNEL, positives=IDS), "features"),
        (lambda: jaxbce.linear_bce_with_logits(FEATURES, None, positives=IDS), "kernel"),
        (lambda: jaxbce.linear_top_k(FEATURES, None, k=1), "kernel"),
        (lambda: jaxbce.siglip_loss(None, FEATURES, 0.0, 0.0), "image_embeddings"),
        (lambda: jaxbce.siglip_loss(FEATURES, FEATURES, None, 0.0), "log_scale"),
        (lambda: jaxbce.multi_hot(None, 3), "positives"),
        (lambda: jaxbce.positives_from_multi_hot(None, 3), "labels"),
    ],
    ids=[
        "bce_with_logits",
        "sigmoid_binary_cross_entropy, logits",
        "sigmoid_binary_cross_entropy, labels",
        "bce",
        "sparse_bce_with_logits",
        "linear_bce_with_logits, features",
        "linear_bce_with_logits, kernel",
        "linear_top_k",
        "siglip_loss, images",
        "siglip_loss, scale",
        "multi_hot",
        "positives_from_multi_hot",
    ],
)
def test_what_is_required(call, argument):
    with pytest.raises(TypeError, match=f"{argument} must be .* got NoneType; it is required"):
        call()


@pytest.mark.parametrize(
    ("loss", "parameter"),
    [(loss, parameter) for loss in LOSSES for parameter in loss.numbers],
    ids=lambda each: each if isinstance(each, str) else each.name,
)
def test_what_a_loss_requires(loss, parameter):
    def call(value):
        return loss.call(X, X, **{parameter: value})

    with pytest.raises(TypeError, match=f"{parameter} is a required parameter of this loss"):
        call(None)
    with pytest.raises(TypeError, match=f"{parameter} must be an array or a number, got list"):
        call([0.0])
    with pytest.raises(ValueError, match=rf"{parameter} of .*\(4,\).*{parameter}\[:, None\]"):
        call(X[:, 0])


@every_call
def test_a_parameter_is_its_array(argument, value, call):
    assert jax.tree.all(jax.tree.map(np.array_equal, call(Parameter(value)), call(value)))


SGD = optax.sgd(0.1)
PARAMS = {"kernel": KERNEL, "bias": KERNEL[0]}


def module():
    head = jaxbce.nnx.MultiLabelHead(2, 3, prior=0.1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(head, SGD, wrt=nnx.Param)
    step = head.update(optimizer, FEATURES, positives=IDS, label_smoothing=0.1)
    results = head.loss(FEATURES, positives=IDS, where=True), head.top_k(FEATURES, 2)
    return step, results, head(FEATURES), head.kernel[...]


# Calls with numbers in place of arrays, of Python (n = float) and of NumPy, and in chunks.
WITH_NUMBERS = {
    name: lambda n, loss=loss: loss.call(
        n(0.5), 1, weight=n(2), **({"label_smoothing": n(0.1)} if loss.smoothing else {})
    )
    for name, loss in FIRST.items()
} | {
    "bce_with_logits, options": lambda n: jaxbce.bce_with_logits(
        X, X, weight=n(2), pos_weight=n(3), label_smoothing=n(0.1), where=True
    ),
    "bce_with_logits": lambda n: jaxbce.bce_with_logits(n(1), True, reduction="none"),
    "bce_with_logits, gradient": lambda n: jax.grad(jaxbce.bce_with_logits)(n(1), 1, weight=n(2)),
    "bce_with_logits, hessian": lambda n: jax.hessian(jaxbce.bce_with_logits)(
        n(1), 1, weight=n(2), forward_mode=True
    ),
    "BCEWithLogitsLoss": lambda n: jaxbce.BCEWithLogitsLoss(n(2), n(3))(X, X, where=np.True_),
    "focal_loss": lambda n: jaxbce.focal_loss(X, X, alpha=n(0.3), weight=n(2)),
    "sigmoid_focal_loss": lambda n: jaxbce.sigmoid_focal_loss(X, X, alpha=n(0.3), gamma=n(1.5)),
    "sparse_bce_with_logits": lambda n: jaxbce.sparse_bce_with_logits(
        X, IDS, weight=n(2), pos_weight=2, label_smoothing=n(0.1), where=True
    ),
    "softplus": lambda n: jaxbce.softplus(n(1)),
    "sigmoid": lambda n: jaxbce.sigmoid(2),
    "log_sigmoid": lambda n: jaxbce.log_sigmoid(True),
    "linear_bce_with_logits": lambda n: jax.value_and_grad(jaxbce.linear_bce_with_logits)(
        FEATURES, KERNEL, positives=IDS, where=True, label_smoothing=n(0.1)
    ),
    "linear_loss": lambda n: jaxbce.linear_loss(
        jnp.multiply, FEATURES, KERNEL, labels=X, where=True, reduction="none", chunk_size=2
    ),
    "linear_update": lambda n: jaxbce.linear_update(
        SGD, FEATURES, PARAMS, SGD.init(PARAMS), positives=IDS, label_smoothing=n(0.1), chunk_size=2
    ),
    "linear_top_k": lambda n: jaxbce.linear_top_k(FEATURES, KERNEL, k=1, chunk_size=1),
    "siglip_loss": lambda n: jax.value_and_grad(jaxbce.siglip_loss)(
        FEATURES, FEATURES, n(0.5), n(-1), chunk_size=2
    ),
    "balanced_pos_weight": lambda n: jaxbce.balanced_pos_weight(X, where=True, max_weight=n(2)),
    "prior_bias": lambda n: jaxbce.prior_bias(positives=IDS, num_labels=3, where=True),
    "multi_hot": lambda n: jaxbce.multi_hot(IDS, np.int64(3), dtype=bool),
    "positives_from_multi_hot": lambda n: jaxbce.positives_from_multi_hot(X),
    "positives_from_rows": lambda n: jaxbce.positives_from_rows(IDS, np.int64(2)),
    "checked": lambda n: jaxbce.checked(jaxbce.bce_with_logits)(X, X, weight=n(2)),
    "MultiLabelHead": lambda n: module(),
}


def assert_same_without_jit(call):
    expected = call()
    with jax.disable_jit():
        got = call()
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, expected)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@every_call
def test_without_jit(argument, value, call):
    assert_same_without_jit(lambda: call(value))


@pytest.mark.thorough
@pytest.mark.parametrize("number", [float, np.float32], ids=["Python", "NumPy"])
@pytest.mark.parametrize("call", WITH_NUMBERS.values(), ids=list(WITH_NUMBERS))
def test_without_jit_of_numbers(call, number):
    assert_same_without_jit(lambda: call(number))


@every_call
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.tolist(),
            "or a number, got list; (wrap it in jax.numpy.asarray|.*positives_from_rows)",
        ),
        (lambda v: "text", "or a number, got str; pass an array"),
        (Series, "or a number, got Series; wrap it in jax.numpy.asarray"),
        (
            lambda v: v.astype(object),
            "of numbers of at most 64 bits, got dtype object; pass one of a float",
        ),
        (lambda v: v.astype(str), "of numbers of at most 64 bits, got dtype <U"),
        (lambda v: v.astype(np.longdouble), "of numbers of at most 64 bits, got dtype float128"),
        (lambda v: jax.random.key(0), "of numbers of at most 64 bits, got dtype key"),
    ],
    ids=["list", "str", "pandas", "object", "text", "long double", "key"],
)
def test_what_is_no_array_of_numbers(argument, value, call, change, message, request):
    name = request.node.callspec.id.rsplit("-", 1)[-1]
    with pytest.raises(TypeError, match=f"{name}: {argument} must be an array {message}"):
        call(change(value))


NARROWED = {
    "bce_with_logits": ((4, 3), lambda v: jaxbce.bce_with_logits(X + 1, v)),
    "sparse_bce_with_logits": ((4, 1), lambda v: jaxbce.sparse_bce_with_logits(X + 1, v)),
    "linear_bce_with_logits": (
        (4, 1),
        lambda v: jaxbce.linear_bce_with_logits(FEATURES, KERNEL, positives=v),
    ),
    "multi_hot": ((4, 1), lambda v: jaxbce.multi_hot(v, 3)),
    "balanced_pos_weight": (
        (4, 1),
        lambda v: jaxbce.balanced_pos_weight(positives=v, num_labels=3),
    ),
}
every_narrowed = pytest.mark.parametrize(("shape", "call"), NARROWED.values(), ids=list(NARROWED))


@every_narrowed
@pytest.mark.parametrize(
    "wide",
    [np.int64(2**32 + 1), np.int64(2**32), np.int64(-(2**63)), np.uint64(2**63 + 1)],
    ids=["2^32 + 1", "2^32", "NaN cast to an integer", "uint64"],
)
def test_a_wide_integer_does_not_become_a_small_one(shape, call, wide):
    """JAX takes the lower 32 bits, of which these are 0 or 1: a label like any other."""
    got = call(np.full(shape, wide))
    for small in (0, 1):
        assert not np.array_equal(got, call(np.full(shape, small)))


@pytest.mark.parametrize("weight", [2**40, np.int64(2**40), np.full((4, 1), 2**40)], ids=type)
def test_a_wide_weight_is_that_number(weight):
    assert jaxbce.bce_with_logits(X, X, weight=weight) == 2.0**40 * jaxbce.bce_with_logits(X, X)


def test_an_integer_that_is_no_float():
    with pytest.raises(ValueError, match=r"bce_with_logits: weight must be below 3\.4e38"):
        jaxbce.bce_with_logits(X, X, weight=10**400)


@every_narrowed
def test_checked_names_the_wide_integer(shape, call):
    labels = call is NARROWED["bce_with_logits"][1]  # which become floats
    found = "4294967296" if labels else "214748364[78]"
    with pytest.raises(ValueError, match=f"must be .*, got {found}"):
        jaxbce.checked(lambda: call(np.full(shape, 2**32 + 1)))()


def test_checked_names_the_wide_integer_that_it_is_given():
    ids = IDS.astype(np.int64)
    ids[2] = 2**32 + 1
    with pytest.raises(ValueError, match=r"checked: .* holds 4294967297, which JAX"):
        jaxbce.checked(jaxbce.sparse_bce_with_logits)(X, ids)
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"positives .* got 4294967297"):
        jaxbce.checked(jaxbce.sparse_bce_with_logits)(X, ids)


@pytest.mark.parametrize(
    "number", [np.float32(7), np.float64(-1), np.array(7.0), np.int64(2), np.nan], ids=repr
)
@pytest.mark.parametrize(
    "call",
    [
        lambda a: jaxbce.bce_with_logits(X, X, label_smoothing=a),
        lambda a: jaxbce.sparse_bce_with_logits(X, IDS, label_smoothing=a),
        lambda a: jaxbce.linear_bce_with_logits(FEATURES, KERNEL, positives=IDS, label_smoothing=a),
        lambda a: jaxbce.BCEWithLogitsLoss(label_smoothing=a),
        lambda a: jaxbce.sigmoid_focal_loss(X, X, alpha=a),
        lambda a: jaxbce.asymmetric_loss(X, X, clip=a),
        lambda a: jaxbce.balanced_pos_weight(X, max_weight=-abs(a)),
    ],
    ids=["bce", "sparse", "head", "object", "alpha", "clip", "max_weight"],
)
def test_a_known_number_is_in_its_range(call, number):
    with pytest.raises(ValueError, match=r"must be (in|positive)"):
        call(number)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_known_number_of_numpy_is_that_number(dtype):
    """Also of a dtype in which the largest float32 is infinite."""
    for number in (np.dtype(dtype).type(2), np.array(2, dtype)):
        assert jaxbce.focal_loss(X, X, gamma=number) == jaxbce.focal_loss(X, X, gamma=2.0)


@pytest.mark.parametrize("value", [np.array(2j), np.array("2")], ids=["complex", "text"])
def test_an_option_is_a_real_number(value):
    with pytest.raises(TypeError, match="asymmetric_loss: clip must be a Python number, known"):
        jaxbce.asymmetric_loss(X, X, clip=value)
    with pytest.raises(
        TypeError, match=r"bce_with_logits: label_smoothing must be .*(real part|<U)"
    ):
        jaxbce.bce_with_logits(X, X, label_smoothing=value)


@pytest.mark.parametrize(
    "call",
    [
        lambda a: jaxbce.focal_loss(X, X, gamma=a),
        lambda a: jaxbce.asymmetric_loss(X, X, gamma_neg=a),
        lambda a: jaxbce.asymmetric_loss(X, X, gamma_pos=a),
    ],
    ids=["gamma", "gamma_neg", "gamma_pos"],
)
@pytest.mark.parametrize("number", [1e300, float("inf"), 10**400], ids=["1e300", "inf", "10**400"])
def test_a_known_number_is_finite_in_float32(call, number):
    with pytest.raises(ValueError, match=r"gamma.* must be finite and at least 0, got"):
        call(number)


def test_clip_none_says_what_turns_it_off():
    with pytest.raises(TypeError, match=r"clip must be a number, got None; pass 0\.0"):
        jaxbce.asymmetric_loss(X, X, clip=None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: jaxbce.linear_top_k(FEATURES, KERNEL, k=jnp.array(1)),
            ValueError,
            r"linear_top_k: k must be an int of at least 1 and at most 3, got Array",
        ),
        (
            lambda: jaxbce.linear_bce_with_logits(
                FEATURES, KERNEL, positives=IDS, mesh="x", batch_axis="x"
            ),
            TypeError,
            r"linear_bce_with_logits: mesh must be a jax.sharding.Mesh, got str",
        ),
        (
            lambda: jaxbce.siglip_loss(FEATURES, FEATURES, 0.0, 0.0, mesh="x", axis="x"),
            TypeError,
            r"siglip_loss: mesh must be a jax.sharding.Mesh, got str",
        ),
        (
            lambda: jaxbce.multi_hot(IDS, 3, dtype="float31"),
            TypeError,
            r"multi_hot: dtype must be a float, integer or bool dtype, got 'float31'",
        ),
        (
            lambda: jaxbce.multi_hot(IDS, 3, dtype=complex),
            TypeError,
            r"multi_hot: dtype must be a float, integer or bool dtype, got <class 'complex'>",
        ),
        (
            lambda: jaxbce.siglip_loss(FEATURES, FEATURES[:3], 0.0, 0.0),
            ValueError,
            r"text_embeddings must have .* got 3 texts .*, with its other copies in ignored",
        ),
        (
            lambda: jaxbce.linear_bce_with_logits(FEATURES, KERNEL, labels=X.T),
            ValueError,
            r"labels must have shape .* pass labels.T",
        ),
        (
            lambda: jaxbce.linear_bce_with_logits(FEATURES, KERNEL, labels=IDS[:, 0]),
            ValueError,
            r"labels must have shape .* got \(4,\); class ids are positives=labels\[..., None\]",
        ),
        (
            lambda: jaxbce.linear_bce_with_logits(FEATURES, KERNEL.T, positives=IDS),
            ValueError,
            r"kernel must have shape .* got \(3, 2\); .*takes transpose_kernel=True",
        ),
        (
            lambda: jaxbce.linear_bce_with_logits(FEATURES, KERNEL, positives=IDS, weight=2.0),
            ValueError,
            r"weight must have shape .* use jax.numpy.broadcast_to\(weight, \(4,\)\)",
        ),
        (
            lambda: jaxbce.bce_with_logits(X, X, weight=X[None]),
            ValueError,
            r"weight of shape \(1, 4, 3\) .*; it must have no more axes",
        ),
        (
            lambda: jaxbce.bce_with_logits(X, X, pos_weight=np.ones(4, np.float32)[:2]),
            ValueError,
            r"pos_weight of shape \(2,\) .*; counted from the last axis, each of its sizes must",
        ),
        (
            lambda: jaxbce.bce_with_logits(X[..., None], X[..., None], weight=X[:, 0]),
            ValueError,
            r"weight of shape \(4,\) .*; one value per row is weight\[:, None, None\]",
        ),
        (
            lambda: jaxbce.bce_with_logits(X[:, 0], X[:, :1]),
            ValueError,
            r"labels \(4, 1\) and logits \(4,\); nothing is broadcast, so pass labels\[..., 0\]",
        ),
        (
            lambda: jaxbce.bce_with_logits(X, X.T),
            ValueError,
            r"got labels \(3, 4\) and .* pass labels.T",
        ),
        (
            lambda: jaxbce.asymmetric_loss(X, X, gamma_neg=np.ones(3, np.float32)),
            TypeError,
            r"gamma_neg must be one Python number, got an array of shape \(3,\); all labels share",
        ),
        (
            lambda: jaxbce.bce_with_logits(X, X, label_smoothing=None),
            TypeError,
            r"label_smoothing must be a number, got None; pass 0.0",
        ),
        (
            lambda: jaxbce.BCEWithLogitsLoss(label_smoothing=jnp.array(0.1)),
            TypeError,
            r"label_smoothing must be a Python number",
        ),
    ],
    ids=[
        "k on a device",
        "mesh of the head",
        "mesh of pairs",
        "unknown dtype",
        "complex dtype",
        "fewer texts",
        "transposed labels",
        "class ids to the head",
        "transposed kernel",
        "one weight for all rows",
        "weight of more axes",
        "pos_weight of another size",
        "weight per row of three axes",
        "(N, 1) against (N,)",
        "transposed labels of a loss",
        "gamma per label",
        "no smoothing",
        "smoothing on a device",
    ],
)
def test_the_message_says_what_helps(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("argument", ["log_scale", "bias"])
def test_siglip_loss_asks_for_one_number(argument):
    options = {"log_scale": 0.0, "bias": 0.0} | {argument: np.ones(4, np.float32)}
    with pytest.raises(ValueError, match=rf"siglip_loss: {argument} must be one number.*\(4,\)"):
        jaxbce.siglip_loss(FEATURES, FEATURES, **options)


ROWS_OF_IDS = {
    "sparse_bce_with_logits": lambda ids: jaxbce.sparse_bce_with_logits(X, ids),
    "linear_bce_with_logits": lambda ids: jaxbce.linear_bce_with_logits(
        FEATURES, KERNEL, positives=ids
    ),
    "siglip_loss": lambda ids: jaxbce.siglip_loss(FEATURES, FEATURES, 0.0, 0.0, positives=ids),
    "siglip_loss, ignored": lambda ids: jaxbce.siglip_loss(
        FEATURES, FEATURES, 0.0, 0.0, ignored=ids
    ),
    "prior_bias": lambda ids: jaxbce.prior_bias(positives=IDS, ignored=ids, num_labels=3),
}


@pytest.mark.parametrize("call", ROWS_OF_IDS.values(), ids=list(ROWS_OF_IDS))
@pytest.mark.parametrize(
    ("ids", "remedy"),
    [
        (IDS[:, 0], r"one id per row is (positives|ignored)\[..., None\]"),
        (IDS[:3], "each row of .* has a row of ids, padded with -1"),
        (IDS.T, "each row of .* has a row of ids, padded with -1"),
        (IDS[None], "each row of .* has a row of ids, padded with -1"),
    ],
    ids=["one id a row", "other rows", "transposed", "more axes"],
)
def test_rows_of_ids(call, ids, remedy):
    with pytest.raises(
        ValueError, match=r"(positives|ignored) \(\d.*\) and .* \(4, .\); " + remedy
    ):
        call(ids)


@pytest.mark.parametrize(
    "call",
    [
        lambda: jaxbce.multi_hot(IDS, None),
        lambda: jaxbce.balanced_pos_weight(positives=IDS),
        lambda: jaxbce.prior_bias(positives=IDS),
    ],
    ids=["multi_hot", "balanced_pos_weight", "prior_bias"],
)
def test_positives_need_a_number_of_labels(call):
    with pytest.raises(ValueError, match=r"num_labels must be given .* pass .*logits.shape\[-1\]"):
        call()


# --- checked -----------------------------------------------------------------------------------


def scanned(scores, labels, loss=jaxbce.bce_with_logits):
    def body(carry, row):
        return carry, loss(*row)

    return jax.lax.scan(body, 0, (scores, labels))[1]


WRAPPED = {
    "eager": jaxbce.bce_with_logits,
    "jit": jax.jit(jaxbce.bce_with_logits),
    "grad": jax.grad(jaxbce.bce_with_logits),
    "jit of grad": jax.jit(jax.grad(jaxbce.bce_with_logits)),
    "vmap": jax.vmap(jaxbce.bce_with_logits),
    "scan": scanned,
    "scan of grad": functools.partial(scanned, loss=jax.grad(jaxbce.bce_with_logits)),
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


def test_checked_lets_a_loss_of_the_users_take_any_labels():
    def hinge(logits, labels):
        return jnp.maximum(0, 1 - logits * labels)

    def loss(labels):
        return jaxbce.linear_loss(hinge, FEATURES, KERNEL, labels=labels)

    labels = np.float32([[1, -1, 1]] * 4)
    assert jaxbce.checked(loss)(labels) == loss(labels)
    bce = functools.partial(jaxbce.bce_with_logits, reduction="none")
    with pytest.raises(ValueError, match=r"bce_with_logits: labels must be in \[0, 1\], got -1"):
        jaxbce.checked(jaxbce.linear_loss)(bce, FEATURES, KERNEL, labels=labels)


BAD_IDS = np.array([[2, -1], [0, 7], [1, -1], [-5, 0]])
KEPT = np.array([1, 0, 1, 0], np.float32)


@pytest.mark.parametrize(
    "call",
    [
        lambda keep: jaxbce.bce_with_logits(X, X + 2 * (1 - KEPT)[:, None], weight=keep[:, None]),
        lambda keep: jaxbce.bce_with_logits(
            X, X + 2 * (1 - KEPT)[:, None], where=keep[:, None] > 0
        ),
        lambda keep: jaxbce.bce(X + 2 * (1 - KEPT)[:, None], X, weight=keep[:, None]),
        lambda keep: jaxbce.sparse_bce_with_logits(X, BAD_IDS, weight=keep[:, None]),
        lambda keep: jaxbce.sparse_bce_with_logits(X, BAD_IDS, where=keep[:, None] > 0),
        lambda keep: jaxbce.linear_bce_with_logits(
            FEATURES, KERNEL, positives=BAD_IDS, weight=keep
        ),
        lambda keep: jaxbce.linear_bce_with_logits(
            FEATURES, KERNEL, labels=X + 2 * (1 - KEPT)[:, None], weight=keep
        ),
        lambda keep: jaxbce.balanced_pos_weight(
            positives=BAD_IDS, num_labels=3, where=keep[:, None] > 0
        ),
    ],
    ids=[
        "labels, weight",
        "labels, where",
        "probs, weight",
        "sparse, weight",
        "sparse, where",
        "head positives, weight",
        "head labels, weight",
        "counts, where",
    ],
)
def test_checked_ignores_what_is_masked_or_of_weight_zero(call):
    jaxbce.checked(call)(jnp.asarray(KEPT))
    with pytest.raises(ValueError, match=r"must be in .* got (2|7|-5)"):
        jaxbce.checked(call)(jnp.ones(4))


@pytest.mark.parametrize(
    "transform",
    [jax.jit, jax.grad, lambda fn: jax.vmap(fn), jax.checkpoint, nnx.jit, nnx.grad],
    ids=["jit", "grad", "vmap", "checkpoint", "nnx.jit", "nnx.grad"],
)
def test_checked_goes_outside(transform):
    inside = transform(lambda *args: jaxbce.checked(jaxbce.bce_with_logits)(*args))
    with pytest.raises(ValueError, match=r"checked: it goes outside .* checked\(jax.jit\(fn\)\)"):
        jax.jit(inside)(X, X)


class Noisy(nnx.Module):
    """With all that a module may change: parameters, statistics and a counter of random numbers."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.output = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, features):
        return self.output(self.dropout(self.norm(features)))


def dense_step(model, optimizer, features, labels):
    def loss(model):
        return jaxbce.bce_with_logits(model(features), labels)

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def step_of_head(encoder, optimizer, features, labels, *, head, of_head):
    value, gradients = head.update_with_encoder(of_head, encoder, features, labels=labels)
    optimizer.update(encoder, gradients)
    return value


def modules(step):
    """A model and its optimizer, a head and its own: of the step that takes them by name."""
    parts = Noisy(), jaxbce.nnx.MultiLabelHead(3, 3, rngs=nnx.Rngs(1))
    pairs = [(part, nnx.Optimizer(part, optax.sgd(0.1), wrt=nnx.Param)) for part in parts]
    named = dict(zip(("head", "of_head"), pairs[1], strict=True))
    return pairs[0], named if step is step_of_head else {}


def numbers_of(*held):
    """Every array of the modules but random keys, as it is now."""
    return jax.tree.map(np.array, nnx.state(held, nnx.Not(nnx.RngKey)))


@pytest.mark.parametrize("jit", [nnx.jit, lambda step: step], ids=["nnx.jit", "eager"])
@pytest.mark.parametrize("step", [dense_step, step_of_head])
def test_checked_steps_change_their_modules_as_without(step, jit):
    """A check that fails leaves them as they were."""
    features = jax.random.normal(jax.random.key(0), (4, 3))
    labels = jnp.eye(4, 3)
    (model, optimizer), named = modules(step)
    (twin, of_twin), of_named = modules(step)
    for _ in range(3):
        got = jaxbce.checked(jit(step))(model, optimizer, features, labels, **named)
        expected = jit(step)(twin, of_twin, features, labels, **of_named)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    changed = numbers_of(model, optimizer, named)
    expected = numbers_of(twin, of_twin, of_named)
    chex.assert_trees_all_close(changed, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\], got 2"):
        jaxbce.checked(jit(step))(model, optimizer, features, 2 * labels, **named)
    chex.assert_trees_all_equal(numbers_of(model, optimizer, named), changed)


class Counting(nnx.Module):
    """With what `nnx.jit` carries over and an array is not: an attribute, a mode, a tuple."""

    def __init__(self):
        self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.pair = nnx.data((jnp.zeros(2), jnp.ones(2)))
        self.calls = 0

    def __call__(self, features):
        self.calls += 1
        return self.dropout(self.layer(features))


def scaled(node, by):
    """Changes a module or a Variable, and returns a loss."""
    weight = node.layer.kernel if isinstance(node, Counting) else node
    weight[...] *= by
    return jaxbce.bce_with_logits(X @ weight[...], X, reduction="sum")


STEPS = {
    "module twice": (lambda m, by: (m, m, by), lambda a, b, by: (a is b, scaled(a, by))),
    "shared Variable": (
        lambda m, by: (m, m.layer.kernel, by),
        lambda m, kernel, by: (scaled(kernel, by), m.layer.kernel[...]),
    ),
    "in a dict": (lambda m, by: ({"a": (m, by)},), lambda d: scaled(*d["a"])),
    "attribute": (lambda m, by: (m, by), lambda m, by: m(X * by)),
    "mode": (lambda m, by: (m, by), lambda m, by: m.eval() or m(X * by)),
    "returned": (lambda m, by: (m, by), lambda m, by: (m, scaled(m, by))),
    "State": (lambda m, by: (nnx.state(m), by), lambda state, by: state["layer"]["bias"][...] * by),
    "NumPy": (
        lambda m, by: (nnx.update(m.layer, jax.tree.map(np.array, nnx.state(m.layer))) or m, by),
        scaled,
    ),
}


@pytest.mark.parametrize("jit", [nnx.jit, lambda step: step], ids=["nnx.jit", "eager"])
@pytest.mark.parametrize(("given", "step"), STEPS.values(), ids=STEPS)
def test_checked_gives_modules_as_they_are(given, step, jit):
    """As `nnx.jit` does, whatever they hold and wherever among the arguments they are."""
    model, twin = Counting(), Counting()
    got = jaxbce.checked(jit(step))(*given(model, 2.0))
    expected = jit(step)(*given(twin, 2.0))
    chex.assert_trees_all_close(numbers_of(model), numbers_of(twin), rtol=1e-6)
    chex.assert_trees_all_close(numbers_of(got), numbers_of(expected), rtol=1e-6)
    assert (model.calls, model.dropout.deterministic) == (twin.calls, twin.dropout.deterministic)


@pytest.mark.parametrize("loaded", [False, True], ids=["JAX", "NumPy"])
def test_a_step_under_checked_that_fails_or_donates_leaves_the_modules(loaded):
    model = Counting()
    if loaded:
        nnx.update(model.layer, jax.tree.map(np.array, nnx.state(model.layer)))
    before = numbers_of(model)

    def failing(model, labels):
        scaled(model, 2.0)
        return jaxbce.bce_with_logits(X, labels)

    donating = nnx.jit(failing, donate_argnums=0)
    for step in (failing, donating):
        with pytest.raises(ValueError, match="labels must be in"):
            jaxbce.checked(step)(model, X + 2)
        chex.assert_trees_all_equal(numbers_of(model), before)
    with pytest.raises(ValueError, match="labels must have the shape"):
        jaxbce.checked(failing)(model, X[0])
    chex.assert_trees_all_equal(numbers_of(model), before)


def test_checked_finds_a_multi_hot_array_in_place_of_ids():
    """Its zeros and ones are ids too, so nothing else tells."""
    labels = np.eye(4, 3, dtype=np.int32)
    right = jaxbce.positives_from_multi_hot(labels)
    jaxbce.checked(jaxbce.sparse_bce_with_logits)(X, right)
    with pytest.raises(ValueError, match="positives must be label ids, not a multi-hot array"):
        jaxbce.checked(jaxbce.sparse_bce_with_logits)(X, labels)


def test_checked_probabilities():
    with pytest.raises(ValueError, match=r"bce: probs must be in \[0, 1\], got 1.5"):
        jaxbce.checked(jaxbce.bce)(X + 1.5, X)


def test_checked_traced_label_smoothing():
    smoothed = functools.partial(jaxbce.bce_with_logits, X, X)
    with pytest.raises(ValueError, match=r"label_smoothing must be in .* got 1\.5"):
        jaxbce.checked(lambda a: smoothed(label_smoothing=a))(jnp.float32(1.5))


def of_head(q, **options):
    layer = jnp.ones((1, 2)), jnp.ones((2, 3))
    return jaxbce.linear_bce_with_logits(*layer, positives=IDS[:1], pos_weight=q, **options)


def of_step(q, **options):
    optimizer, params = optax.sgd(0.1), {"kernel": jnp.ones((2, 3))}
    state = optimizer.init(params)
    options = options | {"positives": IDS[:1], "pos_weight": q}
    return jaxbce.linear_update(optimizer, jnp.ones((1, 2)), params, state, **options).loss


def of_own_head(q, keep):
    layer = jnp.ones((1, 2)), jnp.ones((2, 3))
    loss = jaxbce.Loss(jaxbce.bce_with_logits, parameters=("pos_weight",))
    return jaxbce.linear_loss(loss, *layer, positives=IDS[:1], per_label=(q,), where=keep)


@pytest.mark.parametrize("bad", [-1.0, np.nan], ids=str)
@pytest.mark.parametrize(
    "call",
    [
        lambda q, keep: jaxbce.bce_with_logits(X, X, pos_weight=q, where=keep),
        lambda q, keep: jaxbce.bce_with_logits(X, X, pos_weight=q, weight=keep.astype(np.float32)),
        lambda q, keep: jax.grad(jaxbce.bce_with_logits)(X, X, pos_weight=q, where=keep),
        lambda q, keep: jaxbce.sigmoid_binary_cross_entropy(X, X, pos_weight=q, where=keep),
        lambda q, keep: jaxbce.sparse_bce_with_logits(X, IDS, pos_weight=q, where=keep),
        lambda q, keep: jaxbce.BCEWithLogitsLoss(pos_weight=np.array(q))(X, X, where=keep),
        lambda q, keep: of_head(q, where=keep),
        lambda q, keep: of_head(q, ignored=jnp.where(keep[2], -1, 2)[None, None]),
        lambda q, keep: of_head(q, where=keep, reduction="none"),
        of_own_head,
        lambda q, keep: of_step(q, where=keep),
    ],
    ids=[
        *("where", "weight", "gradient", "unreduced", "sparse", "object"),
        *("head", "head, ignored", "head, by row", "own loss, head", "step"),
    ],
)
def test_checked_refuses_a_negative_pos_weight(call, bad):
    """An infinite one is right where a label is 0."""
    for q in (np.float32([0, np.inf, 1]), np.float32([0, 1, bad])):
        jaxbce.checked(lambda q=q: call(q, np.array([True, True, False])))()
    argument = r"per_label\[0\]" if call is of_own_head else "pos_weight"
    with pytest.raises(ValueError, match=f"{argument} must be at least 0, got {bad}"):
        jaxbce.checked(lambda: call(np.float32([0, 1, bad]), np.ones(3, bool)))()


def test_checked_on_an_empty_array():
    assert jaxbce.checked(jaxbce.bce_with_logits)(X[:0], X[:0]) == 0


def test_checked_nests():
    with pytest.raises(ValueError, match="bce_with_logits: labels"):
        jaxbce.checked(jaxbce.checked(jaxbce.bce_with_logits))(X, X + 2)


def test_without_checked_nothing_is_traced():
    program = str(jax.make_jaxpr(jaxbce.bce_with_logits)(X, X))
    assert "check" not in program
