"""What every elementwise loss promises, one test per promise over all of `losses.LOSSES`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from losses import (
    LOSSES,
    dense_losses,
    every_kernel,
    every_loss,
    logit_losses,
    pos_weight_losses,
    reduced,
)
from programs import collectives

import jaxbce
from jaxbce import _reduce

FLOATS = ["float16", "bfloat16", "float32"]
REDUCTIONS = ["mean", "weighted_mean", "sum", "batchmean"]
ROW_MASK = np.array([[True], [False], [True], [True]])


def masks(rng):
    return {
        "full": rng.random((4, 5)) < 0.7,
        "rows": ROW_MASK,
        "labels": np.array([True, False, True, True, False]),
        "nothing kept": np.zeros((4, 5), bool),
        "scalar": np.array(True),
    }


MASKS = list(masks(np.random.default_rng(0)))
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


# --- value and derivatives ---------------------------------------------------------------------


@every_loss
def test_value_and_gradient_match_the_oracle(loss, rng):
    scores, labels = loss.draw(rng, (4, 5))
    value, derivative = loss.oracle(scores.astype(np.float64), labels.astype(np.float64))
    np.testing.assert_allclose(loss.unreduced(scores, labels), value, rtol=2e-6, atol=1e-30)
    gradient = jax.grad(loss.total)(scores, labels)
    np.testing.assert_allclose(gradient, derivative, rtol=2e-6, atol=1e-30)


@every_kernel
def test_soft_labels(loss, rng):
    scores, _ = loss.draw(rng, (50,))
    labels = rng.random(50).astype(np.float32)
    value, derivative = loss.oracle(scores.astype(np.float64), labels.astype(np.float64))
    np.testing.assert_allclose(loss.unreduced(scores, labels), value, rtol=2e-6)
    gradient = jax.grad(loss.total)(scores, labels)
    np.testing.assert_allclose(gradient, derivative, rtol=2e-6, atol=2e-6)


@every_loss
@pytest.mark.parametrize("labels_dtype", ["bool", "int8", "uint32", "bfloat16", "float32"])
def test_labels_of_any_real_dtype(loss, labels_dtype, rng):
    scores, labels = loss.draw(rng, (3, 4))
    expected = loss.unreduced(scores, labels)
    chex.assert_trees_all_equal(
        loss.unreduced(scores, jnp.asarray(labels).astype(labels_dtype)), expected
    )


@every_kernel
@pytest.mark.parametrize("argument", ["labels", "weight"])
def test_gradient_of_labels_and_weight(loss, argument, rng):
    """Linear in weight; the step in the label is exact enough where the loss is a square in it."""
    scores, labels = loss.draw(rng, (4, 5))
    labels, weight = labels * 0.5 + 0.25, rng.random((4, 1)).astype(np.float32)
    weight[0] = 0

    def total(labels, weight):
        return loss.total(scores, labels, weight=weight)

    by_labels, by_weight = jax.grad(total, argnums=(0, 1))(labels, weight)
    if argument == "labels":
        step = 1e-5
        above, below = (
            loss.oracle(np.float64(scores), np.float64(labels) + side)[0] for side in (step, -step)
        )
        expected = (above - below) / (2 * step) * weight
        np.testing.assert_allclose(by_labels, expected, rtol=2e-5, atol=1e-6)
    else:
        value = loss.oracle(np.float64(scores), np.float64(labels))[0]
        np.testing.assert_allclose(by_weight, value.sum(1, keepdims=True), rtol=2e-6)


@every_kernel
def test_hessian(loss, rng):
    scores, labels = loss.draw(rng, (3,))
    labels[:2] = 0, 1
    hessian = jax.hessian(loss.total)(scores, labels)
    step = 1e-6
    above, below = (loss.oracle(np.float64(scores) + side, labels)[1] for side in (step, -step))
    np.testing.assert_allclose(hessian, np.diag((above - below) / (2 * step)), rtol=1e-5, atol=1e-7)
    reverse_over_reverse = jax.jacrev(jax.grad(loss.total))(scores, labels)
    np.testing.assert_allclose(reverse_over_reverse, hessian, rtol=1e-6)
    _, along_ones = jax.jvp(lambda s: jax.grad(loss.total)(s, labels), (scores,), (scores * 0 + 1,))
    np.testing.assert_allclose(along_ones, hessian.sum(1), rtol=1e-6)


@every_kernel
def test_second_derivative_by_label_and_score(loss, rng):
    scores, labels = loss.draw(rng, (5,))
    labels = labels * 0.5 + 0.25
    mixed = jax.jacrev(jax.grad(loss.total, argnums=1), argnums=0)(scores, labels)
    swapped = jax.jacrev(jax.grad(loss.total, argnums=0), argnums=1)(scores, labels)
    np.testing.assert_allclose(swapped, mixed, rtol=2e-5, atol=1e-6)
    assert np.isfinite(jax.hessian(loss.total, argnums=1)(scores, labels)).all()
    step = 1e-5
    above, below = (
        loss.oracle(np.float64(scores), np.float64(labels) + side)[1] for side in (step, -step)
    )
    np.testing.assert_allclose(mixed, np.diag((above - below) / (2 * step)), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("forward_mode", [False, True], ids=["reverse_mode", "forward_mode"])
@pytest.mark.parametrize("q", [None, 2.5], ids="pos_weight={}".format)
def test_second_derivatives_across_arguments(q, forward_mode):
    def loss(x, y, q):
        return jaxbce.bce_with_logits(x, y, pos_weight=q, forward_mode=forward_mode)

    x, y, q_ = 0.7, 0.3, q or 1.0
    s, t, softplus = oracle.sigmoid(x), oracle.sigmoid(-x), oracle.softplus(-x)
    expected = [
        [(1 - y + q_ * y) * s * t, -s - q_ * t, -y * t],
        [-s - q_ * t, 0, softplus],
        [-y * t, softplus, 0],
    ]
    moving = 2 if q is None else 3
    hessian = jax.hessian(loss, argnums=tuple(range(moving)))(x, y, q)
    expected = [row[:moving] for row in expected[:moving]]
    np.testing.assert_allclose(hessian, expected, rtol=1e-6)


@logit_losses
def test_hessian_of_the_squared_loss_at_logit_zero(loss):
    """2 (l'² + l l''): wrong at 0 where JAX differentiates through abs and max."""
    label = np.float32(0)

    def at(x):
        return loss.unreduced(x, label)

    zero = np.float32(0)
    first, second = jax.grad(at)(zero), jax.grad(jax.grad(at))(zero)
    squared = jax.hessian(lambda x: at(x) ** 2)(zero)
    np.testing.assert_allclose(squared, 2 * (first**2 + at(zero) * second), rtol=1e-6)
    step = 1e-4
    slopes = [loss.oracle(np.float64(side), 0.0)[1] for side in (-step, step)]
    np.testing.assert_allclose(first, loss.oracle(np.float64(0), 0.0)[1], rtol=1e-6)
    np.testing.assert_allclose(second, (slopes[1] - slopes[0]) / (2 * step), rtol=1e-6)


@every_kernel
def test_third_derivative(loss, rng):
    scores, labels = loss.draw(rng, (8,))
    third = jax.vmap(jax.grad(jax.grad(jax.grad(loss.unreduced))))(scores, labels)
    step = 1e-4
    slope = [loss.oracle(np.float64(scores) + k * step, labels)[1] for k in (-1, 0, 1)]
    expected = (slope[0] - 2 * slope[1] + slope[2]) / step**2
    np.testing.assert_allclose(third, expected, rtol=1e-3, atol=1e-5)


@every_loss
def test_forward_mode_only_where_promised(loss, rng):
    scores, labels = loss.draw(rng, (5,))
    if not loss.forward:
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(lambda s: loss.total(s, labels), (scores,), (scores,))
        return
    gradient = jax.grad(loss.total)(scores, labels)
    chex.assert_trees_all_close(jax.jacfwd(loss.total)(scores, labels), gradient, rtol=1e-6)
    _, tangent = jax.jvp(lambda s: loss.total(s, labels), (scores,), (scores,))
    np.testing.assert_allclose(tangent, np.vdot(gradient, scores), rtol=1e-5)
    _, linear = jax.linearize(lambda s: loss.total(s, labels), scores)
    np.testing.assert_allclose(linear(scores), tangent, rtol=1e-6)


@logit_losses
@pytest.mark.parametrize("label", [0.0, 1.0], ids="label={}".format)
def test_the_tails_keep_their_digits(loss, label):
    """Relative to what is left there: sigmoid(x) - y would lose half of it at logit 17."""
    x = np.array([-80, -30, -17, 17, 30, 80], np.float32)
    y = np.full_like(x, label)
    value, slope = loss.oracle(np.float64(x), np.float64(y))
    np.testing.assert_allclose(loss.unreduced(x, y), value, rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(jax.grad(loss.total)(x, y), slope, rtol=1e-5, atol=1e-37)


# --- weight, where, reduction ------------------------------------------------------------------


# Every loss reduces by the same code: each by a mask and a weight, one by every kind of mask.
DIVISORS = [(loss, "full", True) for loss in LOSSES[1:]]
DIVISORS += [(LOSSES[0], mask, weighted) for mask in MASKS for weighted in (False, True)]


@every_reduction
@pytest.mark.parametrize(
    ("loss", "mask", "weighted"),
    DIVISORS,
    ids=[
        f"{loss.name}-{mask}-{'weight' if weighted else 'no weight'}"
        for loss, mask, weighted in DIVISORS
    ],
)
def test_divisors(loss, mask, weighted, reduction, rng):
    scores, labels = loss.draw(rng, (4, 5))
    where = masks(rng)[mask]
    weight = rng.random((4, 5)).astype(np.float32) if weighted else None
    value = loss.oracle(scores.astype(np.float64), labels)[0] * (1 if weight is None else weight)
    kept = np.broadcast_to(where, value.shape)
    divisors = {"sum": 1, "mean": kept.sum(), "batchmean": kept.any(-1).sum()}
    divisors["weighted_mean"] = divisors["mean"] if weight is None else weight[kept].sum()
    got = loss.call(scores, labels, where=where, weight=weight, reduction=reduction)
    np.testing.assert_allclose(got, value[kept].sum() / (divisors[reduction] or 1), rtol=2e-6)


AXES = [(loss, (0, 2), "mean") for loss in LOSSES[1:]]
AXES += [
    (LOSSES[0], axis, reduction)
    for axis in (0, -1, (0, 2), (-2,), ())
    for reduction in ("mean", "weighted_mean", "sum")
]


@pytest.mark.parametrize(
    ("loss", "axis", "reduction"), AXES, ids=[f"{row[0].name}-{row[1]}-{row[2]}" for row in AXES]
)
def test_axis(loss, axis, reduction, rng):
    """What is reduced is as the whole of it alone; the other axes stay."""
    scores, labels = loss.draw(rng, (2, 3, 4))
    where, weight = rng.random((2, 1, 4)) < 0.7, rng.random((3, 1)).astype(np.float32)
    got = loss.call(scores, labels, where=where, weight=weight, axis=axis, reduction=reduction)
    axes = {each % 3 for each in (axis if isinstance(axis, tuple) else (axis,))}
    whole = np.broadcast_to(where, scores.shape), np.broadcast_to(weight, scores.shape)
    value = loss.oracle(np.float64(scores), np.float64(labels))[0]
    kept, weight = whole[0], np.float64(whole[1])
    total, counted = np.where(kept, weight * value, 0), np.float64(kept)
    if reduction == "weighted_mean":
        counted = kept * weight
    divisor = 1 if reduction == "sum" else counted.sum(tuple(axes))
    expected = total.sum(tuple(axes)) / np.where(divisor == 0, 1, divisor)
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@every_loss
def test_batchmean_of_images_divides_by_the_images(loss, rng):
    scores, labels = loss.draw(rng, (3, 2, 4, 5))
    where = np.ones(scores.shape, bool)
    where[1] = False
    for mask, images in ((None, 3), (where, 2), (where[:, :1, :1, :1], 2), (where[0], 3)):
        total = loss.total(scores, labels, where=mask)
        got = loss.call(scores, labels, where=mask, reduction="batchmean")
        np.testing.assert_allclose(got, total / images, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES[:1], ids=lambda loss: loss.name)
@pytest.mark.parametrize("axis", [None, 0], ids="axis={}".format)
@pytest.mark.parametrize("shape", [(4, 1), (5,), (4, 5)], ids=str)
def test_weighted_mean_has_the_gradient_of_its_divisor(loss, shape, axis, rng):
    scores, labels = loss.draw(rng, (4, 5))
    where = rng.random((4, 5)) < 0.7
    weight = rng.uniform(0.5, 2, shape).astype(np.float32)

    def ours(scores, weight):
        options = {"weight": weight, "where": where, "axis": axis, "reduction": "weighted_mean"}
        return jnp.sum(loss.call(scores, labels, **options) ** 2)

    def by_hand(scores, weight):
        unreduced = loss.unreduced(scores, labels, weight=weight, where=where)
        return jnp.sum(reduced(unreduced, weight, where, axis, "weighted_mean") ** 2)

    got, expected = (jax.grad(fn, argnums=(0, 1))(scores, weight) for fn in (ours, by_hand))
    chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30], ids=str)
