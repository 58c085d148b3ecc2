"""What every elementwise loss promises, one test per promise over all of `losses.LOSSES`."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from losses import (
    LOSSES,
    dense_losses,
    distinct_losses,
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


def both(loss, **options):
    """(scores, labels) -> the unreduced loss and the gradient of its sum, in one program."""

    def total(scores, labels):
        unreduced = loss.unreduced(scores, labels, **options)
        return unreduced.sum(), unreduced

    def fn(scores, labels):
        gradient, unreduced = jax.grad(total, has_aux=True)(scores, labels)
        return unreduced, gradient

    return jax.jit(fn)


def exact_mean(loss, scores, labels, weight=1.0, where=True, pos_weight=None):
    """The mean over what is kept and its gradient, in float64."""
    extra = () if pos_weight is None else (np.float64(pos_weight),)
    value, slope = loss.oracle(np.float64(scores), np.float64(labels), *extra)
    kept = np.broadcast_to(where, scores.shape)
    value, slope = (np.where(kept, weight * each, 0) / kept.sum() for each in (value, slope))
    return value.sum(), slope


# --- value and derivatives ---------------------------------------------------------------------


@every_loss
def test_value_and_gradient_match_the_oracle(loss, rng):
    """Called eagerly, as everything else below is compiled."""
    scores, labels = loss.draw(rng, (4, 5))
    value, derivative = loss.oracle(scores.astype(np.float64), labels.astype(np.float64))
    np.testing.assert_allclose(loss.unreduced(scores, labels), value, rtol=2e-6, atol=1e-30)
    gradient = jax.grad(loss.total)(scores, labels)
    np.testing.assert_allclose(gradient, derivative, rtol=2e-6, atol=1e-30)


@every_kernel
def test_soft_labels(loss, rng):
    scores, _ = loss.draw(rng, (50,))
    labels = rng.random(50).astype(np.float32)
    expected = loss.oracle(scores.astype(np.float64), labels.astype(np.float64))
    value, gradient = both(loss)(scores, labels)
    np.testing.assert_allclose(value, expected[0], rtol=2e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=2e-6, atol=2e-6)


# One place makes floats of the labels: one loss with every dtype, the others with one.
LABELLED = [(LOSSES[0], dtype) for dtype in ("bool", "int8", "uint32", "bfloat16", "float32")]
LABELLED += [(loss, "bool") for loss in LOSSES[1:] if loss.dense]


@pytest.mark.parametrize(
    ("loss", "dtype"), LABELLED, ids=[f"{loss.name}-{dtype}" for loss, dtype in LABELLED]
)
def test_labels_of_any_real_dtype(loss, dtype, rng):
    scores, labels = loss.draw(rng, (3, 4))
    expected = loss.unreduced(scores, labels)
    typed = jnp.asarray(labels).astype(dtype)
    chex.assert_trees_all_equal(loss.unreduced(scores, typed), expected)


@every_kernel
def test_gradient_of_labels_and_weight(loss, rng):
    """Linear in weight; the step in the label is exact enough where the loss is a square in it."""
    scores, labels = loss.draw(rng, (4, 5))
    labels, weight = labels * 0.5 + 0.25, rng.random((4, 1)).astype(np.float32)
    weight[0] = 0

    def total(labels, weight):
        return loss.total(scores, labels, weight=weight)

    by_labels, by_weight = jax.jit(jax.grad(total, argnums=(0, 1)))(labels, weight)
    step = 1e-5
    above, value, below = (
        loss.oracle(np.float64(scores), np.float64(labels) + side)[0] for side in (step, 0, -step)
    )
    expected = (above - below) / (2 * step) * weight
    np.testing.assert_allclose(by_labels, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(by_weight, value.sum(1, keepdims=True), rtol=2e-6)


@every_kernel
def test_hessian(loss, rng):
    """Forward over reverse, reverse over reverse, and along a direction."""
    scores, labels = loss.draw(rng, (3,))
    labels[:2] = 0, 1

    @jax.jit
    def second_derivatives(scores):
        slope = jax.grad(lambda s: loss.total(s, labels))
        along = jax.jvp(slope, (scores,), (jnp.ones_like(scores),))[1]
        return jax.jacfwd(slope)(scores), jax.jacrev(slope)(scores), along

    hessian, reverse_over_reverse, along_ones = second_derivatives(scores)
    step = 1e-6
    above, below = (loss.oracle(np.float64(scores) + side, labels)[1] for side in (step, -step))
    np.testing.assert_allclose(hessian, np.diag((above - below) / (2 * step)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(reverse_over_reverse, hessian, rtol=2e-6)
    np.testing.assert_allclose(along_ones, hessian.sum(1), rtol=1e-6)


@pytest.mark.thorough
@every_kernel
def test_second_derivative_by_label_and_score(loss, rng):
    scores, labels = loss.draw(rng, (5,))
    labels = labels * 0.5 + 0.25

    @jax.jit
    def second_derivatives(*arguments):
        by_scores, by_labels = (jax.grad(loss.total, argnums=i) for i in (0, 1))
        mixed = jax.jacrev(by_labels, argnums=0)(*arguments)
        swapped = jax.jacrev(by_scores, argnums=1)(*arguments)
        return mixed, swapped, jax.jacfwd(by_labels, argnums=1)(*arguments)

    mixed, swapped, by_labels_twice = second_derivatives(scores, labels)
    np.testing.assert_allclose(swapped, mixed, rtol=2e-5, atol=1e-6)
    assert np.isfinite(by_labels_twice).all()
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
    hessian = jax.jit(jax.hessian(loss, argnums=tuple(range(moving))))(x, y, q)
    expected = [row[:moving] for row in expected[:moving]]
    np.testing.assert_allclose(hessian, expected, rtol=1e-6)


@logit_losses
def test_hessian_of_the_squared_loss_at_logit_zero(loss):
    """2 (l'² + l l''): wrong at 0 where JAX differentiates through abs and max."""

    def at(x):
        return loss.unreduced(x, np.float32(0))

    @jax.jit
    def derivatives(x):
        squared = jax.hessian(lambda x: at(x) ** 2)(x)
        return at(x), jax.grad(at)(x), jax.grad(jax.grad(at))(x), squared

    value, first, second, squared = derivatives(np.float32(0))
    np.testing.assert_allclose(squared, 2 * (first**2 + value * second), rtol=1e-6)
    step = 1e-4
    slopes = [loss.oracle(np.float64(side), 0.0)[1] for side in (-step, step)]
    np.testing.assert_allclose(first, loss.oracle(np.float64(0), 0.0)[1], rtol=1e-6)
    np.testing.assert_allclose(second, (slopes[1] - slopes[0]) / (2 * step), rtol=1e-6)


@pytest.mark.thorough
@every_kernel
def test_third_derivative(loss, rng):
    scores, labels = loss.draw(rng, (8,))
    third = jax.grad(jax.grad(jax.grad(loss.unreduced)))
    third = jax.jit(jax.vmap(third))(scores, labels)
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
def test_the_tails_keep_their_digits(loss):
    """Relative to what is left there: sigmoid(x) - y would lose half of it at logit 17."""
    x, y = (
        each.ravel().astype(np.float32) for each in np.meshgrid([-80, -30, -17, 17, 30, 80], [0, 1])
    )
    expected = loss.oracle(np.float64(x), np.float64(y))
    for got, expected_ in zip(both(loss)(x, y), expected, strict=True):
        np.testing.assert_allclose(got, expected_, rtol=1e-5, atol=1e-37)


# --- weight, where, reduction ------------------------------------------------------------------


# Every loss reduces by the same code: each by a mask and a weight, one by every kind of mask.
WEIGHTS = {"no weight": None, "weight": (4, 5), "rows": (4, 1), "labels": (5,), "one": ()}
DIVISORS = [(loss, "full", "weight") for loss in LOSSES[1:]]
DIVISORS += [(LOSSES[0], mask, weight) for mask in MASKS for weight in ("no weight", "weight")]
DIVISORS += [(LOSSES[0], "scalar", weight) for weight in ("rows", "labels", "one")]


@pytest.mark.parametrize(
    ("loss", "mask", "weight"),
    DIVISORS,
    ids=[f"{row[0].name}-{row[1]}-{row[2]}" for row in DIVISORS],
)
def test_divisors(loss, mask, weight, rng):
    scores, labels = loss.draw(rng, (4, 5))
    where, shape = masks(rng)[mask], WEIGHTS[weight]
    weight = None if shape is None else rng.random(shape, np.float32)
    each = 1 if weight is None else weight
    value = loss.oracle(scores.astype(np.float64), labels)[0] * each
    kept = np.broadcast_to(where, value.shape)
    divisors = {"sum": 1, "mean": kept.sum(), "batchmean": kept.any(-1).sum()}
    divisors["weighted_mean"] = np.broadcast_to(each, kept.shape)[kept].sum()

    @jax.jit
    def every_reduction(scores, labels, **options):
        return {
            reduction: loss.call(scores, labels, reduction=reduction, **options)
            for reduction in (*divisors, "none")
        }

    got = every_reduction(scores, labels, where=where, weight=weight)
    np.testing.assert_allclose(got.pop("none"), np.where(kept, value, 0), rtol=2e-6)
    for reduction, reduced_ in got.items():
        expected = value[kept].sum() / (divisors[reduction] or 1)
        np.testing.assert_allclose(reduced_, expected, rtol=2e-6, err_msg=reduction)


AXES = [(loss, (0, 2)) for loss in LOSSES[1:]]
AXES += [(LOSSES[0], axis) for axis in (0, -1, (0, 2), (-2,), ())]


@pytest.mark.parametrize(("loss", "axis"), AXES, ids=[f"{row[0].name}-{row[1]}" for row in AXES])
def test_axis(loss, axis, rng):
    """What is reduced is as the whole of it alone; the other axes stay."""
    scores, labels = loss.draw(rng, (2, 3, 4))
    where, weight = rng.random((2, 1, 4)) < 0.7, rng.random((3, 1)).astype(np.float32)

    @jax.jit
    def every_reduction(scores, labels, **options):
        return {
            reduction: loss.call(scores, labels, axis=axis, reduction=reduction, **options)
            for reduction in ("mean", "weighted_mean", "sum")
        }

    axes = tuple({each % 3 for each in (axis if isinstance(axis, tuple) else (axis,))})
    whole = np.broadcast_to(where, scores.shape), np.broadcast_to(weight, scores.shape)
    value = loss.oracle(np.float64(scores), np.float64(labels))[0]
    kept, own_weight = whole[0], np.float64(whole[1])
    total = np.where(kept, own_weight * value, 0).sum(axes)
    counted = {"mean": np.float64(kept), "weighted_mean": kept * own_weight}
    for reduction, got in every_reduction(scores, labels, where=where, weight=weight).items():
        divisor = 1 if reduction == "sum" else counted[reduction].sum(axes)
        expected = total / np.where(divisor == 0, 1, divisor)
        np.testing.assert_allclose(got, expected, rtol=2e-6, err_msg=reduction)


def test_batchmean_of_images_divides_by_the_images(rng):
    loss = LOSSES[0]
    scores, labels = loss.draw(rng, (3, 2, 4, 5))
    where = np.ones(scores.shape, bool)
    where[1], where[2, 0, 1] = False, False
    for mask, images in ((None, 3), (where, 2), (where[:, :1, :1, :1], 2), (where[0], 3)):
        total = loss.total(scores, labels, where=mask)
        got = loss.call(scores, labels, where=mask, reduction="batchmean")
        np.testing.assert_allclose(got, total / images, rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 1), (5,), (4, 5)], ids=str)
