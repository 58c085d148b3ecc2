"""The chunked head with masks, and with any elementwise loss, against plain jnp in float64."""

import dataclasses
import functools

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composing import LABELS, ROWS, WIDTH, dense_head, draw_head, own_loss
from heads import assert_close, head, value_and_gradients
from losses import FIRST, with_margin
from test_linear import in_float64, lowered

import jaxbce

pytestmark = pytest.mark.usefixtures("compile_fast")

REDUCTIONS = ["mean", "weighted_mean", "sum", "batchmean", "none"]


def masks(rng):
    """Each kind, with a row and a label of which nothing is kept where it can say so."""
    where = rng.random((ROWS, LABELS)) < 0.6
    where[1], where[:, 2] = False, False
    ignored = np.array([[2, 5, 2, -1], [*range(3), LABELS], [-7, 2**31 - 1, 6, 0]], np.int32)
    return {
        "where": {"where": where},
        "labels": {"where": where[0]},
        "rows": {"where": where[:, :1]},
        "one": {"where": np.array(False)},
        "ignored": {"ignored": ignored},
        "where and ignored": {"where": where, "ignored": ignored},
        "labels and ignored": {"where": where[0], "ignored": ignored},
        "all ignored": {"ignored": np.tile(np.arange(LABELS, dtype=np.int32), (ROWS, 1))},
    }


MASKS = list(masks(np.random.default_rng(0)))
CASES = [(mask, "mean") for mask in MASKS]
CASES += [("where and ignored", reduction) for reduction in REDUCTIONS[1:]]
OPTIONS = ("bias", "weight", "pos_weight", "label_smoothing")
CASES = [(*case, OPTIONS) for case in CASES] + [("where", "sum", ()), ("where", "mean", ())]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mask", "reduction", "options"), CASES, ids=["-".join([*c[:2], *c[2][:1]]) for c in CASES]
)
def test_what_is_masked_is_left_out(mask, reduction, options, rng):
    arguments = draw_head(rng, names=(*options, "positives")) | masks(rng)[mask]
    cotangent = rng.normal(size=ROWS) if reduction == "none" else np.float64(-1.7)
    loss = functools.partial(head, reduction=reduction, chunk_size=3)
    expected = in_float64(functools.partial(dense_head, reduction=reduction), arguments, cotangent)
    assert_close(value_and_gradients(loss, arguments, cotangent), expected, 2e-6)


def test_leading_axes_of_a_mask_are_those_of_the_features(rng):
    shape = (2, 3)
    features, kernel = rng.normal(size=(*shape, WIDTH)), rng.normal(size=(WIDTH, LABELS))
    positives, ignored = rng.integers(0, LABELS, (2, *shape, 2))
    for where in (rng.random((3, 1)) < 0.5, rng.random((2, 1, LABELS)) < 0.5):
        options = {"positives": positives, "ignored": ignored, "where": where}
        got = jaxbce.linear_bce_with_logits(
            np.float32(features), np.float32(kernel), **options, reduction="batchmean"
        )
        keep = np.broadcast_to(where, (*shape, LABELS)) & ~np.bool(
            jaxbce.multi_hot(ignored, LABELS)
        )
        expected = jaxbce.bce_with_logits(
            np.float32(features @ kernel),
            jaxbce.multi_hot(positives, LABELS),
            where=keep,
            reduction="batchmean",
        )
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_garbage_behind_a_mask_reaches_no_gradient(rng):
    """A row and a label that nothing keeps, in every argument that they have a part in."""
    names = ("bias", "weight", "pos_weight", "labels")
    clean = draw_head(rng, names=names) | masks(rng)["where and ignored"]
    dirty = dict(clean)
    for name, place in {
        "features": (1,),
        "weight": (1,),
        "kernel": (slice(None), 2),
        "bias": (2,),
        "pos_weight": (2,),
        "labels": (slice(None), 2),
    }.items():
        clean[name] = clean[name].at[place].set(0)
        dirty[name] = dirty[name].at[place].set(jnp.nan)
    got, expected = (
        value_and_gradients(functools.partial(head, chunk_size=3), given)
        for given in (dirty, clean)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_checked_ignores_what_is_masked(rng):
    arguments = draw_head(rng, names=("labels",))
    arguments["labels"] = arguments["labels"].at[1, 2].set(7)
    check = jaxbce.checked(head)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\], got 7"):
        check(arguments)
    check(arguments | {"ignored": np.array([[0], [2], [-1]])})
    check(arguments | {"where": np.arange(LABELS) != 2})
    check(arguments | {"weight": np.float32([1, 0, 1])})
    check(arguments | {"where": np.bool(True), "weight": np.float32([1, 0, 1])})
    with pytest.raises(ValueError, match=r"ignored must be in .* got 9"):
        check(arguments | {"ignored": np.array([[0], [9], [-1]])})