def test_weighted_mean_of_weights_of_any_size(scale):
    """The square of their sum, which its gradient has, would leave float32."""
    x, y, weight = np.float32([1, 2]), np.float32([0, 0]), np.float32([1, 3])

    def mean(weight):
        return jaxbce.bce_with_logits(x, y, weight=weight, reduction="weighted_mean")

    value, slope = jax.value_and_grad(mean)(weight * np.float32(scale))
    expected = jax.value_and_grad(mean)(weight)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(slope, expected[1] / np.float32(scale), rtol=1e-4)


@pytest.mark.parametrize("weight", [[0.0, 0.0], [1.0, -1.0]], ids=str)
def test_weighted_mean_of_no_weight_is_zero(weight):
    def call(x):
        y, w = np.float32([1, 0]), np.float32(weight)
        return jaxbce.bce_with_logits(x, y, weight=w, reduction="weighted_mean")

    value, gradient = jax.value_and_grad(call)(np.float32([1, 2]))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "batchmean"])
def test_nothing_kept_gives_zero_and_no_gradient(loss, reduction, rng):
    scores, labels = loss.draw(rng, (4, 5))
    where = np.zeros((4, 5), bool)

    def call(scores, weight):
        return loss.call(scores, labels, weight=weight, where=where, reduction=reduction)

    weight = np.ones((4, 1), np.float32)
    value, gradients = jax.value_and_grad(call, argnums=(0, 1))(scores, weight)
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_a_large_mask_is_counted_exactly():
    """float32 cannot tell 2^25 from 2^25 + 1."""
    size = 2**25 + 1
    with jax.enable_x64(True):
        where = jnp.ones(size, bool)
        assert _reduce.count_true(where, (0,), jnp.float64)[0] == size