def test_weighted_mean_has_the_gradient_of_its_divisor(shape, rng):
    loss = LOSSES[0]
    scores, labels = loss.draw(rng, (4, 5))
    where = rng.random((4, 5)) < 0.7
    weight = rng.uniform(0.5, 2, shape).astype(np.float32)

    def ours(axis, scores, weight):
        options = {"weight": weight, "where": where, "axis": axis, "reduction": "weighted_mean"}
        return jnp.sum(loss.call(scores, labels, **options) ** 2)

    def by_hand(axis, scores, weight):
        unreduced = loss.unreduced(scores, labels, weight=weight, where=where)
        return jnp.sum(reduced(unreduced, weight, where, axis, "weighted_mean") ** 2)

    def gradients(fn):
        @jax.jit
        def by_axis(scores, weight):
            return [jax.grad(fn, argnums=(1, 2))(axis, scores, weight) for axis in (None, 0)]

        return by_axis(scores, weight)

    chex.assert_trees_all_close(gradients(ours), gradients(by_hand), rtol=2e-5, atol=1e-4)


WEIGHTED_MEANS = {
    "elementwise": lambda weight, **options: jaxbce.bce_with_logits(
        np.float32([[1, 2]]), np.float32([[0, 0]]), weight=weight, **options
    ),
    "head": lambda weight, **options: jaxbce.linear_bce_with_logits(
        np.eye(2, dtype=np.float32),
        np.float32([[1], [2]]),
        labels=np.zeros((2, 1)),
        weight=weight,
        **options,
    ),
}


