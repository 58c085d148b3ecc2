"""A kernel that lies as a table, [labels, width], against the same kernel the other way round."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composing import draw_head
from heads import assert_close, head, value_and_gradients
from jax.sharding import NamedSharding, PartitionSpec
from test_update import OPTIMIZERS, split

import jaxbce

pytestmark = pytest.mark.usefixtures("compile_fast")

NAMES = ("bias", "weight", "pos_weight", "positives", "where", "ignored")
PLACES = {
    "one chunk": {"chunk_size": 24},
    "chunks": {"chunk_size": 5},
    "mesh": {"chunk_size": 4, "batch_axis": "batch", "label_axis": "labels"},
    "labels": {"chunk_size": 4, "label_axis": ("batch", "labels")},
}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


def turned(arguments):
    """The kernel is turned inside, so that its gradient comes back as the other one's does."""
    return arguments | {"kernel": jnp.swapaxes(arguments["kernel"], 0, 1)}


def devices(place, mesh):
    return place | ({"mesh": mesh} if "label_axis" in place else {})


@pytest.mark.newest
@every_place
@pytest.mark.parametrize("reduction", ["weighted_mean", "none"])
def test_the_loss_and_its_gradients(place, reduction, mesh, rng):
    arguments = draw_head(rng, 8, 24, NAMES)
    cotangent = rng.normal(size=8) if reduction == "none" else np.float64(-1.7)
    options = {"reduction": reduction} | devices(place, mesh)

    def table(arguments):
        return head(turned(arguments), **options, transpose_kernel=True)

    expected = value_and_gradients(functools.partial(head, **options), arguments, cotangent)
    assert_close(value_and_gradients(table, arguments, cotangent), expected, 2e-6)


@pytest.mark.newest
@every_place
def test_second_derivatives(place, mesh, rng):
    arguments = draw_head(rng, 8, 24, NAMES)
    arguments["weight"] = arguments["weight"].at[1].set(0)
    along = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), arguments)

    @functools.partial(jax.jit, static_argnums=0)
    def curvature(is_table):
        def total(kernel, weight):
            given = arguments | {"kernel": kernel, "weight": weight}
            given = turned(given) if is_table else given
            return head(given, transpose_kernel=is_table, **devices(place, mesh))

        def slope(kernel, weight):
            by_kernel, by_weight = jax.grad(total, (0, 1))(kernel, weight)
            return jnp.vdot(by_kernel, along["kernel"]) + jnp.vdot(by_weight, along["weight"])

        return jax.grad(slope, (0, 1))(arguments["kernel"], arguments["weight"])

    assert_close(curvature(True), curvature(False), 2e-6)


@every_place
def test_the_top_labels(place, mesh, rng):
    drawn = draw_head(rng, 8, 24, ("bias",))
    layer = drawn["features"], drawn["kernel"], drawn["bias"]
    table = layer[0], layer[1].T, layer[2]
    options = {"k": 3} | devices(place, mesh)
    got = jaxbce.linear_top_k(*table, **options, transpose_kernel=True)
    for own, other in zip(got, jaxbce.linear_top_k(*layer, **options), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-6)


@pytest.mark.newest
@every_place
def test_any_loss(place, mesh, rng):
    drawn = draw_head(rng, 8, 24, ("bias", "positives", "margin"))
    margin = drawn.pop("margin")
    features, kernel, bias = (drawn.pop(name) for name in ("features", "kernel", "bias"))
    loss = jaxbce.Loss(lambda x, y, m: jaxbce.softplus(x - y * m) - y * x, ("margin",))

    def total(kernel, **options):
        given = drawn | options | devices(place, mesh)
        return jaxbce.linear_loss(loss, features, kernel, bias, per_label=(margin,), **given)

    got = jax.grad(functools.partial(total, transpose_kernel=True))(kernel.T)
    assert_close(got.T, jax.grad(total)(kernel), 2e-6)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("optimizer", "place"),
    [*((name, "chunks") for name in OPTIMIZERS), *(("adamw", place) for place in PLACES)],
    ids="-".join,
)
def test_a_step(optimizer, place, mesh, rng):
    """Three of them: parameters, moments and the gradient of the features."""
    features, params, given = split(draw_head(rng, 8, 24, NAMES))
    optimizer, place = OPTIMIZERS[optimizer], PLACES[place]

    def steps(is_table):
        options = given | devices(place, mesh) | {"transpose_kernel": is_table}
        own = params | {"kernel": params["kernel"].T} if is_table else params
        update = jax.jit(functools.partial(jaxbce.linear_update, optimizer, features, **options))
        state = optimizer.init(own)
        for _ in range(3):
            step = update(own, state)
            own, state = step.params, step.opt_state
        shape = own["kernel"].shape
        return jax.tree.map(lambda a: a.T if is_table and a.shape == shape else a, step)

    assert_close(steps(True), steps(False), 2e-6)