@every_loss
def test_unreduced_sums_to_the_sum(loss, rng):
    scores, labels = loss.draw(rng, (4, 5))
    where = masks(rng)["full"]
    unreduced = loss.unreduced(scores, labels, where=where)
    assert not unreduced[~where].any()
    np.testing.assert_allclose(unreduced.sum(), loss.total(scores, labels, where=where), rtol=1e-6)


@every_loss
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_empty_arrays_give_zero(loss, shape):
    scores = np.zeros(shape, np.float32)
    value, gradient = jax.value_and_grad(loss.call)(scores, scores)
    assert value == 0
    assert gradient.shape == shape
    assert loss.call(scores, scores, reduction="batchmean") == 0
    assert loss.call(scores, scores, where=np.zeros(shape, bool)) == 0


@every_loss
def test_zero_dimensional(loss):
    score = np.float32(0.25)
    expected = loss.oracle(np.float64(score), 1.0)[0]
    for reduction in REDUCTIONS:
        got = loss.call(score, np.float32(1), reduction=reduction)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(loss.call(0.25, 1), expected, rtol=1e-6)


GARBAGE = [np.nan, np.inf, -np.inf, 7.0, 1e38, -1e38]


@every_kernel
@pytest.mark.parametrize("how", ["where", "weight", "where beside a weight"])
def test_garbage_behind_a_mask_or_a_zero_weight_leaves_no_trace(loss, how, rng):
    scores, labels = loss.draw(rng, (4, 5))
    where = masks(rng)["full"]
    option = {"weight": where.astype(np.float32)} if how == "weight" else {"where": where}
    if how == "where beside a weight":
        option["weight"] = np.full((4, 1), 2, np.float32)

    @jax.jit
    def value_and_gradients(scores, labels, option):
        def value(scores, labels, option):
            return loss.call(scores, labels, **option)

        return jax.value_and_grad(value, argnums=(0, 1, 2), allow_int=True)(scores, labels, option)

    value, gradients = value_and_gradients(scores, labels, option)
    for garbage in GARBAGE:
        dirty_scores = np.where(where, scores, garbage).astype(np.float32)
        dirty_labels = np.where(where, labels, 1.0 if np.isfinite(garbage) else garbage).astype(
            np.float32
        )
        for dirt in ((dirty_scores, dirty_labels), (dirty_scores, labels), (scores, dirty_labels)):
            dirty, (*got, by_option) = value_and_gradients(*dirt, option)
            chex.assert_trees_all_close((dirty, got), (value, list(gradients[:2])), rtol=1e-6)
            if how == "weight" and dirt[0] is dirty_scores and not np.isfinite(garbage):
                assert not by_option["weight"][~where].any()