@pytest.mark.parametrize("mean", WEIGHTED_MEANS.values(), ids=WEIGHTED_MEANS)
@pytest.mark.parametrize("where", [None, True], ids=["all", "masked"])
def test_weighted_mean_of_weights_of_any_size(mean, where):
    """The square of their sum, which its gradient has, would leave float32; so would the cube."""
    weight = np.float32([1, 3])
    where = None if where is None else np.ones((1, 1), bool)

    @jax.jit
    def derivatives(weight):
        def total(weight):
            return mean(weight, where=where, reduction="weighted_mean")

        return *jax.value_and_grad(total)(weight), jax.hessian(total)(weight)

    expected = derivatives(weight)
    for scale in np.float32([1e-30, 1e-20, 1e-14, 1e12, 1e20, 1e30, 5e37]):
        value, slope, curvature = derivatives(weight * scale)
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        np.testing.assert_allclose(slope, expected[1] / scale, rtol=1e-4, atol=1e-37)  # subnormal
        if 1e-15 < scale < 1e15:
            np.testing.assert_allclose(curvature, expected[2] / scale / scale, rtol=1e-4)


@pytest.mark.parametrize("weight", [[0.0, 0.0], [1.0, -1.0]], ids=str)
def test_weighted_mean_of_no_weight_is_zero(weight):
    def call(x):
        y, w = np.float32([1, 0]), np.float32(weight)
        return jaxbce.bce_with_logits(x, y, weight=w, reduction="weighted_mean")

    value, gradient = jax.value_and_grad(call)(np.float32([1, 2]))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_nothing_kept_gives_zero_and_no_gradient(rng):
    """By the divisors, which are those of every loss."""
    loss = LOSSES[0]
    scores, labels = loss.draw(rng, (4, 5))

    @jax.jit
    def every_mean(scores, weight, where):
        def call(scores, weight, reduction):
            return loss.call(scores, labels, weight=weight, where=where, reduction=reduction)

        fn = jax.value_and_grad(call, argnums=(0, 1))
        return {how: fn(scores, weight, how) for how in ("mean", "weighted_mean", "batchmean")}

    got = every_mean(scores, np.ones((4, 1), np.float32), np.zeros((4, 5), bool))
    for leaf in jax.tree.leaves(got):
        np.testing.assert_array_equal(leaf, 0)


