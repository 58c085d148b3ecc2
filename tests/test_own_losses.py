"""`jaxbce.Loss`: a function of one logit and one label with all that the losses here have."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composing import LABELS, ROWS, dense_head, draw_head
from heads import assert_close, value_and_gradients

import jaxbce
from jaxbce._loss import Options, evaluate

pytestmark = pytest.mark.usefixtures("compile_fast")

TAU = 0.5


def adjusted(logit, label, log_prior):
    """The logit-adjusted loss, of a sigmoid."""
    moved = logit + TAU * log_prior
    return jaxbce.softplus(moved) - label * moved


def hinge(logit, label, margin=1.0, slope=1.0):
    return slope * jnp.maximum(0, margin - (2 * label - 1) * logit)


ADJUSTED = jaxbce.Loss(adjusted, ("log_prior",))
HINGE = jaxbce.Loss(hinge, ("margin", "slope"))


@pytest.fixture
def drawn(rng):
    return {
        "logits": jnp.asarray(rng.normal(size=(ROWS, LABELS)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, 2, (ROWS, LABELS)), jnp.float32),
        "log_prior": jnp.asarray(rng.normal(-2, 1, LABELS), jnp.float32),
    }


def test_is_the_function_of_each_element(drawn):
    expected = adjusted(drawn["logits"], drawn["labels"], drawn["log_prior"][None])
    got = ADJUSTED(**drawn, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(ADJUSTED(**drawn), expected.mean(), rtol=1e-6)


def test_parameters_have_gradients_in_their_own_shape(drawn):
    slopes = jax.grad(lambda prior: ADJUSTED(**(drawn | {"log_prior": prior})))(drawn["log_prior"])
    by_logit = jax.grad(lambda x: ADJUSTED(**(drawn | {"logits": x})))(drawn["logits"])
    assert_close(slopes, TAU * by_logit.sum(0))


def test_is_differentiated_in_forward_mode_too(drawn):
    def total(x):
        return ADJUSTED(**(drawn | {"logits": x}), reduction="sum")

    ones = jnp.ones_like(drawn["logits"])
    pushed = jax.jvp(total, (drawn["logits"],), (ones,))[1]
    assert_close(pushed, jax.grad(total)(drawn["logits"]).sum())


@pytest.mark.parametrize("given", [(), ("margin",), ("slope",), ("slope", "margin")], ids=str)
def test_a_parameter_with_a_default_may_be_left_out(given, drawn):
    values = {"margin": np.float32(0.5), "slope": np.arange(LABELS, dtype=np.float32)}
    values = {name: values[name] for name in given}
    got = HINGE(drawn["logits"], drawn["labels"], reduction="none", **values)
    wide = {name: jnp.broadcast_to(value, got.shape) for name, value in values.items()}
    np.testing.assert_allclose(got, hinge(drawn["logits"], drawn["labels"], **wide), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype, drawn):
    with jax.enable_x64(dtype == "float64"):
        seen = []

        def fn(logit, label):
            seen.append((logit.dtype, label.dtype))
            return (logit - label) ** 2

        logits = drawn["logits"].astype(dtype)
        value, gradient = jax.value_and_grad(jaxbce.Loss(fn))(logits, drawn["labels"])
        wide = "float64" if dtype == "float64" else "float32"
        assert value.dtype == wide
        assert gradient.dtype == dtype
        assert seen[-1] == (wide, wide)


CHUNKS = {"one chunk": {}, "chunks": {"chunk_size": 3}}
PLACES = CHUNKS | {"mesh": {"chunk_size": 3, "batch_axis": "all"}}


@pytest.mark.parametrize("place", PLACES)
def test_in_the_head(place, rng):
    """As it is, with the arrays of its parameters as `per_label`."""
    arguments = draw_head(rng, names=("bias", "weight", "margin", "positives", "where"))
    options = dict(PLACES[place])
    if place == "mesh":
        kinds = (jax.sharding.AxisType.Auto,)
        options["mesh"] = jax.make_mesh((ROWS,), ("all",), kinds, devices=jax.devices()[:ROWS])

    def ours(arguments):
        given = dict(arguments)
        layer = [given.pop(name) for name in ("features", "kernel", "bias")]
        per_label = (given.pop("margin"),)
        return jaxbce.linear_loss(ADJUSTED, *layer, per_label=per_label, **given, **options)

    dense = functools.partial(dense_head, formula=adjusted, parameter="margin")
    assert_close(value_and_gradients(ours, arguments), value_and_gradients(dense, arguments), 2e-6)


PUBLIC = {
    "bce": (jaxbce.bce_with_logits, ("pos_weight",)),
    "focal": (functools.partial(jaxbce.focal_loss, gamma=1.5), ("alpha",)),
    "asymmetric": (jaxbce.asymmetric_loss, ()),
    "optax focal": (optax.sigmoid_focal_loss, ("gamma",)),
}


@pytest.mark.thorough
@pytest.mark.parametrize(("fn", "parameters"), PUBLIC.values(), ids=PUBLIC)
def test_a_public_loss_in_the_head(fn, parameters, rng):
    """It takes one logit as well as arrays, so it is a function for a `Loss`."""
    loss = jaxbce.Loss(fn, parameters)
    arguments = draw_head(rng, names=("bias", "weight", "positives", "where"))
    arguments |= {name: jnp.linspace(0.2, 0.8, LABELS) for name in parameters}

    def split_off(arguments):
        given = dict(arguments)
        return given, [given.pop(name) for name in parameters]

    def ours(arguments):
        given, per_label = split_off(arguments)
        layer = [given.pop(name) for name in ("features", "kernel", "bias")]
        return jaxbce.linear_loss(loss, *layer, per_label=per_label, **given, chunk_size=3)

    def dense(arguments):
        given, per_label = split_off(arguments)

        def formula(x, y, _):
            def one(x, y, *numbers):
                return fn(x, y, **dict(zip(parameters, numbers, strict=True)))

            return jnp.vectorize(one)(x, y, *(jnp.broadcast_to(n, x.shape) for n in per_label))

        return dense_head(given, formula=formula)

    assert_close(value_and_gradients(ours, arguments), value_and_gradients(dense, arguments), 2e-6)


def test_in_a_step(rng):
    arguments = draw_head(rng, names=("bias", "margin", "positives"))
    params = {name: arguments[name] for name in ("kernel", "bias")}
    optimizer = optax.sgd(0.1)
    step = jaxbce.linear_update(
        optimizer,
        arguments["features"],
        params,
        optimizer.init(params),
        loss=ADJUSTED,
        per_label=(arguments["margin"],),
        positives=arguments["positives"],
        chunk_size=3,
    )
    loss = functools.partial(dense_head, formula=adjusted, parameter="margin")
    value, slopes = jax.value_and_grad(lambda params: loss(arguments | params))(params)
    np.testing.assert_allclose(step.loss, value, rtol=1e-6)
    assert_close(step.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, slopes), 2e-6)


def by_hand(logit, label):
    """Infinite at a finite logit."""
    p = jax.nn.sigmoid(logit)
    return -(label * jnp.log(p) + (1 - label) * jnp.log(1 - p))


def root(logit, label):
    """Its slope is not finite where it is 0."""
    return jnp.sqrt((logit - label) ** 2)


@pytest.mark.thorough
@pytest.mark.parametrize(("fn", "logit"), [(by_hand, 20.0), (root, 0.0)], ids=["loss", "slope"])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
def test_a_weight_of_zero_drops_what_is_not_finite(fn, logit, reduction):
    """Of the loss or its slope; in the head and in a step too."""
    loss, labels = jaxbce.Loss(fn), jnp.array([[0.0, 1.0], [0.0, 1.0]])
    weight = jnp.array([0.0, 1.5])
    logits = jnp.array([[logit, 0.3], [0.7, -0.4]])

    def ours(logits):
        return loss(logits, labels, weight=weight[:, None], reduction=reduction)

    def of_head(logits):
        return jaxbce.linear_loss(
            loss, jnp.eye(2), logits, labels=labels, weight=weight, reduction=reduction
        )

    def kept(logits):
        losses = fn(logits[1], labels[1]) * weight[1]
        divisor = {"mean": 4, "weighted_mean": 2 * weight[1]}.get(reduction, 1)
        return losses.sum() / divisor

    expected = jax.value_and_grad(kept)(logits)
    for each in (ours, of_head):
        got = jax.value_and_grad(lambda logits, each=each: jnp.sum(each(logits)))(logits)
        assert_close(got, expected)


@pytest.mark.parametrize("hidden_by", ["where", "weight"])
def test_what_is_hidden_reaches_no_shared_argument(hidden_by):
    """A loss that is not finite at what takes the place of the hidden."""
    loss = jaxbce.Loss(lambda logit, label: -jnp.log(jnp.abs(logit)) * (0.5 + label))
    logits, labels = jnp.array([2.0, jnp.nan, 3.0]), jnp.array([1.0, 0.0, 0.0])
    keep = jnp.array([True, False, True])
    options = {"where": keep} if hidden_by == "where" else {}
    weight = jnp.array([1.0, 1.0 if hidden_by == "where" else 0.0, 2.0])

    def total(logits, labels, weight, a, **options):
        return loss(
            logits, labels, weight=weight, label_smoothing=a, reduction="weighted_mean", **options
        )

    slope = functools.partial(jax.grad, argnums=(2, 3))
    got = slope(functools.partial(total, **options))(logits, labels, weight, 0.1)
    kept = slope(total)(logits[keep], labels[keep], weight[keep], 0.1)
    np.testing.assert_allclose(got[0][keep], kept[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], kept[1], rtol=1e-6)


def test_reads_its_function_in_the_dtype_of_the_logits():
    scale = Scale()
    loss = jaxbce.Loss(lambda x, y: scale.value * (x - y) if x.dtype == jnp.float64 else x - y)
    with jax.enable_x64(True):
        for scale.value in (2.0, 5.0):
            ones = jnp.ones(2, jnp.float64)
            assert loss(ones, 0 * ones) == scale.value
            layer = ones[:, None], ones[None]
            labels = jnp.zeros((2, 2))
            assert jaxbce.linear_loss(loss, *layer, labels=labels) == scale.value


def test_bound_arguments_and_those_with_a_default_do_not_count(drawn):
    focal = jaxbce.Loss(functools.partial(optax.sigmoid_focal_loss, gamma=2.0))
    logits, labels = drawn["logits"], drawn["labels"]
    expected = optax.sigmoid_focal_loss(logits, labels, gamma=2.0)
    np.testing.assert_allclose(focal(logits, labels, reduction="none"), expected, rtol=1e-5)
    plain = jaxbce.Loss(lambda logit, label, *, scale=2.0: scale * (logit - label))
    np.testing.assert_allclose(plain(logits, labels, reduction="none"), 2 * (logits - labels))
    assert HINGE(logits, labels, margin=None) == HINGE(logits, labels)
    in_place = jaxbce.Loss(lambda logit, label, scale, /: scale * (logit - label), ("scale",))
    got = in_place(logits, labels, scale=2.0, reduction="none")
    np.testing.assert_allclose(got, 2 * (logits - labels))


class Scale:
    value = 1.0

    def loss(self, logit, label):
        return self.value * (logit - label) ** 2


def test_reads_what_its_function_reads_now(drawn):
    scale = Scale()
    loss = jaxbce.Loss(scale.loss)
    for value in (1.0, 3.0, 1.0):
        scale.value = value
        expected = scale.loss(drawn["logits"], drawn["labels"]).mean()
        np.testing.assert_allclose(loss(drawn["logits"], drawn["labels"]), expected, rtol=1e-6)


def test_equal_losses_are_one():
    same = jaxbce.Loss(adjusted, ["log_prior"])
    assert same == ADJUSTED
    assert hash(same) == hash(ADJUSTED)
    assert same != jaxbce.Loss(adjusted, ("prior",))


def later(logit, label, log_prior, tau=1.0):
    return jaxbce.sigmoid_binary_cross_entropy(logit + tau * log_prior, label)


def of_keywords(logit, label, *, gamma=2.0, margin=0.0):
    return (1 + gamma) * jaxbce.sigmoid_binary_cross_entropy(logit - margin, label)


def of_places(logit, label, gamma=2.0, margin=0.0):
    return of_keywords(logit, label, gamma=gamma, margin=margin)


@pytest.mark.parametrize("fn", [of_places, of_keywords], ids=["places", "keywords"])
@pytest.mark.parametrize("names", [("margin",), ("margin", "gamma"), ("gamma", "margin")], ids=str)
def test_a_parameter_is_the_argument_of_its_name(fn, names, drawn):
    logits, labels = drawn["logits"], drawn["labels"]
    numbers = {name: np.float32(i + 0.5) for i, name in enumerate(names)}
    loss = jaxbce.Loss(fn, names)
    expected = jnp.mean(fn(logits, labels, **numbers))
    np.testing.assert_allclose(loss(logits, labels, **numbers), expected, rtol=1e-6)
    rows, size = logits.shape
    per_label = tuple(jnp.full(size, number) for number in numbers.values())
    head = jaxbce.linear_loss(
        loss, jnp.eye(rows), logits, labels=labels, per_label=per_label, chunk_size=2
    )
    np.testing.assert_allclose(head, expected, rtol=1e-6)


class Unhashable:
    __hash__ = None

    def __call__(self, logit, label):
        return logit - label


X = np.zeros((2, 3), np.float32)
BAD = {
    "no function": (lambda: jaxbce.Loss("bce"), TypeError, "fn must be a function of one logit"),
    "one name": (lambda: jaxbce.Loss(hinge, "margin"), TypeError, r"a tuple of names.*\(\"margin"),
    "no name": (lambda: jaxbce.Loss(hinge, (1,)), TypeError, "parameters must be a tuple of names"),
    "taken": (lambda: jaxbce.Loss(hinge, ("weight", "slope")), ValueError, "got 'weight', which"),
    "twice": (lambda: jaxbce.Loss(hinge, ("slope", "slope")), ValueError, "got 'slope', which"),
    "too few": (
        lambda: jaxbce.Loss(adjusted)(X, X),
        ValueError,
        r"got \[\] and the arguments .*'log_prior'.*; name the others",
    ),
    "required": (lambda: ADJUSTED(X, X), TypeError, "log_prior is a required parameter"),
    "none": (lambda: ADJUSTED(X, X, log_prior=None), TypeError, "log_prior is a required"),
    "place": (
        lambda: jaxbce.Loss(hinge, ("slope", "other"))(X, X, other=1.0),
        ValueError,
        r"must be names of arguments of fn, .*'slope', 'other'.* and the arguments .*'margin'",
    ),
    "name of an argument": (
        lambda: jaxbce.Loss(lambda x, y, logits: x * logits, ("logits",)),
        ValueError,
        r"names of their own, got 'logits', which is taken; choose .* own_logits",
    ),
    "misspelt": (
        lambda: jaxbce.Loss(hinge, ("margn",))(X, X, margn=1.0),
        ValueError,
        r"must be names of arguments of fn, .*'margn'",
    ),
    "behind a default": (
        lambda: jaxbce.Loss(lambda x, y, tau=1.0, *rest: tau * x, ("margin",))(X, X, margin=1.0),
        ValueError,
        r"must be names of arguments of fn, .*'margin'.* and the arguments .*'tau', 'rest'",
    ),
    "order": (
        lambda: jaxbce.Loss(lambda x, y, a, b: x, ("b", "c"))(X, X, b=1.0, c=1.0),
        ValueError,
        r"in the order of fn, or all have its names, .*rename c, or keep",
    ),
    "of arrays": (
        lambda: jaxbce.Loss(lambda x, y: jax.nn.log_softmax(x) * y)(X, X),
        ValueError,
        r"must be a function of one logit and one label, which are numbers.* fails: axis -1",
    ),
    "branch": (
        lambda: jaxbce.Loss(lambda x, y: x if y == 1 else -x)(X, X),
        ValueError,
        r"must be a function of one logit and one label.* fails: Attempted boolean",
    ),
    "not hashable": (
        lambda: jaxbce.Loss(Unhashable()),
        TypeError,
        r"fn must be hashable, got Unhashable; pass its arrays as parameters",
    ),
    "not named": (
        lambda: jaxbce.Loss(later, ("tau",))(X, X, tau=1.0),
        ValueError,
        r"got \['tau'\] and the arguments .*'log_prior', 'tau'",
    ),
    "unknown": (
        lambda: ADJUSTED(X, X, log_prior=1.0, tau=1.0),
        TypeError,
        "tau is no option.*log_prior, weight, label_smoothing",
    ),
    "unknown, None": (
        lambda: ADJUSTED(X, X, log_prior=1.0, tau=None),
        TypeError,
        "tau is no option",
    ),
    "shape": (
        lambda: ADJUSTED(X, X, log_prior=np.ones(2, np.float32)),
        ValueError,
        r"log_prior of shape \(2,\) does not broadcast to logits",
    ),
    "labels": (lambda: ADJUSTED(X, X[0], log_prior=1.0), ValueError, "labels must have the shape"),
    "pair": (lambda: jaxbce.Loss(lambda x, y: (x, y))(X, X), ValueError, "one number per logit"),
    "integer": (lambda: jaxbce.Loss(lambda x, y: x > y)(X, X), TypeError, "must return floats"),
    "traced": (
        lambda: jax.grad(lambda a: jaxbce.Loss(lambda x, y: a * (x - y))(X, X))(1.0),
        ValueError,
        "must hold no traced value.*name it in parameters",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^Loss: .*{message}"):
        call()


def test_a_public_function_names_what_its_loss_requires():
    """One of the package hands None on where a user gave it None."""
    with pytest.raises(TypeError, match=r"^a_loss: log_prior is a required"):
        evaluate("a_loss", ADJUSTED, X, X, Options(), parameters={"log_prior": None})


def test_any_other_name_will_do():
    """Also one that a private function uses, and that of *arguments."""
    by_name = jaxbce.Loss(lambda x, y, name: (x - y) * name, ("name",))
    in_place = jaxbce.Loss(lambda x, y, *margin: (x - y) * margin[0], ("margin",))
    assert by_name(X, X + 1, name=2.0) == in_place(X, X + 1, margin=2.0) == -2
    unnamed = jaxbce.Loss(lambda x, y, scale=1.0, /: (x - y) * scale, ("factor",))
    mixed = jaxbce.Loss(lambda x, y, a, scale=1.0: a * (x - y) * scale, ("offset", "scale"))
    assert unnamed(X, X + 1, factor=2.0) == mixed(X, X + 1, offset=1.0, scale=2.0) == -2


def test_errors_in_the_head():
    layer = jnp.ones((1, 2)), jnp.ones((2, 3))
    positives = np.array([[1]])
    with pytest.raises(
        TypeError,
        match=r"must hold the parameter log_prior .*per_label=\(log_prior,\)",
    ):
        jaxbce.linear_loss(ADJUSTED, *layer, positives=positives)
    two = (jnp.ones(3),) * 2
    with pytest.raises(ValueError, match=re.escape("of which it has 1, got 2 arrays")):
        jaxbce.linear_loss(ADJUSTED, *layer, positives=positives, per_label=two)


BCE = jaxbce.Loss(jaxbce.sigmoid_binary_cross_entropy)
WRONG = np.float32([[0, 1, 0], [1, 2, 0]])
KEPT = np.array([[True], [False]])


@pytest.mark.parametrize(
    ("call", "weight"),
    [
        (functools.partial(BCE, X, WRONG), KEPT),
        (functools.partial(jaxbce.linear_loss, BCE, X[:, :1], X[:1], labels=WRONG), KEPT[:, 0]),
    ],
    ids=["dense", "head"],
)
def test_checked(call, weight):
    """Once: the function itself would check the label too, and knows no mask and no weight."""
    with pytest.raises(ValueError, match=r"^(Loss|linear_loss): labels must be in .* got 2.0"):
        jaxbce.checked(call)()
    for where in (KEPT, np.array([True, False, True])):
        jaxbce.checked(call)(where=where)
        jaxbce.checked(call)(where=where, weight=np.ones_like(weight, np.float32))
    jaxbce.checked(call)(weight=weight.astype(np.float32))