DIRTY = [
    (loss, hidden, dirty)
    for loss in LOSSES
    for hidden in ("where", "weight")
    for dirty in ("scores", "labels", "weight", "pos_weight")
    if dirty != hidden
    and (loss.dense or dirty != "labels")
    and (loss.pos_weight or dirty != "pos_weight")
]


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize(
    ("loss", "hidden", "dirty"),
    DIRTY,
    ids=[f"{loss.name}-{dirty} behind {hidden}" for loss, hidden, dirty in DIRTY],
)
def test_what_is_masked_reaches_the_gradient_of_no_argument(loss, hidden, dirty, garbage, rng):
    """Not that of another argument either."""
    keep = np.array([[True, False, True]])
    scores, labels = loss.draw(rng, (4, 3))
    arguments = {"scores": scores, "labels": labels, "weight": np.ones((4, 3), np.float32)}
    if loss.pos_weight:
        arguments["pos_weight"] = np.full((4, 3), 2, np.float32)
    if loss.smoothing:
        arguments["label_smoothing"] = np.float32(0.1)
    options = {}
    if hidden == "where":
        options["where"] = keep
    else:
        arguments["weight"] = arguments["weight"] * keep

    def total(arguments):
        arguments = dict(arguments)
        return loss.total(arguments.pop("scores"), arguments.pop("labels"), **arguments, **options)

    clean = jax.jit(jax.grad(total))(arguments)
    arguments[dirty] = np.where(keep, arguments[dirty], np.float32(garbage))
    got = jax.jit(jax.grad(total))(arguments)
    for name, gradient in got.items():
        own = np.broadcast_to(keep, gradient.shape) if gradient.ndim else True
        np.testing.assert_allclose(gradient, np.where(own, clean[name], gradient), rtol=1e-6)
        assert np.isfinite(gradient).all(), name