def test_a_large_mask_is_counted_exactly():
    """float32 cannot tell 2^24 from 2^24 + 1."""
    for shape in ((2**24 + 1,), (2, 2, 2**23 + 1)):
        with jax.enable_x64(True):
            count = _reduce.count_true(jnp.ones(shape, bool), (*range(len(shape)),), jnp.float64)
        np.testing.assert_array_equal(count, np.full([1] * len(shape), np.prod(shape)))


EMPTY = (0,), (0, 3), (3, 0)


@distinct_losses
def test_empty_arrays_give_zero(loss):
    @jax.jit
    def values_and_gradients(empty):
        return [jax.value_and_grad(loss.call)(each, each) for each in empty]

    got = values_and_gradients([np.zeros(shape, np.float32) for shape in EMPTY])
    assert [(float(value), gradient.shape) for value, gradient in got] == [(0, s) for s in EMPTY]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_arrays_give_zero_in_every_way(shape):
    scores, nothing = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for options in ({"where": nothing}, *({"reduction": how} for how in REDUCTIONS)):
        assert jaxbce.bce_with_logits(scores, scores, **options) == 0


@every_loss
def test_zero_dimensional(loss):
    score = np.float32(0.25)
    expected = loss.oracle(np.float64(score), 1.0)[0]

    @jax.jit
    def every_reduction(score, label):
        return [loss.call(score, label, reduction=reduction) for reduction in REDUCTIONS]

    np.testing.assert_allclose(every_reduction(score, np.float32(1)), expected, rtol=1e-6)
    np.testing.assert_allclose(loss.call(0.25, 1), expected, rtol=1e-6)


