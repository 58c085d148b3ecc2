"""Second derivatives of the head are those of the dense head, also where a row's factor is 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composing import LABELS, ROWS, dense_head, draw_head, margin_loss
from heads import assert_close
from losses import asymmetric, bce_with_logits, focal

import jaxbce

pytestmark = pytest.mark.usefixtures("compile_fast")

ARGUMENTS = ("bias", "weight", "positives")
LAYER = ("features", "kernel", "bias")


LOSSES = {  # ours, the formula, and the argument [labels] that it takes
    "bce": (None, bce_with_logits, "pos_weight"),
    "focal": (
        functools.partial(jaxbce.focal_loss, reduction="none"),
        lambda x, y, _: focal(x, y, 2.0),
        None,
    ),
    "asymmetric": (
        functools.partial(jaxbce.asymmetric_loss, clip=0.0, reduction="none"),
        lambda x, y, _: asymmetric(x, y, 4.0, 1.0, 0.0),
        None,
    ),
    "own": (margin_loss, margin_loss, "margin"),
}
PLACES = {
    "one chunk": {"chunk_size": LABELS},
    "chunks": {"chunk_size": 3},
    "rows on a mesh": {"chunk_size": 3, "batch_axis": "all"},
    "labels on a mesh": {"chunk_size": 3, "label_axis": "all"},
}
DEVICES = {"rows on a mesh": ROWS, "labels on a mesh": LABELS}
WEIGHTS = {"all": np.zeros(ROWS), "one": np.array([0.0, 1.5, 0.7])}
SOME = ("one", "chunks", "sum")
CASES = [(loss, *SOME) for loss in LOSSES]
CASES += [("bce", "one", "chunks", r) for r in ("weighted_mean", "none")]
CASES += [("bce", "all", place, r) for place, r in zip(PLACES, ("sum", "none") * 2, strict=True)]
CASES += [("own", "all", "labels on a mesh", "mean")]


def head_of(loss, place, reduction):
    """The head as a function of its arguments by name, and its dense twin."""
    ours, formula, parameter = LOSSES[loss]
    options = PLACES[place] | {"reduction": reduction}
    if place in DEVICES:
        devices = jax.devices()[: DEVICES[place]]
        kinds = (jax.sharding.AxisType.Auto,)
        options["mesh"] = jax.make_mesh((len(devices),), ("all",), kinds, devices=devices)

    def head(arguments):
        given = dict(arguments)
        layer = [given.pop(name) for name in LAYER]
        if ours is None:
            return jaxbce.linear_bce_with_logits(*layer, **given, **options)
        per_label = (given.pop(parameter),) if parameter else ()
        return jaxbce.linear_loss(ours, *layer, per_label=per_label, **given, **options)

    dense = functools.partial(
        dense_head, reduction=reduction, formula=formula, parameter=parameter or "pos_weight"
    )
    return head, dense


def draw(rng, loss, weight, masked=True):
    parameter = LOSSES[loss][2]
    names = [*ARGUMENTS, *filter(None, [parameter]), *(["where"] if masked else [])]
    return draw_head(rng, names=names) | {"weight": jnp.asarray(weight, np.float32)}


def moving(arguments):
    floats = {n: v for n, v in arguments.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    return floats, {n: v for n, v in arguments.items() if n not in floats}


def curved(loss, fixed):
    """Value and gradients of a function of all float arguments, one number each: their sum."""

    def total(floats, along):
        value, gradient = jax.value_and_grad(
            lambda floats: jnp.sum(jnp.sin(jnp.arange(1.0, ROWS + 1)) * loss(floats | fixed))
        )(floats)
        terms = jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, along)
        return value + sum(jax.tree.leaves(terms))

    return total


def directional(loss, fixed, floats, along):
    """Of value and gradients together: along `along`, and by every argument."""
    total = curved(loss, fixed)
    _, forward = jax.jvp(
        jax.grad(lambda f: total(f, jax.tree.map(jnp.zeros_like, f))), (floats,), (along,)
    )
    return forward, jax.grad(total)(floats, along)


def drawn_with_direction(loss, weight):
    rng = np.random.default_rng(0)
    floats, fixed = moving(draw(rng, loss, WEIGHTS[weight]))
    along = {n: jnp.asarray(rng.normal(size=v.shape), v.dtype) for n, v in floats.items()}
    return fixed, floats, along


@functools.cache
def expected_in_float64(loss, weight, reduction):
    """Of the dense head, which is the same in every place."""
    fixed, *moved = drawn_with_direction(loss, weight)
    _, dense = head_of(loss, "one chunk", reduction)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), np.float64), moved)
        expected = jax.jit(functools.partial(directional, dense, fixed))(*wide)
        return jax.tree.map(np.asarray, expected)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("loss", "weight", "place", "reduction"), CASES, ids=["-".join(case) for case in CASES]
)
def test_where_a_weight_is_zero(loss, weight, place, reduction):
    """Of value and gradients together, in every argument at once, in both orders."""
    fixed, floats, along = drawn_with_direction(loss, weight)
    ours, _ = head_of(loss, place, reduction)
    got = jax.jit(functools.partial(directional, ours, fixed))(floats, along)
    expected = expected_in_float64(loss, weight, reduction)
    assert np.any(expected[1]["weight"])
    assert_close(got, expected, 2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_two_pullbacks_are_a_pushforward(place, reduction, rng):
    """A pullback is linear in its cotangent, also at 0, and can be transposed."""
    floats, fixed = moving(draw(rng, "bce", WEIGHTS["one"]))
    along = {n: jnp.asarray(rng.normal(size=v.shape), v.dtype) for n, v in floats.items()}
    head, dense = head_of("bce", place, reduction)
    # jax 0.8 cannot transpose the pullback of a loop, of plain jnp neither.
    loops_are_transposed = jax.__version_info__ >= (0, 10) or place == "one chunk"

    def of(floats):
        return head(floats | fixed)

    @jax.jit
    def pushed(floats, along):
        value, pullback = jax.vjp(of, floats)
        _, twice = jax.vjp(lambda g: pullback(g)[0], jnp.zeros_like(value))
        (pushed,) = twice(along)
        if loops_are_transposed or reduction != "none":
            (transposed,) = jax.linear_transpose(lambda g: pullback(g)[0], value)(along)
            return pushed, transposed
        return pushed, pushed

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), np.float64), (floats, along))
        _, expected = jax.jvp(lambda floats: dense(floats | fixed), (wide[0],), (wide[1],))
        expected = np.asarray(expected)
    got = pushed(floats, along)
    assert_close(got, (expected, expected), 2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_first_step_of_learning_to_reweight(reduction, rng):
    """Weights start at 0: the gradient of a clean loss after a step says which examples help."""
    arguments = draw(rng, "bce", np.zeros(ROWS), masked=False)
    clean = draw(rng, "bce", np.ones(ROWS), masked=False)

    def by_weight(loss):
        def after_a_step(weight):
            def noisy(kernel):
                return jnp.sum(loss(arguments | {"kernel": kernel, "weight": weight}))

            kernel = arguments["kernel"]
            return jnp.sum(loss(clean | {"kernel": kernel - jax.grad(noisy)(kernel)}))

        return jax.grad(after_a_step)(arguments["weight"])

    got, expected = map(by_weight, head_of("bce", "chunks", reduction))
    assert np.all(got)
    assert_close(got, expected, 2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("hidden_by", "reduction"),
    [("mask", "sum"), ("weight", "none"), ("both", "sum"), ("both", "none")],
)
def test_what_is_hidden_reaches_no_second_derivative(hidden_by, reduction, rng):
    """Labels that are NaN, and logits that are not finite, of the row and the label that hides."""
    arguments = draw(rng, "own", np.array([0.0, 1.5, 0.7]), masked=False)
    del arguments["positives"]
    labels = rng.uniform(0.1, 0.9, (ROWS, LABELS)).astype(np.float32)
    where = np.ones((ROWS, LABELS), bool)
    clean, dirty = dict(arguments), dict(arguments)
    junk = labels.copy()
    if hidden_by != "weight":
        where[1, 2:4], where[:, 5] = False, False
        junk[1, 2], junk[:, 5] = np.nan, np.inf
        for name in ("kernel", "bias", "margin"):
            dirty[name] = dirty[name].at[..., 5].set(jnp.nan)
    if hidden_by != "mask":
        junk[0, 1] = np.nan
    head, _ = head_of("own", "chunks", reduction)

    @jax.jit
    def second(floats, labels):
        along = jax.tree.map(jnp.ones_like, floats)
        # By the weight of a row with a loss that is not finite there is no derivative.
        along["weight"] = along["weight"].at[0].set(0)
        total = curved(head, {"labels": labels, "where": jnp.asarray(where)})
        return jax.grad(total, argnums=(0, 1))(floats, along)

    expected, got = second(clean, labels), second(dirty, junk)
    for by in ("features", "kernel", "bias", "margin"):
        np.testing.assert_array_equal(got[0][by], expected[0][by], by)
        assert np.all(np.isfinite(got[1][by]))


@pytest.mark.thorough
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_column_that_no_weighted_row_sees_may_hold_nan(reduction, rng):
    """Rows of weight 0 see it, and the others mask it: no gradient but that of its own is lost."""
    arguments = draw(rng, "own", WEIGHTS["one"], masked=False)
    where = jnp.ones((ROWS, LABELS), bool).at[1:, 2].set(False)
    head, _ = head_of("own", "chunks", reduction)
    floats, fixed = moving(arguments | {"where": where})
    dirty = floats | {"kernel": floats["kernel"].at[:, 2].set(jnp.nan)}
    slope = jax.jit(jax.grad(lambda floats: jnp.sum(head(floats | fixed))))
    got, expected = slope(dirty), slope(floats)
    for name in ("features", "kernel", "bias", "margin"):
        np.testing.assert_array_equal(got[name], expected[name], name)
    assert got["weight"][0] == 0
    np.testing.assert_array_equal(got["weight"][1:], expected["weight"][1:])
