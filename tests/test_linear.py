"""The chunked head against a dense head in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from heads import (
    assert_close,
    draw_arguments,
    every_order,
    head,
    hessian_vector_product,
    value_and_gradients,
)

import jaxbce
from jaxbce._head import chunks

pytestmark = pytest.mark.usefixtures("compile_fast")

LABELS, WIDTH = 11, 3
CHUNKS = [1, 4, 50, None]  # 4 leaves a ragged last chunk
POSITIVES = np.array(  # duplicate, empty, out of range, first and last, far out of range
    [[2, 2, 2, 7], [-1, -1, -1, -1], [LABELS, 3, -LABELS, -7], [0, 10, -1, -1], [-(2**31), 5, 8, 9]]
)

every_chunk = pytest.mark.parametrize("chunk_size", CHUNKS, ids="chunk_size={}".format)
every_reduction = pytest.mark.parametrize(
    "reduction", ["mean", "weighted_mean", "sum", "batchmean", "none"]
)


def draw(rng, target="positives", dtype=np.float32):
    """Arguments by name."""
    drawn = draw_arguments(rng, len(POSITIVES), WIDTH, LABELS, dtype, target == "labels")
    return drawn if target == "labels" else drawn | {"positives": jnp.asarray(POSITIVES)}


def multi_hot(positives, num_labels=LABELS):
    return (positives[..., None] == np.arange(num_labels)).any(-2).astype(np.float64)


def dense(arguments, reduction="mean"):
    """The same with logits, in the dtype of the arguments."""
    given = dict(arguments)
    logits = given["features"] @ given["kernel"]
    if "bias" in given:
        logits = logits + given["bias"][None]
    labels = given.get("labels")
    if labels is None:
        labels = jnp.asarray(multi_hot(np.asarray(given["positives"])), logits.dtype)
    rows = jaxbce.bce_with_logits(
        logits,
        labels,
        pos_weight=given.get("pos_weight"),
        label_smoothing=given.get("label_smoothing", 0.0),
        reduction="none",
    ).sum(-1)
    rows = rows * given.get("weight", jnp.ones_like(rows))
    divisor = {"mean": logits.size, "batchmean": len(logits)}.get(reduction, 1)
    if reduction == "weighted_mean":
        divisor = logits.shape[1] * given.get("weight", jnp.ones_like(rows)).sum()
    return rows if reduction == "none" else rows.sum() / divisor


def in_float64(loss, arguments, *args):
    with jax.enable_x64(True):
        wide = {
            n: jnp.asarray(np.asarray(v), np.float64)
            if jnp.issubdtype(v.dtype, jnp.floating)
            else v
            for n, v in arguments.items()
        }
        return jax.tree.map(np.asarray, value_and_gradients(loss, wide, *args))


# --- value and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 4, 50], ids="chunk_size={}".format)
@pytest.mark.parametrize(("reduction", "target"), [("mean", "positives"), ("none", "labels")])
def test_value_and_gradients_match_the_dense_head(chunk_size, reduction, target, rng):
    """Of every argument, with a cotangent that is not 1 and, for "none", differs between rows."""
    arguments = draw(rng, target)
    cotangent = rng.normal(size=len(POSITIVES)) if reduction == "none" else np.float64(-1.7)
    options = {"reduction": reduction, "chunk_size": chunk_size}
    got = value_and_gradients(functools.partial(head, **options), arguments, cotangent)
    loss = functools.partial(dense, reduction=reduction)
    assert_close(got, in_float64(loss, arguments, cotangent))


@every_chunk
def test_plain_positives_match_the_oracle(chunk_size, rng):
    """Without any option: the path that flips signs."""
    arguments = {k: draw(rng)[k] for k in ("features", "kernel", "positives")}
    logits = np.float64(arguments["features"]) @ np.float64(arguments["kernel"])
    value, slope = oracle.bce_with_logits(logits, multi_hot(POSITIVES))
    loss, gradients = value_and_gradients(
        functools.partial(head, reduction="sum", chunk_size=chunk_size), arguments
    )
    np.testing.assert_allclose(loss, value.sum(), rtol=1e-6)
    assert_close(gradients["kernel"], np.float64(arguments["features"]).T @ slope)
    assert_close(gradients["features"], slope @ np.float64(arguments["kernel"]).T)


@pytest.mark.parametrize("target", ["positives", "labels"])
@pytest.mark.parametrize("option", ["bias", "weight", "pos_weight", "label_smoothing"])
def test_each_option_alone(option, target, rng):
    given = draw(rng, target)
    arguments = {name: given[name] for name in ("features", "kernel", target, option)}
    got = value_and_gradients(functools.partial(head, chunk_size=4), arguments)
    assert_close(got, in_float64(dense, arguments))


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 3e-3)], ids=["float32", "bfloat16"]
)
def test_kernel_gradient_of_a_fitted_head(dtype, bound, rng):
    """Logits of scale 32 with the right sign: what is left is in the tails."""
    rows, num_labels = 64, 300
    positives = rng.integers(0, num_labels, (rows, 3))
    sign = 2 * multi_hot(positives, num_labels) - 1
    features = np.linalg.qr(rng.normal(size=(rows, rows)))[0]
    kernel = features.T @ (sign * 32 * np.abs(rng.normal(1, 0.3, sign.shape)))
    features, kernel = (jnp.asarray(x).astype(dtype) for x in (features, kernel))
    gradient = jax.grad(
        lambda kernel: jaxbce.linear_bce_with_logits(
            features, kernel, positives=positives, reduction="sum", chunk_size=128
        )
    )(kernel)
    wide = np.asarray(features, np.float64), np.asarray(kernel, np.float64)
    logits = wide[0] @ wide[1]
    assert np.sqrt((logits**2).mean()) == pytest.approx(32, rel=0.1)
    _, slope = oracle.bce_with_logits(logits, multi_hot(positives, num_labels))
    assert gradient.dtype == dtype
    assert_close(gradient, wide[0].T @ slope, bound)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_have_the_dtype_of_their_argument(dtype, rng):
    arguments = draw(rng, "labels", dtype)
    loss, gradients = value_and_gradients(functools.partial(head, chunk_size=4), arguments)
    assert loss.dtype == np.float32
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert gradient.shape == arguments[name].shape
    assert_close(gradients, in_float64(dense, arguments)[1], 1e-2)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_positives_of_any_integer_dtype(dtype, rng):
    arguments = draw(rng)
    ids = np.where(POSITIVES < 0, 100, POSITIVES)
    expected = head(arguments)
    assert head(arguments | {"positives": ids.astype(dtype)}) == expected


@pytest.mark.parametrize("dtype", ["bool", "int8"])
def test_dense_labels_of_any_real_dtype(dtype, rng):
    arguments = draw(rng)
    expected = value_and_gradients(head, arguments)
    del arguments["positives"]
    labels = jnp.asarray(multi_hot(POSITIVES)).astype(dtype)
    assert_close(value_and_gradients(head, arguments | {"labels": labels}), expected)


def test_a_row_of_weight_zero_hides_what_is_not_finite(rng):
    arguments = draw(rng)
    expected_weight = arguments["weight"].at[1].set(0)
    clean = arguments | {"weight": expected_weight}
    dirty = clean | {"features": arguments["features"].at[1].set(jnp.nan)}
    expected, got = (value_and_gradients(head, given) for given in (clean, dirty))
    assert got[0] == expected[0]
    np.testing.assert_array_equal(got[1]["kernel"], expected[1]["kernel"])
    assert not np.any(got[1]["features"][1])
    assert got[1]["weight"][1] == 0


def test_a_row_of_weight_zero_hides_a_product_that_overflows():
    """Of a finite logit and a finite pos_weight, which is the slope by the label."""
    arguments = {
        "features": jnp.array([[1.0], [0.0]]),
        "kernel": jnp.full((1, 2), -1e20),
        "labels": jnp.ones((2, 2)),
        "pos_weight": jnp.full(2, 1e20),
        "weight": jnp.array([0.0, 1.0]),
        "label_smoothing": jnp.float32(0.1),
    }
    clean = arguments | {"features": jnp.zeros((2, 1))}
    (value, expected), (got_value, got) = (
        value_and_gradients(head, given) for given in (clean, arguments)
    )
    assert got_value == value
    assert got.pop("weight")[0] == 0
    for name, gradient in got.items():
        np.testing.assert_array_equal(gradient, expected[name], name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_of_weight_zero_hides_an_infinite_loss(reduction, rng):
    """Of finite features: logits that overflow, of label 1 to ∞ - ∞."""
    names = ("features", "kernel", "bias", "weight", "positives")
    arguments = {name: draw(rng)[name] for name in names}
    arguments["kernel"] = arguments["kernel"].at[:, 1].set(2)
    arguments["bias"] = arguments["bias"].at[1].set(-jnp.inf)  # a positive of no row
    clean = arguments | {"weight": arguments["weight"].at[1].set(0)}
    dirty = clean | {"features": arguments["features"].at[1].set(3e38)}
    loss = functools.partial(head, reduction=reduction)
    expected, got = (value_and_gradients(loss, given) for given in (clean, dirty))
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1]["kernel"], expected[1]["kernel"])
    assert not np.any(got[1]["features"][1])
    assert got[1]["weight"][1] == 0


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_weight_of_zero_has_a_gradient(reduction, rng):
    """The loss of its row."""
    arguments = draw(rng)
    zeros = jnp.zeros_like(arguments["weight"])
    _, gradients = value_and_gradients(
        functools.partial(head, reduction=reduction), arguments | {"weight": zeros}
    )
    rows = head({k: v for k, v in arguments.items() if k != "weight"}, reduction="none")
    np.testing.assert_allclose(gradients["weight"], rows, rtol=1e-6)


def test_a_small_weight_does_not_vanish_in_float16(rng):
    """1e-8 is 0 in float16; the gradient of the kernel, of large features, is not."""
    arguments = {k: draw(rng, dtype=np.float16)[k] for k in ("features", "kernel", "positives")}
    arguments |= {"features": arguments["features"] * 1000, "kernel": arguments["kernel"] / 1000}
    arguments["weight"] = jnp.full(len(POSITIVES), 1e-8)
    loss = functools.partial(head, reduction="sum", chunk_size=4)
    _, gradients = value_and_gradients(loss, arguments)
    wide = {k: v.astype(np.float32) for k, v in arguments.items() if k != "positives"}
    _, expected = value_and_gradients(loss, wide | {"positives": arguments["positives"]})
    np.testing.assert_allclose(gradients["kernel"], expected["kernel"], atol=6e-8)
    assert np.any(gradients["kernel"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_scale_saves_the_gradients_of_float16(reduction, rng):
    """They are rounded after the cotangent is multiplied in: of so small a share, all are 0."""
    num_labels, share = 30_000, 1e-4
    weight = jnp.full(4, share)
    features = jnp.asarray(rng.normal(size=(4, 8)), np.float16)
    kernel = jnp.asarray(rng.normal(size=(8, num_labels)) / 8, np.float16)
    labels = jnp.zeros((4, num_labels), np.float16)

    def scaled(features, kernel, labels):
        rows = jaxbce.linear_bce_with_logits(
            features, kernel, labels=labels, weight=weight, reduction=reduction
        )
        rows = rows if reduction == "mean" else jnp.sum(rows) / (4 * num_labels)
        return rows * (2**16 / share)

    def dense(features, kernel, labels):
        logits = features.astype(np.float32) @ kernel.astype(np.float32)
        return jaxbce.bce_with_logits(logits, labels) * 2**16

    got, expected = (jax.grad(f, (0, 1, 2))(features, kernel, labels) for f in (scaled, dense))
    assert np.count_nonzero(got[1]) > 0.99 * got[1].size
    assert_close(got, expected, 1e-2)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["kernel", "labels"])
def test_a_gradient_wanted_alone_is_that_of_all(name, reduction, rng):
    arguments = draw(rng, "labels")

    def total(arguments):
        return jnp.sum(head(arguments, reduction=reduction, chunk_size=4))

    _, gradients = value_and_gradients(total, arguments)
    alone = jax.jit(jax.grad(lambda value: total(arguments | {name: value})))(arguments[name])
    assert_close(alone, gradients[name], 1e-6)


def test_infinite_logits(rng):
    """Right labels give loss 0 and gradient 0, wrong ones ∞ and a finite gradient."""
    features, kernel = jnp.ones((1, 1)), jnp.array([[jnp.inf, -jnp.inf]])
    for positives, loss, slope in (([[0]], 0, [0, 0]), ([[1]], np.inf, [1, -1])):
        head_of = functools.partial(
            jaxbce.linear_bce_with_logits, positives=np.array(positives), reduction="sum"
        )
        value, gradient = jax.value_and_grad(head_of, argnums=1)(features, kernel)
        assert value == loss
        np.testing.assert_array_equal(gradient, [slope])


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 5, 2), (2, 3, 0, 2), (2, 0, 5, 2), (2, 3, 5, 0)],
    ids=["rows", "labels", "width", "positives"],
)
def test_empty(shape):
    batch, width, num_labels, size = shape
    features, kernel = jnp.ones((batch, width)), jnp.ones((width, num_labels))
    positives = jnp.zeros((batch, size), jnp.int32)
    value, gradient = jax.value_and_grad(jaxbce.linear_bce_with_logits)(
        features, kernel, positives=positives
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    if not batch * num_labels:
        assert value == 0


@every_reduction
def test_divisors(reduction, rng):
    """Rows × labels for "mean", rows for "batchmean"; the weight is in neither."""
    arguments = draw(rng)
    np.testing.assert_allclose(
        head(arguments, reduction=reduction), dense(arguments, reduction), rtol=1e-6
    )


@pytest.mark.parametrize("target", ["positives", "labels"])
def test_an_infinite_pos_weight_of_a_label_without_positives_is_its_plain_loss(target, rng):
    arguments = {k: v for k, v in draw(rng).items() if k != "label_smoothing"}
    del arguments["weight"]
    if target == "labels":
        arguments["labels"] = jnp.asarray(multi_hot(POSITIVES), np.float32)
        del arguments["positives"]
    absent = np.flatnonzero(multi_hot(POSITIVES).sum(0) == 0)
    loss = functools.partial(head, chunk_size=4)
    expected = value_and_gradients(
        loss, arguments | {"pos_weight": arguments["pos_weight"].at[absent].set(1)}
    )
    got = value_and_gradients(
        loss, arguments | {"pos_weight": arguments["pos_weight"].at[absent].set(jnp.inf)}
    )
    for gradients in (got[1], expected[1]):
        gradients.pop("labels", None)  # infinite there
        assert not gradients["pos_weight"][absent].any()
    assert_close(got, expected)


# --- transformations -----------------------------------------------------------------------------


@every_reduction
def test_leading_axes_are_rows(reduction, rng):
    arguments = draw(rng)
    rows = {"features", "weight", "positives"}
    arguments = {k: jnp.stack([v, v]) if k in rows else v for k, v in arguments.items()}
    flat = {k: v.reshape(-1, *v.shape[2:]) if k in rows else v for k, v in arguments.items()}
    got = head(arguments, reduction=reduction, chunk_size=4)
    expected = head(flat, reduction=reduction, chunk_size=4)
    if reduction == "batchmean":  # divided by the first axis, which has 2 entries
        expected = expected * len(flat["features"]) / 2
    np.testing.assert_allclose(got.ravel(), expected.ravel(), rtol=1e-6)


@pytest.mark.parametrize(
    ("reduction", "kernel_axis"),
    [("mean", 0), ("none", None)],
    ids=["mean, kernels", "none, one kernel"],
)
def test_vmap(reduction, kernel_axis, rng):
    arguments = draw(rng)
    axes = dict.fromkeys(arguments) | {"features": 0, "positives": 0, "weight": 0}
    axes["kernel"] = kernel_axis
    stacked = {n: v if axes[n] is None else jnp.stack([v, 2 * v]) for n, v in arguments.items()}

    def gradients(arguments):
        loss = functools.partial(head, reduction=reduction, chunk_size=4)
        return value_and_gradients(loss, arguments, 0.5)

    got = jax.vmap(gradients, in_axes=(axes,))(stacked)
    for i in range(2):
        one = {n: v if axes[n] is None else v[i] for n, v in stacked.items()}
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), gradients(one))


@pytest.mark.parametrize(("transform", "reduction"), [("remat", "mean"), ("scan", "none")])
def test_remat_and_scan(transform, reduction, rng):
    arguments = draw(rng)

    def loss(arguments):
        return jnp.sum(head(arguments, reduction=reduction, chunk_size=4))

    def scanned(arguments):
        def step(total, _):
            return total + loss(arguments) / 2, None

        return jax.lax.scan(step, jnp.float32(0), None, length=2)[0]

    transformed = jax.checkpoint(loss) if transform == "remat" else scanned
    assert_close(value_and_gradients(transformed, arguments), value_and_gradients(loss, arguments))


@pytest.mark.thorough
@pytest.mark.parametrize(("reduction", "target"), [("mean", "positives"), ("none", "labels")])
@every_order
def test_hessian_vector_product(reduction, order, target, rng):
    """Of features, kernel, bias and pos_weight together, against the dense head."""
    arguments = draw(rng, target)
    names = ("features", "kernel", "bias", "pos_weight")
    point = {name: arguments[name] for name in names}
    along = {n: jnp.asarray(rng.normal(size=v.shape), v.dtype) for n, v in point.items()}

    def product(loss):
        def total(point):
            return jnp.sum(loss(arguments | point, reduction=reduction) ** 2)

        return hessian_vector_product(total, point, along, order)

    assert_close(product(functools.partial(head, chunk_size=4)), product(dense), 2e-5)


# --- cost, from the compiler ---------------------------------------------------------------------


def lowered(fn, batch=256, width=128, num_labels=131_072, **kwargs):
    shapes = ((batch, width), np.float32), ((width, num_labels), np.float32)
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    bias = jax.ShapeDtypeStruct((num_labels,), np.float32)
    return jax.jit(fn).lower(*arrays, bias, jax.ShapeDtypeStruct((batch, 8), np.int32))


def loss_of(features, kernel, bias, positives, **options):
    return jaxbce.linear_bce_with_logits(features, kernel, bias, positives=positives, **options)


OPTIONS = {"plain": {}, "smoothing": {"label_smoothing": 0.1}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_memory_is_six_chunks_for_any_number_of_labels(options):
    batch, chunk_size = 256, 4096

    def gradients(*arguments):
        loss = functools.partial(loss_of, chunk_size=chunk_size, **options)
        return jax.value_and_grad(lambda *a: jnp.sum(loss(*a)), argnums=(0, 1, 2))(*arguments)

    temporaries = []
    for num_labels in (131_072, 1_048_576):
        compiled = lowered(gradients, batch, num_labels=num_labels).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        assert f"[{batch},{num_labels}]" not in compiled.as_text()
    assert max(temporaries) <= 6 * batch * chunk_size * 4
    assert abs(temporaries[1] - temporaries[0]) <= 4 * 2**20


@pytest.mark.parametrize(
    ("argnums", "products"),
    [((), 1), ((0,), 2), ((1,), 2), ((2,), 1), ((0, 1, 2), 3)],
    ids=["value", "features", "kernel", "bias", "all"],
)
def test_a_chunk_takes_only_the_products_it_needs(argnums, products):
    fn = functools.partial(loss_of, chunk_size=4096)
    if argnums:
        fn = jax.value_and_grad(fn, argnums=argnums)
    text = lowered(fn).compile().as_text()
    # The program of the last chunk is outside the loop.
    assert len(re.findall(r" dot\(", text)) == 2 * products


def test_one_chunk_takes_no_loop(rng):
    arguments = draw(rng)
    for chunk_size, loops in ((LABELS - 1, True), (LABELS, False)):
        jaxpr = jax.make_jaxpr(functools.partial(head, chunk_size=chunk_size))(arguments)
        assert ("scan[" in str(jaxpr)) == loops


(ROWS,), (COLUMNS,) = map(jax.export.symbolic_shape, ("rows", "columns"))


@pytest.mark.parametrize(
    ("backend", "batch", "num_labels", "expected"),
    [
        ("cpu", 1, 10_000, 2048),
        ("cpu", 500, 10_000, 1024),
        ("cpu", 512, 10_000, 1024),
        ("cpu", 5000, 10_000, 512),
        ("cpu", 512, 2048, 2048),
        ("cpu", 512, 2049, 1024),
        ("cpu", 0, 10_000, 2048),
        ("gpu", 1, 10**6, 2**15),
        ("gpu", 1000, 10**6, 8320),
        ("tpu", 2**20, 10**6, 512),
        ("cpu", ROWS, 10_000, 512),
        ("cpu", ROWS, 100, 100),
        ("cpu", 1, COLUMNS, COLUMNS),
    ],
)
def test_default_chunk(backend, batch, num_labels, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert chunks.default_chunk_size(batch, num_labels) == expected


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(platform):
    gradients = jax.jit(jax.grad(functools.partial(loss_of, chunk_size=4)))
    arrays = [jnp.ones(shape) for shape in ((2, 3), (3, 10), (10,))]
    jax.export.export(gradients, platforms=[platform])(*arrays, jnp.zeros((2, 1), jnp.int32))


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positives": None}, ValueError, "exactly one of positives and labels .* got neither"),
        ({"labels": np.ones((5, LABELS))}, ValueError, "exactly one .* got positives and labels"),
        ({"kernel": np.ones((LABELS, WIDTH), np.float32)}, ValueError, "kernel.T"),
        ({"bias": np.ones(3, np.float32)}, ValueError, r"bias must have shape \(labels,\)"),
        ({"weight": np.ones((5, 1))}, ValueError, r"weight must have shape"),
        ({"pos_weight": np.ones(5)}, ValueError, "pos_weight must have shape"),
        ({"positives": np.ones((4, 2), int)}, ValueError, "positives must have shape"),
        ({"positives": np.ones((5, 2))}, TypeError, "positives must be integer"),
        ({"features": np.ones((5, WIDTH), int)}, TypeError, "features must be floating-point"),
        ({"features": [[1.0]]}, TypeError, "features must be an array"),
        ({"features": np.float32(1)}, ValueError, r"features must have shape \(..., width\)"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an int of at least 1, got 0"),
        ({"chunk_size": 1.5}, ValueError, "chunk_size must be an int"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of mean, weighted_mean, sum"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing must be in"),
    ],
    ids=[
        "neither",
        "both",
        "transposed kernel",
        "shape of bias",
        "shape of weight",
        "shape of pos_weight",
        "rows of positives",
        "float positives",
        "integer features",
        "list",
        "one feature",
        "chunk_size 0",
        "float chunk_size",
        "reduction",
        "label_smoothing",
    ],
)
def test_errors_name_the_argument(change, error, message, rng):
    with pytest.raises(error, match=f"linear_bce_with_logits: .*{message}"):
        head(draw(rng) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positives": np.full((5, 1), LABELS)}, "positives must be .* got 11"),
        ({"positives": None, "labels": np.full((5, LABELS), 1.5)}, "labels must be .* got 1.5"),
        ({"label_smoothing": np.float32(-1)}, "label_smoothing must be .* got -1"),
    ],
    ids=["positives", "labels", "label_smoothing"],
)
@pytest.mark.parametrize("differentiated", [False, True], ids=["value", "gradient"])
def test_checked(change, message, differentiated, rng):
    arguments = draw(rng) | {"positives": np.maximum(POSITIVES % LABELS, -1)} | change
    features = arguments.pop("features")

    def loss(features):
        return head({"features": features} | arguments, chunk_size=4)

    with pytest.raises(ValueError, match=f"linear_bce_with_logits: {message}"):
        jaxbce.checked(jax.grad(loss) if differentiated else loss)(features)


@pytest.mark.parametrize("bad", [np.nan, 2.0], ids=str)
def test_checked_ignores_the_labels_of_a_row_of_weight_zero(bad, rng):
    arguments = draw(rng, "labels")
    arguments["labels"] = arguments["labels"].at[1].set(bad)
    with pytest.raises(ValueError, match=f"labels must be .* got {bad}"):
        jaxbce.checked(head)(arguments)
    jaxbce.checked(head)(arguments | {"weight": arguments["weight"].at[1].set(0)})


# --- top k ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, LABELS], ids="k={}".format)
@every_chunk
def test_top_k_is_that_of_the_dense_logits(k, chunk_size, rng):
    """Ties included: small integers repeat within and across chunks; -inf is a logit too."""
    features = rng.integers(-2, 3, (2, 3, WIDTH)).astype(np.float32)
    kernel = rng.integers(-1, 2, (WIDTH, LABELS)).astype(np.float32)
    bias = jnp.zeros(LABELS).at[jnp.array([1, 6])].set(-jnp.inf)
    expected = jax.lax.top_k(features @ kernel + bias[None, None], k)
    got = jaxbce.linear_top_k(features, kernel, bias, k=k, chunk_size=chunk_size)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize("chunk_size", [None, 2, 5], ids="chunk={}".format)
def test_zeros_of_both_signs_are_equal_logits(chunk_size):
    """The lowest label is first, and each has its gradient."""
    features, kernel = -np.ones((2, 1), np.float32), np.zeros((1, LABELS), np.float32)
    kernel[0, ::2] = -0.0

    values, ids = jaxbce.linear_top_k(features, kernel, k=4, chunk_size=chunk_size)
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3]] * 2)
    assert not np.signbit(values).any()

    def top(bias):
        return jaxbce.linear_top_k(features, kernel, bias, k=4, chunk_size=chunk_size)[0]

    zero, one = jnp.zeros(LABELS), jnp.ones(LABELS)
    expected = [2, 2, 2, 2, 0]
    np.testing.assert_array_equal(jax.grad(lambda bias: top(bias).sum())(zero)[:5], expected)
    np.testing.assert_array_equal(jax.jvp(top, (zero,), (one,))[1], np.ones((2, 4)))
    curvature = jax.hessian(lambda bias: (top(bias) ** 2).sum() / 2)(zero)
    np.testing.assert_array_equal(np.diag(curvature)[:5], expected)


def test_a_nan_logit_comes_first_and_has_a_gradient():
    features, kernel = np.ones((1, 1), np.float32), np.arange(6, dtype=np.float32)[None]
    bias = jnp.zeros(6).at[2].set(jnp.nan)

    def top(bias):
        return jaxbce.linear_top_k(features, kernel, bias, k=2, chunk_size=3)

    assert top(bias)[1].tolist() == [[2, 5]]
    np.testing.assert_array_equal(jax.jacrev(lambda b: top(b)[0][0, 1])(bias), [0, 0, 0, 0, 0, 1])


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_top_k_holds_no_logits(gradient):
    def top(features, kernel, bias, positives):
        return jaxbce.linear_top_k(features, kernel, bias, k=10, chunk_size=4096)

    def slopes(*arrays):
        return jax.grad(lambda features: top(features, *arrays[1:])[0].sum())(arrays[0])

    compiled = lowered(slopes if gradient else top).compile()
    assert max(map(int, re.findall(r"\[256,(\d+)\]", compiled.as_text()))) == 4096
    # The backward pass keeps the chunks of the kernel. All logits would be twice as large.
    kept = 128 * 131_072 * 4 if gradient else 0
    assert compiled.memory_analysis().temp_size_in_bytes <= kept + 6 * 256 * 4096 * 4


@pytest.mark.parametrize("k", [0, LABELS + 1, 2.0, True], ids="k={}".format)
def test_top_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"linear_top_k: k must be an int .* at most {LABELS}"):
        jaxbce.linear_top_k(jnp.ones(3), jnp.ones((3, LABELS)), k=k)


def test_top_k_of_what_is_no_kernel():
    with pytest.raises(ValueError, match="linear_top_k: kernel must have shape"):
        jaxbce.linear_top_k(jnp.ones(3), jnp.ones(3), k=5)


# --- pairs of embeddings -------------------------------------------------------------------------


@every_chunk
def test_siglip_loss_is_that_of_all_pairs(chunk_size, rng):
    images, texts = (jnp.asarray(rng.normal(size=(7, 4)), jnp.float32) for _ in range(2))
    arguments = images, texts, jnp.float32(0.7), jnp.float32(-2.0)

    def pairs(images, texts, log_scale, bias):
        logits = jnp.exp(log_scale) * images @ texts.T + bias
        return jaxbce.bce_with_logits(logits, jnp.eye(7), reduction="batchmean")

    def loss(*arguments):
        return jaxbce.siglip_loss(*arguments, chunk_size=chunk_size)

    expected = jax.value_and_grad(pairs, argnums=range(4))(*arguments)
    assert_close(jax.value_and_grad(loss, argnums=range(4))(*arguments), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_siglip_loss_takes_scale_and_bias_as_peers_keep_them(shape, rng):
    images, texts = (jnp.asarray(rng.normal(size=(7, 4)), jnp.float32) for _ in range(2))
    expected = jax.grad(jaxbce.siglip_loss, argnums=(2, 3))(images, texts, 0.7, -2.0)
    scale, bias = jnp.full(shape, 0.7), jnp.full(shape, -2.0)
    got = jax.grad(jaxbce.siglip_loss, argnums=(2, 3))(images, texts, scale, bias)
    for slope, number in zip(got, expected, strict=True):
        assert slope.shape == shape
        np.testing.assert_allclose(slope.ravel()[0], number, rtol=1e-6)


@every_chunk
def test_siglip_loss_with_several_texts_an_image(chunk_size, rng):
    images, texts = (jnp.asarray(rng.normal(size=(7, 4)), jnp.float32) for _ in range(2))
    positives = np.array([[0, 3], [1, -1], [2, 2], [-1, -1], [4, 0], [6, 5], [1, 7]])

    def pairs(images, texts):
        logits = np.exp(np.float32(0.7)) * images @ texts.T - 2
        labels = jaxbce.multi_hot(positives, 7)
        return jaxbce.bce_with_logits(logits, labels, reduction="batchmean")

    def loss(images, texts):
        return jaxbce.siglip_loss(
            images, texts, 0.7, -2.0, positives=positives, chunk_size=chunk_size
        )

    expected = jax.value_and_grad(pairs, argnums=(0, 1))(images, texts)
    assert_close(jax.value_and_grad(loss, argnums=(0, 1))(images, texts), expected)


def test_siglip_loss_starts_well_with_the_bias_of_the_docstring(rng):
    """At scale 0 the loss is the entropy of a match, which no other bias betters."""
    batch = 32
    embeddings = jnp.asarray(rng.normal(size=(batch, 4)), jnp.float32)
    p = 1 / batch
    bias = np.float32(np.log(p / (1 - p)))
    by_bias = jax.grad(jaxbce.siglip_loss, argnums=3)(embeddings, embeddings, -50.0, bias)
    np.testing.assert_allclose(by_bias, 0, atol=1e-6)


def test_siglip_loss_of_nothing():
    nothing = jnp.ones((0, 4))
    value, gradient = jax.value_and_grad(jaxbce.siglip_loss)(nothing, nothing, 0.0, 0.0)
    assert value == 0
    assert gradient.shape == nothing.shape


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        ((4, 2), (3, 2), "text_embeddings must have at least as many rows"),
        (
            (3, 2, 1),
            (3, 2, 1),
            r"image_embeddings must have shape \(batch, width\), got \(3, 2, 1\)",
        ),
    ],
    ids=["fewer texts than images", "three axes"],
)
def test_siglip_loss_errors(images, texts, message):
    with pytest.raises(ValueError, match=f"siglip_loss: {message}"):
        jaxbce.siglip_loss(jnp.ones(images), jnp.ones(texts), 0.0, 0.0)