GARBAGE = [np.nan, np.inf, -np.inf, 7.0, 1e38, -1e38, 3e38, -3e38]


@distinct_losses
@pytest.mark.parametrize("how", ["where alone", "where", "weight"])
def test_what_is_masked_or_of_weight_zero_leaves_no_trace(loss, how, rng):
    """Whatever it is and whichever argument it is in: not in the value, nor in any gradient."""
    keep = masks(rng)["full"]
    scores, labels = loss.draw(rng, (4, 5))
    arguments = {"scores": scores, "labels": labels}
    if how != "where alone":
        arguments["weight"] = np.full((4, 5), 2, np.float32)
        if loss.pos_weight:
            arguments["pos_weight"] = np.full((4, 5), 2, np.float32)
        if loss.smoothing:
            arguments["label_smoothing"] = np.float32(0.1)
    if how == "weight":
        arguments["weight"] *= keep
    where = None if how == "weight" else keep

    @jax.jit
    def value_and_gradients(arguments, where):
        def value(arguments):
            rest = dict(arguments)
            return loss.call(rest.pop("scores"), rest.pop("labels"), where=where, **rest)

        return jax.value_and_grad(value)(arguments)

    clean, clean_gradients = value_and_gradients(arguments, where)
    hidden = [name for name in arguments if name not in (how, "label_smoothing")]
    hidden = [(name,) for name in hidden if loss.dense or name != "labels"]
    hidden += [("scores", "labels")] if loss.dense else []
    for names, garbage in itertools.product(hidden, GARBAGE):
        case = f"{garbage} in {' and '.join(names)}"
        finite = np.isfinite(garbage)
        free = ("scores", "labels") if loss.dense else ("scores",)
        dirt = {name: garbage if name in free or not finite else 1.0 for name in names}
        dirty = {n: np.where(keep, arguments[n], np.float32(dirt[n])) for n in names}
        value, gradients = value_and_gradients(arguments | dirty, where)
        np.testing.assert_allclose(value, clean, rtol=1e-6, err_msg=case)
        for name, gradient in gradients.items():
            assert np.isfinite(gradient).all(), f"{name}: {case}"
            expected = clean_gradients[name]
            if name == how:  # what a weight of 0 multiplies; of what is not finite it is 0
                expected = np.where(keep, expected, gradient if finite else 0)
            np.testing.assert_allclose(gradient, expected, rtol=1e-6, err_msg=f"{name}: {case}")


@pytest.mark.thorough
@every_kernel
def test_masked_hessian_has_no_nan(loss, rng):
    scores, labels = loss.draw(rng, (4,))
    where = np.array([True, False, True, False])
    scores[1] = np.nan

    @jax.jit
    def hessians(scores):
        def under(**option):
            return jax.hessian(lambda scores: loss.total(scores, labels, **option))(scores)

        return under(where=where), under(weight=where.astype(np.float32))

    for hessian in hessians(scores):
        assert np.isfinite(hessian).all()
        assert hessian[0, 0] != 0