@every_kernel
def test_masked_hessian_has_no_nan(loss, rng):
    scores, labels = loss.draw(rng, (4,))
    where = np.array([True, False, True, False])
    scores[1] = np.nan
    for option in ({"where": where}, {"weight": where.astype(np.float32)}):
        hessian = jax.hessian(lambda s, option=option: loss.total(s, labels, **option))(scores)
        assert np.isfinite(hessian).all()
        assert hessian[0, 0] != 0


@dense_losses
def test_nan_that_is_kept_stays(loss):
    nan = np.float32(np.nan)
    for scores, labels in ((nan, np.float32(1)), (np.float32(0.5), nan)):
        assert np.isnan(loss.call(scores, labels))
    assert np.isnan(jax.grad(loss.call)(nan, np.float32(1)))


# --- special values ----------------------------------------------------------------------------


@logit_losses
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_infinite_logits(loss, jit):
    x = np.array([np.inf, -np.inf, np.inf, -np.inf], np.float32)
    y = np.array([1, 0, 0, 1], np.float32)
    transform = jax.jit if jit else lambda f: f
    values, slopes = np.transpose(loss.limits)
    np.testing.assert_allclose(transform(loss.unreduced)(x, y), [0, 0, *values], rtol=1e-6)
    np.testing.assert_array_equal(transform(jax.grad(loss.total))(x, y), [0, 0, *slopes])
    if loss.forward:
        _, tangent = jax.jvp(lambda x: transform(loss.unreduced)(x, y), (x,), (np.ones_like(x),))
        np.testing.assert_array_equal(tangent, [0, 0, *slopes])