def test_ignored_holds_nothing_of_the_size_of_the_labels():
    batch, chunk_size = 256, 4096

    def gradients(features, kernel, bias, positives):
        def loss(features, kernel, bias):
            return jaxbce.linear_bce_with_logits(
                features,
                kernel,
                bias,
                positives=positives,
                ignored=positives,
                chunk_size=chunk_size,
            )

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(features, kernel, bias)

    small, large = (
        lowered(gradients, batch, num_labels=labels).compile().memory_analysis().temp_size_in_bytes
        for labels in (131_072, 1_048_576)
    )
    assert small <= 6 * batch * chunk_size * 4
    assert abs(large - small) <= 4 * 2**20


# --- any loss ------------------------------------------------------------------------------------


def of_jaxbce(fn, **options):
    return functools.partial(fn, reduction="none", **options)


LOSSES = {
    "bce": of_jaxbce(jaxbce.bce_with_logits, label_smoothing=0.1),
    **{
        name: jaxbce.Loss(loss.unreduced)
        for name, loss in FIRST.items()
        if loss.own_kernel and not loss.probs
    },
    "optax": optax.sigmoid_binary_cross_entropy,
    "optax focal": optax.sigmoid_focal_loss,
    "focus that is constant": of_jaxbce(jaxbce.asymmetric_loss, stop_focus_gradient=True),
    "tanh": lambda logits, labels: (jnp.tanh(logits) - labels) ** 2,
    "probit": lambda logits, labels: (jax.scipy.stats.norm.cdf(logits) - labels) ** 2,
    "gelu": lambda logits, labels: jax.nn.gelu(logits) - labels * logits,
    "hinge": lambda logits, labels: jnp.maximum(0, 1 - (2 * labels - 1) * logits),
}