@dense_losses
def test_nan_that_is_kept_stays(loss):
    nan, half = np.float32(np.nan), np.float32(0.5)
    value_and_gradient = jax.jit(jax.value_and_grad(loss.call))
    assert np.isnan(value_and_gradient(nan, np.float32(1))).all()
    assert np.isnan(value_and_gradient(half, nan)[0])


# --- special values ----------------------------------------------------------------------------


@logit_losses
def test_infinite_logits(loss):
    x = np.array([np.inf, -np.inf, np.inf, -np.inf], np.float32)
    y = np.array([1, 0, 0, 1], np.float32)
    values, slopes = np.transpose(loss.limits)
    eager = loss.unreduced(x, y), jax.grad(loss.total)(x, y)
    for value, gradient in (eager, both(loss)(x, y)):
        np.testing.assert_allclose(value, [0, 0, *values], rtol=1e-6)
        np.testing.assert_array_equal(gradient, [0, 0, *slopes])
    if loss.forward:
        _, tangent = jax.jvp(lambda x: loss.unreduced(x, y), (x,), (np.ones_like(x),))
        np.testing.assert_array_equal(tangent, [0, 0, *slopes])


@pos_weight_losses
def test_a_pos_weight_of_zero_gives_zero(loss):
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


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_beyond_its_bound_the_slope_of_a_probability_is_a_line(p):
    second = jax.grad(jax.grad(jaxbce.bce))
    assert second(p, 0.5) == np.float32(1e12)
    assert jax.grad(second)(p, 0.5) == 0


def test_within_its_bound_a_probability_has_the_second_derivative_of_its_logarithm():
    second = jax.grad(jax.grad(jaxbce.bce))
    np.testing.assert_allclose(second(np.float32(1e-6), 1.0), 1e12, rtol=1e-5)


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


@every_kernel
def test_half_precision_is_computed_in_float32(loss, rng):
    scores, labels = loss.draw(rng, (4, 5))
    value_and_gradient = jax.jit(jax.value_and_grad(loss.total))
    for dtype in ("float16", "bfloat16"):
        half = jnp.asarray(scores).astype(dtype)
        value, gradient = value_and_gradient(half, labels)
        assert (value.dtype, gradient.dtype) == (np.float32, half.dtype)
        _, exact = value_and_gradient(half.astype(np.float32), labels)
        chex.assert_trees_all_equal(gradient, exact.astype(dtype))


@every_kernel
def test_float64(loss, rng):
    with jax.enable_x64(True):
        scores, labels = loss.draw(rng, (4, 5), np.float64)
        value, gradient = jax.jit(jax.value_and_grad(loss.total))(scores, labels)
        assert value.dtype == gradient.dtype == jnp.float64
        expected = loss.oracle(scores, labels)
        np.testing.assert_allclose(value, expected[0].sum(), rtol=1e-14)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-13)


@distinct_losses
def test_gradients_come_back_as_the_argument_went_in(loss, rng):
    """Labels and a weight of every dtype, and a weight of every shape that broadcasts."""
    scores, labels = loss.draw(rng, (4, 5))

    def total(labels, weight):
        return loss.total(scores, labels, weight=weight)

    shapes = (), (5,), (4, 1), (1, 5), (4, 5)
    for dtype, shape in zip(itertools.cycle(FLOATS), shapes, strict=False):
        given = tuple(jax.ShapeDtypeStruct(each, dtype) for each in (labels.shape, shape))
        gradients = jax.eval_shape(jax.grad(total, argnums=(0, 1)), *given)
        for gradient, argument in zip(gradients, given, strict=True):
            assert (gradient.dtype, gradient.shape) == (argument.dtype, argument.shape)


# --- transformations ---------------------------------------------------------------------------