@pos_weight_losses
def test_a_pos_weight_of_zero_annihilates(loss):
    x = np.array([-np.inf, -5, np.inf], np.float32)
    ones = np.ones(3, np.float32)

    def total(x):
        return loss.total(x, ones, pos_weight=np.float32(0))

    value, gradient = jax.value_and_grad(total)(x)
    assert value == 0
    assert not gradient.any()


@pos_weight_losses
def test_an_infinite_pos_weight_leaves_pure_negatives_alone(loss, rng):
    x = rng.normal(0, 3, 5).astype(np.float32)
    zeros = np.zeros(5, np.float32)

    def total(x, q):
        return loss.total(x, zeros, pos_weight=q)

    both = jax.value_and_grad(total, argnums=(0, 1))
    value, (by_logits, by_pos_weight) = both(x, np.float32(np.inf))
    chex.assert_trees_all_close((value, by_logits), jax.value_and_grad(total)(x, np.float32(1)))
    assert by_pos_weight == 0


@pytest.mark.parametrize(
    ("p", "y", "value", "slope"),
    [(0, 0, 0, 0), (1, 1, 0, 0), (0, 1, 100, -1e12), (1, 0, 100, 1e12)],
    ids=["(0, 0)", "(1, 1)", "(0, 1)", "(1, 0)"],
)
def test_probabilities_of_zero_and_one(p, y, value, slope):
    got = jax.value_and_grad(jaxbce.bce)(np.float32(p), np.float32(y))
    np.testing.assert_allclose(got, (value, slope), rtol=1e-6)


PUBLISHED = [
    (-100, 3.720075976020836e-44, 100),
    (-50, 1.9287498479639178e-22, 50),
    (-20, 2.0611536203143807e-9, 20.000000002061154),
    (-17, 4.1399376330897474e-8, 17.000000041399376),
    (-10, 4.5398899216864647e-5, 10.000045398899217),
    (-5, 0.0067153484891180686, 5.0067153484891181),
    (-1, 0.31326168751822283, 1.3132616875182228),
    (0, 0.69314718055994531, 0.69314718055994531),
    (0.5, 0.97407698418010668, 0.47407698418010668),
    (2, 2.1269280110429725, 0.1269280110429725),
]


@pytest.mark.parametrize(
    ("x", "negative", "positive"), PUBLISHED, ids=[f"x={row[0]}" for row in PUBLISHED]
)
def test_exact_values(x, negative, positive):
    """40-digit arithmetic; float64, with subnormal float32 results left out of float32."""
    for dtype, rtol in (("float64", 1e-15), ("float32", 3e-7)):
        with jax.enable_x64(True):
            x_ = jnp.asarray([x, -x], dtype)
            got = jaxbce.bce_with_logits(x_, jnp.asarray([0, 1]), reduction="none")
            assert got.dtype == dtype
            np.testing.assert_allclose(got, [negative] * 2, rtol=rtol, atol=1e-38)
            got = jaxbce.bce_with_logits(x_, jnp.asarray([1, 0]), reduction="none")
            np.testing.assert_allclose(got, [positive] * 2, rtol=rtol)