@pytest.mark.thorough
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_any_loss_is_that_of_the_logits(loss, rng):
    unreduced = {"reduction": "none"} if isinstance(loss, jaxbce.Loss) else {}
    arguments = draw_head(rng, names=("bias", "weight", "positives"))

    def ours(arguments):
        given = dict(arguments)
        layer = [given.pop(name) for name in ("features", "kernel", "bias")]
        return jaxbce.linear_loss(loss, *layer, **given, chunk_size=3)

    def dense(arguments):
        given = {name: value for name, value in arguments.items() if name != "bias"}
        given["kernel"] = jnp.concatenate([given["kernel"], arguments["bias"][None]])
        ones = jnp.ones_like(given["features"][:, :1])
        given["features"] = jnp.concatenate([given["features"], ones], axis=1)
        return dense_head(given, formula=lambda x, y, _: loss(x, y, **unreduced))

    assert_close(value_and_gradients(ours, arguments), value_and_gradients(dense, arguments), 2e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_any_loss_is_welcome_on_explicit_axes(loss, rng):
    """Also where arrays were made before `jax.set_mesh`, and in a gradient without `jax.jit`."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)
    drawn = draw_head(rng, names=("positives",))
    layer = drawn.pop("features"), drawn.pop("kernel")

    def total(kernel):
        return jaxbce.linear_loss(loss, layer[0], kernel, **drawn, chunk_size=3)

    expected = jax.value_and_grad(total)(layer[1])
    with jax.set_mesh(mesh):
        got = jax.value_and_grad(total)(layer[1])
    assert_close(got, expected, 1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("reduction", ["weighted_mean", "none"])
def test_numbers_per_label_have_gradients(reduction, rng):
    names = ("bias", "weight", "margin", "positives")
    arguments = draw_head(rng, names=names) | masks(rng)["where and ignored"]
    cotangent = rng.normal(size=ROWS) if reduction == "none" else np.float64(0.3)
    dense = functools.partial(
        dense_head, reduction=reduction, formula=with_margin, parameter="margin"
    )
    got = value_and_gradients(
        functools.partial(own_loss, reduction=reduction), arguments, cotangent
    )
    assert_close(got, in_float64(dense, arguments, cotangent), 2e-6)


def test_many_numbers_per_label_keep_their_order(rng):
    """Names with numbers of several digits sort in another order than the numbers."""
    arguments = draw_head(rng, names=("positives",))
    numbers = [jnp.full(LABELS, float(i)) for i in range(12)]

    def loss(logits, labels, *numbers):
        return sum(10.0**-i * number[None] for i, number in enumerate(numbers)) + 0 * logits

    got = jaxbce.linear_loss(loss, **arguments, per_label=tuple(numbers))
    expected = sum(10.0**-i * i for i in range(12))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_loss_sees_a_chunk_in_the_dtype_of_the_result(rng):
    arguments = draw_head(rng, names=("positives", "margin"))
    margin = arguments.pop("margin")
    seen = set()

    def loss(logits, labels, margin):
        seen.add((*(str(x.dtype) for x in (logits, labels, margin)), logits.shape == labels.shape))
        return logits * labels + margin[None]

    features, kernel = (arguments[name].astype(jnp.bfloat16) for name in ("features", "kernel"))
    for chunk_size in (2, 3):
        jaxbce.linear_loss(
            loss,
            features,
            kernel,
            positives=arguments["positives"],
            per_label=(margin.astype(jnp.bfloat16),),
            chunk_size=chunk_size,
        )
    assert seen == {("float32", "float32", "float32", True)}


BAD = {
    "a mean": (
        jaxbce.focal_loss,
        (),
        ValueError,
        r"one number per logit, of shape \(2, 3\) .*jaxbce.Loss\(loss\) of one",
    ),
    "integers": (lambda x, y: x > y, (), TypeError, "loss must return floats, got bool"),
    "no function": ("bce", (), TypeError, r"loss must be a function of \(logits, labels"),
    "an array": (
        LOSSES["bce"],
        np.ones(3),
        TypeError,
        r"must be a tuple of arrays.*\(per_label,\)",
    ),
    "its shape": (
        lambda x, y, m: x,
        (np.ones(3),),
        ValueError,
        r"per_label\[0\] must have shape \(labels,\) = \(7,\), got \(3,\)",
    ),
}


@pytest.mark.parametrize(("loss", "per_label", "error", "message"), BAD.values(), ids=BAD)
def test_errors_of_the_loss(loss, per_label, error, message, rng):
    drawn = draw_head(rng, names=("positives",))
    layer = drawn.pop("features"), drawn.pop("kernel")
    with pytest.raises(error, match=f"linear_loss: .*{message}"):
        jaxbce.linear_loss(loss, *layer, per_label=per_label, **drawn)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad], ids=["jit", "grad"])
def test_a_loss_that_holds_a_traced_value_is_refused(transform, rng):
    """Its gradient would be lost, or the value of another call used."""
    drawn = draw_head(rng, names=("positives",))
    layer = drawn.pop("features"), drawn.pop("kernel")

    def program(scale):
        return jaxbce.linear_loss(lambda x, y: scale * (x - y) ** 2, *layer, **drawn)

    with pytest.raises(ValueError, match=r"must hold no traced value.*jax.numpy.full\(labels"):
        transform(program)(2.0)


class Margin:
    """Its method is equal to itself whatever its attributes are."""

    value = 1.0

    def loss(self, logits, labels):
        return (logits - self.value * labels) ** 2

    def __call__(self, logits, labels):
        return jax.nn.softplus(self.loss(logits, labels))


def held(margin):
    return lambda logits, labels: margin.loss(logits, labels)


STALE = {
    "bound method": lambda margin: margin.loss,
    "object": lambda margin: margin,
    "closure": held,
    "partial": lambda margin: functools.partial(Margin.loss, margin),
    "array": lambda margin: margin.loss,
}


@pytest.mark.thorough
@pytest.mark.parametrize("of", ["linear_loss", "linear_update"])
@pytest.mark.parametrize("kind", STALE)
def test_a_loss_reads_what_its_object_holds_now(kind, of, rng):
    """Without jit, as any Python function does."""
    drawn = draw_head(rng, names=("positives",))
    features, kernel, positives = drawn["features"], drawn["kernel"], drawn["positives"]
    margin = Margin()
    loss = STALE[kind](margin)
    optimizer = optax.sgd(0.0)

    def total():
        if of == "linear_loss":
            return jaxbce.linear_loss(loss, features, kernel, positives=positives)
        params = {"kernel": kernel}
        state = optimizer.init(params)
        return jaxbce.linear_update(
            optimizer, features, params, state, loss=loss, positives=positives
        ).loss

    for value in (1.0, 2.0, 2.0, 1.0):
        margin.value = np.float32(value) * np.ones((1, 1), np.float32) if kind == "array" else value
        dense = loss(features @ kernel, jaxbce.multi_hot(positives, LABELS))
        np.testing.assert_allclose(total(), jnp.mean(dense), rtol=1e-6)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def with_slopes_up_to(x, limit):
    return x


with_slopes_up_to.defvjp(lambda x, _: (x, None), lambda limit, _, g: (jnp.clip(g, -limit, limit),))


@jax.custom_jvp
def with_slope_times(x, factor):
    return x


with_slope_times.defjvp(
    lambda primals, tangents: (primals[0], primals[1] * tangents[0]), symbolic_zeros=False
)


class Clipped:
    """Its value is the same for every limit; its derivative is not."""

    limit = 1.0

    def vjp(self, x, y):
        return optax.sigmoid_binary_cross_entropy(with_slopes_up_to(x, self.limit), y)

    def jvp(self, x, y):
        return optax.sigmoid_binary_cross_entropy(with_slope_times(x, self.limit), y)

    def second(self, x, y):
        """Only its second derivative reads the limit."""
        slope = jax.custom_jvp(jnp.tanh)
        slope.defjvp(lambda x, t: (jnp.tanh(*x), self.limit * t[0]))
        value = jax.custom_jvp(lambda x: x)
        value.defjvp(lambda x, t: (x[0], slope(*x) * t[0]))
        return value(x) - x * y

    def alone(self, x, y):
        """Only where the logits are differentiated alone its derivative reads the limit."""

        def rule(primals, tangents):
            by_y = not isinstance(tangents[1], jax.custom_derivatives.SymbolicZero)
            return primals[0], tangents[0] * (1.0 if by_y else self.limit)

        value = jax.custom_jvp(lambda x, y: x)
        value.defjvp(rule, symbolic_zeros=True)
        return value(x, y) ** 2

    def callback(self, x, y):
        limit = self.limit
        kind = jax.ShapeDtypeStruct((), jnp.float32)
        factor = jax.pure_callback(lambda: np.float32(limit), kind)
        return optax.sigmoid_binary_cross_entropy(x, y) * factor


@pytest.mark.thorough
@pytest.mark.parametrize("make", [lambda loss: loss, jaxbce.Loss], ids=["function", "Loss"])
@pytest.mark.parametrize("rule", ["vjp", "jvp", "callback"])
def test_a_rule_of_a_derivative_reads_what_its_object_holds_now(rule, make, rng):
    drawn = draw_head(rng, names=("positives",))
    features, kernel, positives = drawn["features"], drawn["kernel"], drawn["positives"]
    clipped = Clipped()
    loss = make(getattr(clipped, rule))
    labels = jaxbce.multi_hot(positives, LABELS)

    def of_head(kernel):
        return jaxbce.linear_loss(loss, features, kernel, positives=positives, reduction="sum")

    def dense(kernel):
        return jnp.sum(getattr(clipped, rule)(features @ kernel, labels))

    for clipped.limit in (1.0, 0.125, 1.0):
        if rule == "callback":  # which has no derivative
            np.testing.assert_allclose(of_head(kernel), dense(kernel), rtol=1e-6)
        else:
            assert_close(jax.grad(of_head)(kernel), jax.grad(dense)(kernel))


@pytest.mark.parametrize("rule", ["second", "alone"])
def test_a_rule_of_a_rare_derivative_reads_what_its_object_holds_now(rule, rng):
    logits, labels = rng.normal(size=(2, 3)), rng.integers(0, 2, (2, 3))
    features, kernel = np.eye(2, dtype=np.float32), np.float32(logits)
    clipped = Clipped()
    loss = getattr(clipped, rule)
    forms = {
        "dense": lambda kernel: jnp.sum(loss(kernel, np.float32(labels))),
        "Loss": lambda kernel: jaxbce.Loss(loss)(kernel, labels, reduction="sum"),
        "head": lambda kernel: jaxbce.linear_loss(
            loss, features, kernel, labels=labels, reduction="sum"
        ),
    }
    if rule == "alone":  # the head always differentiates both
        forms.pop("head")
    for clipped.limit in (1.0, 0.125, 1.0):
        slopes = []
        for form in forms.values():
            gradient = jax.grad(form)
            if rule == "second":
                gradient = jax.grad(lambda kernel, form=form: jnp.sum(jax.grad(form)(kernel)))
            slopes.append(gradient(kernel))
        for got in slopes[1:]:
            assert_close(got, slopes[0])


def test_a_rule_of_a_derivative_that_holds_a_traced_value_is_refused(rng):
    drawn = draw_head(rng, names=("positives",))
    layer = drawn.pop("features"), drawn.pop("kernel")

    def program(limit):
        loss = jax.custom_vjp(lambda x, y: (x - y) ** 2)
        loss.defvjp(lambda x, y: ((x - y) ** 2, None), lambda _, g: (limit * g, g))
        return jax.grad(lambda kernel: jaxbce.linear_loss(loss, layer[0], kernel, **drawn))(
            layer[1]
        )

    with pytest.raises(ValueError, match="must hold no traced value"):
        jax.jit(program)(2.0)


def counting(x, y):
    jax.experimental.io_callback(print, None)
    return x - y


def normed(x):
    """Its slopes are divided by the largest of them."""
    return x


normed = jax.custom_vjp(normed)
normed.defvjp(lambda x: (x, None), lambda _, g: (g / jnp.max(jnp.abs(g)),))
NOT_ELEMENTWISE = {
    "weights of rows": lambda x, y: jnp.arange(1.0, 3.0)[:, None] * (x - y),
    "mean of rows": lambda x, y: (1 - y.mean(0, keepdims=True)) * x,
    "softmax": lambda x, y: -y * jax.nn.log_softmax(x),
    "weights of labels": lambda x, y: jnp.ones((1, 3)) * (x - y),
    "order": lambda x, y: jnp.sort(x, axis=1) - y,
    "place": lambda x, y: x - y * jax.lax.broadcasted_iota(jnp.float32, x.shape, 1),
    "size": lambda x, y: (x - y) / x.shape[1],
    "noise": lambda x, y: x - y * jax.random.normal(jax.random.key(0), x.shape),
    "effect": counting,
    "slopes": lambda x, y: (normed(x) - y) ** 2,
}


@pytest.mark.parametrize("loss", NOT_ELEMENTWISE.values(), ids=NOT_ELEMENTWISE)
def test_a_function_that_mixes_logits_is_refused(loss, rng):
    drawn = draw_head(rng, names=("positives",))
    layer = drawn.pop("features"), drawn.pop("kernel")
    message = "change nothing outside" if loss is counting else r"apart.*jaxbce\.Loss\(function\)"
    with pytest.raises(ValueError, match=f"linear_loss: loss .*{message}"):
        jaxbce.linear_loss(loss, *layer, **drawn)


OF_A_SIZE = {
    "of one label": lambda x, y: (x - y) ** 2 * (2.0 if x.shape[1] == 1 else 1.0),
    "of one row": lambda x, y: (x - y) ** 2 * (1.0 if x.shape[0] > 1 else 100.0),
    "of all rows": lambda x, y: x - y - (x.mean(0, keepdims=True) if x.shape[0] >= 6 else 0.0),
    "of the chunk": lambda x, y: (x - y) ** 2 * (2.0 if x.shape[1] == 4 else 1.0),
    "of many labels": lambda x, y: jax.nn.softmax(x) - y if x.shape[1] > 7 else x - y,
    "of one row, in an option": lambda x, y: jnp.square(
        jax.lax.reduce_precision(x, 8, 7 if x.shape[0] == 1 else 23) - y
    ),
    "of all": lambda x, y: (x - y) ** 2 / (x.shape[1] if x.shape[1] == 9 else 1),
}


@pytest.mark.parametrize("loss", OF_A_SIZE.values(), ids=OF_A_SIZE)
def test_a_function_that_asks_for_its_size_is_refused(loss, rng):
    """Whatever the size at which it is another one: of a chunk, of all labels, of the rows."""
    features, kernel = rng.normal(size=(6, 3)), rng.normal(size=(3, 9))
    labels = rng.integers(0, 2, (6, 9))

    def in_chunks():
        for chunk_size in (4, 8, 9):
            jaxbce.linear_loss(loss, features, kernel, labels=labels, chunk_size=chunk_size)

    with pytest.raises(ValueError, match=r"does across (labels|rows)"):
        in_chunks()


@dataclasses.dataclass
class Unhashable:
    scale: float = 1.0

    def __call__(self, x, y):
        return self.scale * (x - y)


def test_a_loss_that_is_not_hashable_is_named(rng):
    drawn = draw_head(rng, names=("positives",))
    layer = drawn.pop("features"), drawn.pop("kernel")
    with pytest.raises(TypeError, match=r"loss must be hashable, got Unhashable; .*per_label"):
        jaxbce.linear_loss(Unhashable(), *layer, **drawn)


MASK_ERRORS = {
    "floats": ({"where": np.ones(LABELS)}, TypeError, "where must be bool"),
    "where": ({"where": np.ones(3, bool)}, ValueError, r"where of shape \(3,\) does not broadcast"),
    "rows": ({"ignored": np.ones((2, 1), int)}, ValueError, "ignored must have shape .* features"),
    "ids": ({"ignored": np.ones((ROWS, 1))}, TypeError, "ignored must be integer label ids"),
}


@pytest.mark.parametrize(("options", "error", "message"), MASK_ERRORS.values(), ids=MASK_ERRORS)
def test_errors_of_masks(options, error, message, rng):
    with pytest.raises(error, match=f"linear_bce_with_logits: {message}"):
        head(draw_head(rng, names=("positives",)) | options)


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(jaxbce.bce_with_logits, pos_weight=np.ones(16), reduction="none"),
        jaxbce.BCEWithLogitsLoss(pos_weight=np.ones(16), reduction="none"),
        lambda logits, labels: np.ones(16, np.float32) * (logits - labels),
    ],
    ids=["partial", "module", "function"],
)
def test_numbers_of_all_labels_inside_a_loss_are_an_error_that_names_per_label(loss):
    layer = jnp.ones((4, 3)), jnp.ones((3, 16))
    with pytest.raises(
        ValueError, match=r"linear_loss: loss must be a function of a chunk.*per_label"
    ):
        jaxbce.linear_loss(loss, *layer, positives=jnp.zeros((4, 1), jnp.int32))