@every_kernel
def test_transformations_agree(loss, rng):
    scores, labels = loss.draw(rng, (3, 4))
    value_and_gradient = jax.value_and_grad(loss.total)

    @jax.jit
    def transformed(scores, labels):
        columns = jax.vmap(value_and_gradient, in_axes=1)(scores, labels)
        scan = jax.lax.scan(
            lambda carry, row: (carry, value_and_gradient(*row)), None, (scores, labels)
        )[1]
        return {
            "jit": value_and_gradient(scores, labels),
            "remat": jax.value_and_grad(jax.checkpoint(loss.total))(scores, labels),
            "vmap": jax.vmap(value_and_gradient)(scores, labels),
            "vmap of columns": (columns[0], columns[1].T),
            "scan": scan,
        }

    value, gradient = loss.oracle(np.float64(scores), np.float64(labels))
    for transform, (got, got_gradient) in transformed(scores, labels).items():
        np.testing.assert_allclose(got.sum(), value.sum(), rtol=2e-6, err_msg=transform)
        np.testing.assert_allclose(got_gradient, gradient, rtol=2e-6, err_msg=transform)


@every_kernel
def test_vmap_over_options_only(loss, rng):
    scores, labels = loss.draw(rng, (3, 4))
    weights = rng.random((2, 4)).astype(np.float32)
    got = jax.jit(jax.vmap(lambda w: loss.total(scores, labels, weight=w)))(weights)
    value = loss.oracle(np.float64(scores), np.float64(labels))[0]
    np.testing.assert_allclose(got, [(value * weight).sum() for weight in weights], rtol=2e-6)


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


# Every loss reduces by the same code: each by its mean, one also by rows.
SHARDED = [(loss, "mean") for loss in LOSSES if loss.own_kernel] + [(LOSSES[0], "batchmean")]


@pytest.mark.parametrize(
    ("loss", "reduction"), SHARDED, ids=[f"{loss.name}-{how}" for loss, how in SHARDED]
)
def test_sharded_inputs_move_only_scalars(loss, reduction, mesh, rng):
    scores, labels = loss.draw(rng, (16, 32))
    where = rng.random((16, 32)) < 0.8

    def call(scores, labels, where):
        return loss.call(scores, labels, where=where, reduction=reduction)

    sharding = jax.sharding.NamedSharding(mesh, Spec("batch", "labels"))
    args = jax.device_put((scores, labels, where), sharding)
    program = jax.jit(jax.value_and_grad(call)).lower(*args).compile()
    value, gradient = program(*args)
    mean, slope = exact_mean(loss, scores, labels, where=where)
    scale = where.sum() / 16 if reduction == "batchmean" else 1
    np.testing.assert_allclose(value, mean * scale, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope * scale, rtol=1e-5, atol=1e-9)
    assert gradient.sharding.is_equivalent_to(sharding, 2)
    text = program.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    # A row count needs one number per row, everything else is a scalar.
    largest = 16 // 4 if reduction == "batchmean" else 1
    assert max(collectives(text)) <= largest


@every_kernel
def test_explicitly_sharded_inputs(loss, rng):
    """On the mesh that a newer `jax.make_mesh` makes by default, with options on the host."""
    scores, labels = loss.draw(rng, (16, 8))
    options = {"weight": rng.random((16, 1)).astype(np.float32), "where": rng.random(8) < 0.8}
    if loss.pos_weight:
        options["pos_weight"] = rng.random(8).astype(np.float32)
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((4, 2), ("batch", "labels"), explicit), Spec("batch", "labels")
    )
    fn = jax.jit(jax.value_and_grad(functools.partial(loss.call, **options)))
    placed = jax.device_put((scores, labels), sharding)
    value, gradient = fn(*placed)
    expected = exact_mean(loss, scores, labels, **options)
    chex.assert_trees_all_close((value, gradient), expected, rtol=1e-5, atol=1e-7)
    assert jax.typeof(gradient).sharding.spec == sharding.spec
    assert jax.eval_shape(loss.unreduced, *placed).sharding.spec == sharding.spec


# JAX follows what varies between devices for each kernel; without, all are alike.
MAPPED = [(loss, True) for loss in LOSSES if loss.own_kernel or not loss.dense]
MAPPED += [(LOSSES[0], False)]


@pytest.mark.parametrize(
    ("loss", "check_vma"),
    MAPPED,
    ids=[f"{loss.name}-{'vma' if check_vma else 'no vma'}" for loss, check_vma in MAPPED],
)
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
    expected, expected_gradient = exact_mean(loss, scores, labels, weight)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, expected_gradient * 4, rtol=1e-5)