TEXTBOOK = [
    (
        [[-0.6117, 0.1446, 0.0415], [-1.5376, -0.2599, -0.9680]],
        [[0, 1, 0], [0, 1, 1]],
        0.6812,
    ),
    ([0.2, -1.5, 3.0, 0.7], [1, 0, 1, 0], 0.4878),
    ([[-100.0], [100], [-50], [50]], [[0], [1], [0], [1]], 0.0),
]


@pytest.mark.parametrize(("logits", "labels", "mean"), TEXTBOOK, ids=["matrix", "vector", "far"])
def test_textbook_cases(logits, labels, mean):
    logits, labels = jnp.array(logits), jnp.array(labels)
    assert float(jaxbce.bce_with_logits(logits, labels)) == pytest.approx(mean, abs=5e-5)
    assert float(jaxbce.bce(jax.nn.sigmoid(logits), labels)) == pytest.approx(mean, abs=5e-5)


# --- dtypes ------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("dtype", FLOATS)
def test_half_precision_is_computed_in_float32(loss, dtype, rng):
    scores, labels = loss.draw(rng, (4, 5))
    scores = jnp.asarray(scores).astype(dtype)
    value, gradient = jax.value_and_grad(loss.total)(scores, labels)
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    exact = jax.grad(loss.total)(scores.astype(jnp.float32), labels)
    chex.assert_trees_all_equal(gradient, exact.astype(dtype))


@every_kernel
def test_float64(loss, rng):
    with jax.enable_x64(True):
        scores, labels = loss.draw(rng, (4, 5), np.float64)
        value, gradient = jax.value_and_grad(loss.total)(scores, labels)
        assert value.dtype == gradient.dtype == jnp.float64
        expected = loss.oracle(scores, labels)
        np.testing.assert_allclose(value, expected[0].sum(), rtol=1e-14)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-13)


@every_loss
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (1, 5), (4, 5)], ids=str)
def test_gradients_come_back_as_the_argument_went_in(loss, dtype, shape, rng):
    scores, labels = loss.draw(rng, (4, 5))
    labels = jnp.asarray(labels).astype(dtype)
    weight = jnp.asarray(rng.random(shape)).astype(dtype)

    def total(labels, weight):
        return loss.total(scores, labels, weight=weight)

    by_labels, by_weight = jax.eval_shape(jax.grad(total, argnums=(0, 1)), labels, weight)
    assert (by_labels.dtype, by_labels.shape) == (labels.dtype, labels.shape)
    assert (by_weight.dtype, by_weight.shape) == (weight.dtype, weight.shape)


# --- transformations ---------------------------------------------------------------------------


@every_kernel
def test_transformations_agree(loss, rng):
    scores, labels = loss.draw(rng, (3, 4))
    value, gradient = jax.value_and_grad(loss.total)(scores, labels)
    both = jax.value_and_grad(loss.total)
    chex.assert_trees_all_close(jax.jit(both)(scores, labels), (value, gradient), rtol=1e-6)
    chex.assert_trees_all_close(
        jax.value_and_grad(jax.checkpoint(loss.total))(scores, labels),
        (value, gradient),
        rtol=1e-6,
    )
    values, gradients = jax.vmap(both)(scores, labels)
    chex.assert_trees_all_close((values.sum(), gradients), (value, gradient), rtol=1e-6)
    values, columns = jax.vmap(both, in_axes=1)(scores, labels)
    chex.assert_trees_all_close((values.sum(), columns.T), (value, gradient), rtol=1e-6)
    _, (values, gradients) = jax.lax.scan(
        lambda carry, row: (carry, both(*row)), None, (scores, labels)
    )
    chex.assert_trees_all_close((values.sum(), gradients), (value, gradient), rtol=1e-6)


