"""`siglip_loss` of two towers: more texts than images, ignored texts, weights, a bias per text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composing import dense_pairs, pairs
from heads import (
    assert_close,
    every_order,
    hessian_vector_product,
    value_and_gradients,
)

import jaxbce

pytestmark = pytest.mark.usefixtures("compile_fast")

BATCH, TEXTS, WIDTH = 8, 24, 3  # on eight devices one image and three texts each
OPTIONS = {
    "more texts": (),
    "positives": ("positives",),
    "ignored": ("ignored",),
    "weight": ("weight",),
    "text_bias": ("text_bias",),
    "all": ("positives", "ignored", "weight", "text_bias"),
}
PLACES = {
    "one chunk": {"chunk_size": TEXTS},
    "chunks": {"chunk_size": 7},
    "ring": {"chunk_size": 2, "axis": "all"},
}
every_place = pytest.mark.parametrize(
    "place", [pytest.param(p, marks=[pytest.mark.thorough] * (p == "ring")) for p in PLACES]
)


def ours_in(place):
    options = dict(PLACES[place])
    if "axis" in options:
        options["mesh"] = jax.make_mesh((8,), ("all",), (jax.sharding.AxisType.Auto,))
    return functools.partial(pairs, **options)


def draw(rng, names=OPTIONS["all"], dtype=np.float32):
    """Ids of every device, duplicates, padding, and positives that are ignored."""
    positives = rng.integers(-1, TEXTS, (BATCH, 3)).astype(np.int32)
    ignored = rng.integers(-1, TEXTS, (BATCH, 5)).astype(np.int32)
    ignored[::2, 0] = positives[::2, 0]
    floats = {
        "image_embeddings": rng.normal(size=(BATCH, WIDTH)),
        "text_embeddings": rng.normal(size=(TEXTS, WIDTH)),
        "log_scale": np.array(0.5),
        "bias": np.array(-1.0),
        "weight": np.array([0, *rng.uniform(0.5, 2, BATCH - 2), 0]),
        "text_bias": rng.normal(size=TEXTS),
    }
    drawn = {name: jnp.asarray(array, dtype) for name, array in floats.items()}
    drawn |= {"positives": jnp.asarray(positives), "ignored": jnp.asarray(ignored)}
    return {name: drawn[name] for name in drawn if name in names or name not in OPTIONS["all"]}


def wide(arguments):
    """In float64, which needs `jax.enable_x64`."""
    return {
        name: jnp.asarray(np.asarray(array, np.float64)) if is_float(array) else array
        for name, array in arguments.items()
    }


def is_float(array):
    return jnp.issubdtype(array.dtype, jnp.floating)


@every_place
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
def test_value_and_gradients_are_those_of_all_pairs(names, place, rng):
    arguments = draw(rng, names)
    with jax.enable_x64(True):
        expected = value_and_gradients(dense_pairs, wide(arguments), 0.7)
    got = value_and_gradients(ours_in(place), arguments, 0.7)
    assert_close(got, expected)


@every_place
def test_each_gradient_has_the_dtype_and_shape_of_its_argument(place, rng):
    """Those of bfloat16 are rounded once, at the end."""
    arguments = draw(rng, dtype=jnp.bfloat16)
    with jax.enable_x64(True):
        expected = value_and_gradients(dense_pairs, wide(arguments), 0.7)
    value, gradients = value_and_gradients(ours_in(place), arguments, 0.7)
    assert value.dtype == jnp.float32
    for name, gradient in gradients.items():
        assert (gradient.dtype, gradient.shape) == (jnp.bfloat16, arguments[name].shape)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    assert_close(gradients, expected[1], 2**-8)


@pytest.mark.parametrize(
    "wide_ones",
    [("weight",), ("text_bias",), ("text_embeddings", "text_bias")],
    ids=lambda names: " and ".join(names),
)
def test_dtypes_may_differ(wide_ones, rng):
    arguments = draw(rng, dtype=jnp.bfloat16)
    arguments |= {name: arguments[name].astype(np.float32) for name in wide_ones}
    _, gradients = value_and_gradients(ours_in("chunks"), arguments)
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype


@pytest.mark.thorough
@every_place
@every_order
@pytest.mark.parametrize("weight", ["some 0", "all 0"])
def test_second_derivatives_where_a_weight_is_zero(weight, order, place, rng):
    point, along = draw(rng), draw(rng)
    if weight == "all 0":
        point["weight"] = jnp.zeros(BATCH)
    fixed = {name: array for name, array in point.items() if not is_float(array)}

    def product(loss, change):
        moving = [
            change({n: array for n, array in each.items() if is_float(array)})
            for each in (point, along)
        ]
        return hessian_vector_product(lambda moving: loss(moving | fixed), *moving, order)

    with jax.enable_x64(True):
        expected = product(dense_pairs, wide)
    assert np.any(expected["weight"])
    assert_close(product(ours_in(place), lambda moving: moving), expected, 2e-5)


# What is hidden, as one who finds it would write it: arguments -> arguments with junk in them.
def text_that_all_ignore(arguments, junk):
    ids = jnp.concatenate([arguments["ignored"], jnp.full((BATCH, 1), 9)], axis=1)
    dirty = arguments | {
        "text_embeddings": arguments["text_embeddings"].at[9, 1].set(junk),
        "text_bias": arguments["text_bias"].at[9].set(junk),
    }
    return arguments | {"ignored": ids}, dirty | {"ignored": ids}


def image_of_weight_zero(arguments, junk):
    images = arguments["image_embeddings"]
    return arguments, arguments | {"image_embeddings": images.at[0, 1].set(junk)}


def image_that_ignores_all(arguments, junk):
    ids = jnp.full((BATCH, TEXTS), -1).at[3].set(jnp.arange(TEXTS))
    arguments |= {"ignored": ids}
    images = arguments["image_embeddings"]
    return arguments, arguments | {"image_embeddings": images.at[3, 1].set(junk)}


def text_that_no_weighted_image_sees(arguments, junk):
    ids = jnp.full((BATCH, 1), 9).at[jnp.array([0, BATCH - 1])].set(-1)
    texts = arguments["text_embeddings"]
    arguments |= {"ignored": ids}
    return arguments, arguments | {"text_embeddings": texts.at[9, 1].set(junk)}


HIDDEN = [
    text_that_all_ignore,
    image_of_weight_zero,
    image_that_ignores_all,
    text_that_no_weighted_image_sees,
]


@pytest.mark.thorough
@every_place
@pytest.mark.parametrize("hide", HIDDEN, ids=lambda hide: hide.__name__)
def test_what_is_hidden_reaches_no_gradient(hide, place, rng):
    """Be it NaN, infinite, or so large that the logits overflow."""
    drawn = draw(rng) | {"log_scale": jnp.float32(2)}
    weightless = np.asarray(drawn["weight"]) == 0
    evaluate = jax.jit(functools.partial(value_and_gradients, ours_in(place)))

    def evaluated(arguments):
        value, gradients = evaluate(arguments)
        # By the weight that hides it there is no derivative.
        return value, gradients | {"weight": np.where(weightless, 0, gradients["weight"])}

    for junk in (np.nan, np.inf, 3e38):
        clean, dirty = hide(dict(drawn), junk)
        jax.tree.map(np.testing.assert_array_equal, evaluated(dirty), evaluated(clean))


def test_an_image_that_is_ignored_stays_in_the_divisor(rng):
    """As one of weight 0 does: the loss of the others does not depend on it."""
    arguments = draw(rng, ())
    ids = jnp.full((BATCH, TEXTS), -1).at[3].set(jnp.arange(TEXTS))
    weight = jnp.ones(BATCH).at[3].set(0)
    np.testing.assert_allclose(
        pairs(arguments | {"ignored": ids}), pairs(arguments | {"weight": weight}), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["ignored", "weight", "text_bias"])
def test_neutral_options_change_nothing(name, rng):
    neutral = {
        "ignored": jnp.full((BATCH, 2), -1),
        "weight": jnp.ones(BATCH, jnp.int32),
        "text_bias": jnp.zeros(TEXTS),
    }
    arguments = draw(rng, ())
    expected = value_and_gradients(pairs, arguments)
    value, gradients = value_and_gradients(pairs, arguments | {name: neutral[name]})
    gradients.pop(name, None)
    assert_close((value, gradients), expected, 1e-6)


IMAGES, OTHERS = np.ones((4, 2), np.float32), np.ones((6, 2), np.float32)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (IMAGES[:3], {}, ValueError, "at least as many rows .* got 3 texts and 4 images; append"),
        (OTHERS[:, :1], {}, ValueError, r"\(texts, width\) .* \(4, 2\), got \(6, 1\); project"),
        (OTHERS[0], {}, ValueError, r"text_embeddings must have shape .* got \(2,\)"),
        (OTHERS, {"weight": OTHERS[:, 0]}, ValueError, r"weight must .* \(batch,\) = \(4,\), got"),
        (OTHERS, {"weight": 2.0}, ValueError, r"weight must .*broadcast_to\(weight, \(4,\)\)"),
        (OTHERS, {"text_bias": IMAGES[:, 0]}, ValueError, r"text_bias .* \(texts,\) = \(6,\), got"),
        (OTHERS, {"text_bias": np.ones(6, int)}, TypeError, "text_bias must be floating-point"),
        (OTHERS, {"ignored": np.ones((6, 1), int)}, ValueError, r"ignored .*image_embeddings"),
        (OTHERS, {"ignored": np.ones(4, int)}, ValueError, r"one id per row is ignored\[..., None"),
        (OTHERS, {"ignored": IMAGES}, TypeError, "ignored must be integer label ids"),
        (
            OTHERS,
            {"ignored": [[1], [], [2], []]},
            TypeError,
            "ignored must be .*positives_from_rows",
        ),
    ],
    ids=[
        "fewer texts",
        "another width",
        "one text",
        "weight per text",
        "one weight",
        "text_bias per image",
        "integer text_bias",
        "ignored per text",
        "one ignored id",
        "float ignored",
        "lists of ignored",
    ],
)
def test_errors(texts, options, error, message):
    with pytest.raises(error, match=f"siglip_loss: .*{message}"):
        jaxbce.siglip_loss(IMAGES, texts, 0.0, 0.0, **options)


@pytest.mark.parametrize("argument", ["positives", "ignored"])
def test_checked_names_an_id_of_no_text(argument):
    """Not of an image of weight 0, of which nothing counts."""
    ids = np.array([[5], [-1], [0], [6]])

    def loss(weight):
        options = {argument: ids, "weight": weight}
        return jaxbce.siglip_loss(IMAGES, OTHERS, 0.0, 0.0, **options)

    with pytest.raises(ValueError, match=rf"{argument} must be in \[0, 6\).* got 6"):
        jaxbce.checked(loss)(np.ones(4, np.float32))
    if argument == "positives":
        jaxbce.checked(loss)(np.array([1, 1, 1, 0], np.float32))


@pytest.mark.parametrize(
    ("rows", "texts", "size"), [(8, 12, 12), (4, 16, 4)], ids=["texts", "images"]
)
def test_the_axis_of_a_ring_divides_images_and_texts(rows, texts, size):
    mesh = jax.make_mesh((8,), ("all",), (jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match=rf"siglip_loss: axis 'all' has 8 .* size {size} .* pad"):
        jaxbce.siglip_loss(
            jnp.ones((rows, 2)), jnp.ones((texts, 2)), 0.0, 0.0, mesh=mesh, axis="all"
        )