def test_rounding_of_a_table(rng):
    drawn = draw_head(rng, 8, 24, ("positives",))
    kernel = drawn["kernel"].T.astype(jnp.bfloat16)
    optimizer = optax.sgd(0.01)

    @jax.jit
    def rounded(key):
        step = jaxbce.linear_update(
            optimizer,
            drawn["features"],
            {"kernel": kernel},
            optimizer.init({"kernel": kernel}),
            positives=drawn["positives"],
            transpose_kernel=True,
            chunk_size=5,
            rounding_key=key,
        )
        return step.params["kernel"]

    moved = [np.any(rounded(jax.random.key(seed)) != kernel) for seed in range(3)]
    assert any(moved)


@pytest.mark.parametrize("of", ["loss", "update"])
def test_nothing_of_the_size_of_the_table_is_copied(of):
    """A few chunks: of 262,144 labels, 2048 at a time."""
    batch, width, num_labels, chunk_size = 32, 64, 2**18, 2048

    def array(*shape, dtype=np.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    options = {"chunk_size": chunk_size, "transpose_kernel": True}
    optimizer = optax.adam(0.1)

    def loss(kernel, features, positives):
        return jaxbce.linear_bce_with_logits(features, kernel, positives=positives, **options)

    def step(kernel, features, positives, state):
        given = {"positives": positives} | options
        return jaxbce.linear_update(optimizer, features, {"kernel": kernel}, state, **given)

    kernel, rows = array(num_labels, width), (array(batch, width), array(batch, 4, dtype=np.int32))
    if of == "loss":
        program = jax.jit(jax.value_and_grad(loss)).lower(kernel, *rows)
    else:
        state = jax.eval_shape(optimizer.init, {"kernel": kernel})
        program = jax.jit(step, donate_argnums=(0, 3)).lower(kernel, *rows, state)
    chunk = 4 * chunk_size * (batch + width)
    assert program.compile().memory_analysis().temp_size_in_bytes < 16 * chunk


def test_a_kernel_that_lies_the_other_way_round_is_named(rng):
    features, kernel = np.ones((2, 3), np.float32), np.ones((3, 5), np.float32)
    given = {"labels": np.ones((2, 5))}
    message = r"linear_bce_with_logits: kernel must have shape .* takes transpose_kernel={}"
    with pytest.raises(ValueError, match=message.format(True)):
        jaxbce.linear_bce_with_logits(features, kernel.T, **given)
    with pytest.raises(ValueError, match=message.format(False)):
        jaxbce.linear_bce_with_logits(features, kernel, **given, transpose_kernel=True)
    with pytest.raises(TypeError, match="transpose_kernel must be True or False, got 1"):
        jaxbce.linear_top_k(features, kernel, k=1, transpose_kernel=1)


def test_the_gradient_of_a_table_is_sharded_as_it_is(rng):
    mesh = jax.make_mesh((8,), ("labels",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = NamedSharding(mesh, PartitionSpec("labels", None))
    table = jax.device_put(np.ones((16, 3), np.float32), place)
    features, positives = np.ones((2, 3), np.float32), np.zeros((2, 1), np.int32)

    def loss(table):
        return jaxbce.linear_bce_with_logits(
            features,
            table,
            positives=positives,
            transpose_kernel=True,
            mesh=mesh,
            label_axis="labels",
        )

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss))(table)
    assert gradient.sharding.spec == place.spec