@every_loss
def test_vmap_over_options_only(loss, rng):
    scores, labels = loss.draw(rng, (3, 4))
    weights = rng.random((2, 4)).astype(np.float32)
    got = jax.vmap(lambda w: loss.total(scores, labels, weight=w))(weights)
    expected = [loss.total(scores, labels, weight=w) for w in weights]
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-6)


@every_loss
def test_new_values_do_not_retrace(loss, rng):
    chex.clear_trace_counter()
    fn = jax.jit(chex.assert_max_traces(lambda *args: loss.call(*args), n=1))
    for _ in range(3):
        fn(*loss.draw(rng, (3, 4)))


@every_kernel
def test_lowers_for_every_platform(loss, rng):
    args = loss.draw(rng, (8, 128))
    platforms = ("cpu", "cuda", "tpu")
    export = jax.export.export(jax.jit(jax.value_and_grad(loss.call)), platforms=platforms)
    assert export(*args).platforms == platforms


@every_kernel
def test_deterministic(loss, rng):
    args = loss.draw(rng, (64, 257))
    fn = jax.jit(jax.value_and_grad(loss.call))
    chex.assert_trees_all_equal(fn(*args), fn(*args))


# --- sharding ----------------------------------------------------------------------------------

Spec = jax.sharding.PartitionSpec


@every_kernel
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_sharded_inputs_move_only_scalars(loss, reduction, mesh, rng):
    scores, labels = loss.draw(rng, (16, 32))
    where = rng.random((16, 32)) < 0.8

    def call(scores, labels, where):
        return loss.call(scores, labels, where=where, reduction=reduction)

    both = jax.jit(jax.value_and_grad(call))
    expected = both(scores, labels, where)
    sharding = jax.sharding.NamedSharding(mesh, Spec("batch", "labels"))
    args = jax.device_put((scores, labels, where), sharding)
    value, gradient = both(*args)
    chex.assert_trees_all_close((value, gradient), expected, rtol=1e-5)
    assert gradient.sharding.is_equivalent_to(sharding, 2)
    program = both.lower(*args).compile().as_text()
    assert "all-gather" not in program
    assert "all-to-all" not in program
    # A row count needs one number per row, everything else is a scalar.
    largest = 16 // 4 if reduction == "batchmean" else 1
    assert max(collectives(program)) <= largest


@dense_losses
def test_explicitly_sharded_inputs(loss, rng):
    """On the mesh that a newer `jax.make_mesh` makes by default, with options on the host."""
    scores, labels = loss.draw(rng, (16, 8))
    options = {"weight": rng.random((16, 1)).astype(np.float32), "where": rng.random(8) < 0.8}
    if loss.pos_weight:
        options["pos_weight"] = rng.random(8).astype(np.float32)
    both = jax.jit(jax.value_and_grad(functools.partial(loss.call, **options)))
    expected = both(scores, labels)
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((4, 2), ("batch", "labels"), explicit), Spec("batch", "labels")
    )
    value, gradient = both(*jax.device_put((scores, labels), sharding))
    chex.assert_trees_all_close((value, gradient), expected, rtol=1e-5, atol=1e-7)
    assert jax.typeof(gradient).sharding.spec == sharding.spec


@every_loss
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no vma"])
def test_inside_shard_map(loss, check_vma, mesh, rng):
    scores, labels = loss.draw(rng, (16, 8))
    weight = rng.random(8).astype(np.float32)

    def step(scores, labels, weight):
        def mean(scores, weight):
            return loss.call(scores, labels, weight=weight)

        value, gradient = jax.value_and_grad(mean)(scores, weight)
        return jax.lax.pmean(value, "batch"), gradient

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(Spec("batch"), Spec("batch"), Spec()),
        out_specs=(Spec(), Spec("batch")),
        check_vma=check_vma,
    )
    value, gradient = jax.jit(sharded)(scores, labels, weight)
    expected, expected_gradient = jax.value_and_grad(loss.call)(scores, labels, weight=weight)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient * 4, rtol=1e-5)
