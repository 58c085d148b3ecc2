"""A step of the optimizer inside the pass against gradient, update and application apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composing import LABELS, ROWS, WIDTH, draw_head, split
from flax import nnx
from heads import assert_close, head
from jax.sharding import NamedSharding, PartitionSpec
from programs import collectives

import jaxbce
from jaxbce import _update
from jaxbce.nnx import MultiLabelHead

pytestmark = pytest.mark.usefixtures("compile_fast")

NAMES = ("bias", "weight", "pos_weight", "positives", "where", "ignored")
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(optax.linear_schedule(0.1, 0.01, 3)),
    "adamw": optax.adamw(0.1),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "decay before momentum": optax.chain(
        optax.add_decayed_weights(0.1), optax.clip(0.01), optax.sgd(0.1, momentum=0.9)
    ),
    "hyperparameters in the state": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "every second step": optax.MultiSteps(optax.adam(0.1), 2),
    "one of each": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}
    ),
}
MIXING = {
    "global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "trust ratio": optax.lamb(0.1),
    "layer norm": optax.lars(0.1),
    "centred": optax.chain(optax.centralize(), optax.sgd(0.1)),
    "factored": optax.adafactor(0.1),
    "skips what is not finite": optax.apply_if_finite(optax.sgd(0.1), 3),
    "norm of the update": optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
    "global norm after a million steps": optax.chain(
        optax.conditionally_transform(optax.clip_by_global_norm(1.0), lambda step: step > 10**6),
        optax.sgd(0.1),
    ),
    "where a parameter is large": optax.stateless(
        lambda slopes, params: jax.tree.map(
            lambda slope, w: jnp.where(jnp.abs(w).max() > 1e3, 0.0, -slope), slopes, params
        )
    ),
    "reversed": optax.stateless(lambda slopes, _: jax.tree.map(lambda s: s[..., ::-1], slopes)),
}


def last_of(steps, step, params, state):
    """What the last of so many steps returns."""
    for _ in range(steps):
        result = step(params, state)
        params, state = result.params, result.opt_state
    return result


def inside(optimizer, arguments, steps=3, **options):
    """What `steps` of `linear_update` return, the last of them."""
    features, params, given = split(arguments)

    @jax.jit
    def step(params, state):
        return jaxbce.linear_update(optimizer, features, params, state, **given, **options)

    return last_of(steps, step, params, optimizer.init(params))


def apart(optimizer, arguments, steps=3, loss=head):
    """The same with a gradient that exists."""
    features, params, given = split(arguments)

    @jax.jit
    def step(params, state):
        def of(params, features):
            return loss({"features": features} | params | given)

        value, (slopes, by_features) = jax.value_and_grad(of, (0, 1))(params, features)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(slopes, state, params)
        return _update.LinearUpdate(value, by_features, optax.apply_updates(params, updates), state)

    return last_of(steps, step, params, optimizer.init(params))


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_is_that_of_gradient_and_optimizer(optimizer, rng):
    """In chunks of 3 of 7 labels: the last one starts among labels that are done."""
    arguments = draw_head(rng, names=NAMES)
    got = inside(optimizer, arguments, chunk_size=3)
    assert_close(got, apart(optimizer, arguments), 2e-6)


@pytest.mark.parametrize(
    ("chunk_size", "reduction"), [(1, "sum"), (7, "weighted_mean"), (None, "batchmean")]
)
def test_chunks_and_reductions(chunk_size, reduction, rng):
    arguments = draw_head(rng, names=("weight", "labels", "label_smoothing"))
    got = inside(OPTIMIZERS["adam"], arguments, reduction=reduction, chunk_size=chunk_size)
    loss = functools.partial(head, reduction=reduction)
    assert_close(got, apart(OPTIMIZERS["adam"], arguments, loss=loss), 2e-6)


def test_any_loss(rng):
    arguments = draw_head(rng, names=("bias", "positives", "margin"))
    margin = arguments.pop("margin")

    def loss(x, y, m):
        return jaxbce.focal_loss(x - y * m[None], y, reduction="none")

    def dense(arguments):
        given = dict(arguments)
        layer = [given.pop(name) for name in ("features", "kernel", "bias")]
        return jaxbce.linear_loss(loss, *layer, per_label=(margin,), **given)

    got = inside(OPTIMIZERS["adam"], arguments, loss=loss, per_label=(margin,), chunk_size=3)
    assert_close(got, apart(OPTIMIZERS["adam"], arguments, loss=dense), 2e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("Auto", {"batch_axis": "data", "label_axis": "model"}),
        ("Explicit", {"batch_axis": "data", "label_axis": "model"}),
        ("Explicit", {"batch_axis": ("data", "model")}),
        ("Auto", {"label_axis": "data"}),
    ],
    ids=["both", "both, explicit", "rows over both, explicit", "labels"],
)
def test_on_a_mesh(kind, axes, rng):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType[kind],) * 2)
    arguments = draw_head(rng, 8, 24, NAMES)
    got = inside(OPTIMIZERS["adamw"], arguments, chunk_size=4, mesh=mesh, **axes)
    assert_close(got, apart(OPTIMIZERS["adamw"], arguments), 2e-6)


def test_on_a_mesh_only_the_gradient_of_a_chunk_is_reduced(mesh):
    batch, width, chunk_size, optimizer = 64, 16, 512, optax.adam(0.1)

    def array(shape, *spec, dtype=np.float32):
        where = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def reduced(num_labels):
        params = {
            "kernel": array((width, num_labels), None, "model"),
            "bias": array((num_labels,), "model"),
        }
        moments = optax.ScaleByAdamState(array((), dtype=np.int32), params, params)
        state = moments, *jax.eval_shape(optimizer.init, params)[1:]

        def step(params, state, features, positives):
            return jaxbce.linear_update(
                optimizer,
                features,
                params,
                state,
                positives=positives,
                chunk_size=chunk_size,
                mesh=mesh,
                batch_axis="data",
                label_axis="model",
            )

        rows = array((batch, width), "data"), array((batch, 4), "data", dtype=np.int32)
        return collectives(jax.jit(step).lower(params, state, *rows).compile().as_text())

    small, large = reduced(2**14), reduced(2**16)
    assert sorted(small) == sorted(large)
    assert max(small) == chunk_size * width


def test_bfloat16_is_updated_in_float32(rng):
    """The optimizer sees a gradient that was not rounded; parameters and state keep their dtype."""
    arguments = draw_head(rng, names=("bias", "positives"))
    narrow = {
        name: value if name == "positives" else value.astype(jnp.bfloat16)
        for name, value in arguments.items()
    }
    seen = set()

    def record(updates, state, params):
        seen.update(leaf.dtype for leaf in jax.tree.leaves((updates, params)))
        return updates, state

    watch = optax.GradientTransformation(lambda _: optax.EmptyState(), record)
    got = inside(optax.chain(watch, optax.adam(0.1)), narrow, steps=1)
    assert seen == {np.dtype(np.float32)}
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((got.params, got.opt_state))}
    assert dtypes == {jnp.dtype(jnp.bfloat16), np.dtype(np.int32)}
    assert got.features_gradient.dtype == jnp.bfloat16
    wide = {n: v if n == "positives" else v.astype(np.float32) for n, v in narrow.items()}
    expected = inside(optax.adam(0.1), wide, steps=1)
    assert_close(got.params, expected.params, 4e-3)


# --- stochastic rounding -------------------------------------------------------------------------


def rounded_in_every_way(value):
    noise = jnp.arange(2**16).astype(jnp.uint16)
    return np.asarray(_update.round_with(noise, jnp.full(2**16, value, np.float32)), np.float64)


@pytest.mark.parametrize(
    "value",
    [1.0, -1.0, 1.003, -3.1415927, 1e-30, 1.2e-38, -1e-40, 65504.1, 3.3e38, 0.0],
    ids=str,
)
def test_rounding_is_unbiased(value):
    """Exactly: the mean over all 2¹⁶ random numbers is the number itself."""
    values = rounded_in_every_way(value)
    assert values.mean() == np.float64(np.float32(value))
    assert len(set(values)) == 1 + (np.float32(jnp.bfloat16(value)) != np.float32(value))


LARGEST = float(jnp.finfo(jnp.bfloat16).max)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.inf, np.inf),
        (-np.inf, -np.inf),
        (np.nan, np.nan),
        (LARGEST, LARGEST),
        (3.4028235e38, LARGEST),
        (-3.4028235e38, -LARGEST),
        (-0.0, -0.0),
    ],
    ids=str,
)
def test_rounding_of_what_has_no_neighbour(value, expected):
    values = rounded_in_every_way(value)
    np.testing.assert_array_equal(values, np.full(2**16, expected))
    np.testing.assert_array_equal(np.signbit(values), np.signbit(np.float32(value)))


def test_small_steps_are_not_lost(rng):
    """Each is a 50th of a unit of the parameter: to the nearest, it would stay where it is."""
    params = {"kernel": jnp.ones((WIDTH, 2**10), jnp.bfloat16)}
    features, positives = jnp.zeros((1, WIDTH), jnp.bfloat16), jnp.array([[-1]])
    optimizer = optax.chain(optax.add_decayed_weights(1.0), optax.sgd(2.0**-7 / 50))

    def after(steps, key):
        step = jax.jit(functools.partial(jaxbce.linear_update, optimizer, chunk_size=300))
        now, state = params, optimizer.init(params)
        for i in range(steps):
            rounding = {} if key is None else {"rounding_key": jax.random.fold_in(key, i)}
            now, state = step(features, now, state, positives=positives, **rounding)[2:]
        return np.asarray(now["kernel"], np.float64)

    assert (after(50, None) == 1).all()
    got = after(50, jax.random.key(0))
    np.testing.assert_allclose(got.mean(), (1 - 2.0**-7 / 50) ** 50, atol=2e-4)
    assert len(np.unique(got[0])) > 1  # other numbers in each column and chunk
    assert not (got[:, :300] == got[:, 300:600]).all()


def test_rounding_on_a_mesh_is_the_same_on_every_replica(mesh, rng):
    arguments = draw_head(rng, 8, 24, ("positives",))
    narrow = {n: v if n == "positives" else v.astype(jnp.bfloat16) for n, v in arguments.items()}
    options = {"mesh": mesh, "batch_axis": "data", "label_axis": "model"}
    got = inside(optax.sgd(0.1), narrow, rounding_key=jax.random.key(0), **options)
    by_column = {}
    for shard in got.params["kernel"].addressable_shards:
        first = by_column.setdefault(str(shard.index), shard.data)
        np.testing.assert_array_equal(shard.data, first)
    assert len(by_column) == 4


# --- cost, from the compiler ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    ["sgd", "momentum", "adamw", "lion", "decay before momentum"],
)
def test_the_step_is_in_place(optimizer):
    """Beside donated parameters and state, a few chunks: no gradient, no copy."""
    optimizer = OPTIMIZERS[optimizer]
    batch, width, num_labels, chunk_size = 64, 64, 2**17 + 100, 2048
    params = {
        "kernel": jax.ShapeDtypeStruct((width, num_labels), np.float32),
        "bias": jax.ShapeDtypeStruct((num_labels,), np.float32),
    }
    rows = jax.ShapeDtypeStruct((batch, width), np.float32)
    positives = jax.ShapeDtypeStruct((batch, 4), np.int32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, features, positives):
        return jaxbce.linear_update(
            optimizer, features, params, state, positives=positives, chunk_size=chunk_size
        )

    state = jax.eval_shape(optimizer.init, params)
    memory = step.lower(params, state, rows, positives).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 8 * chunk_size * (batch + width) * 4
    assert memory.alias_size_in_bytes >= sum(
        leaf.size * 4 for leaf in jax.tree.leaves((params, state))
    )


# --- the Flax module -----------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("use_bias", "placed"), [(True, True), (False, False)], ids=["bias, mesh", "one device"]
)
def test_the_update_of_a_module(placed, use_bias, mesh, rng):
    features, _, given = split(draw_head(rng, 8, 24, ("positives", "ignored")))
    options = {"use_bias": use_bias, "prior": 0.1 if use_bias else None}
    devices = {"mesh": mesh, "batch_axis": "data", "label_axis": "model"} if placed else {}
    kernel_alone = optax.masked(optax.adamw(0.1), lambda p: jax.tree.map(lambda a: a.ndim > 1, p))

    def trained(step, **devices):
        module = MultiLabelHead(WIDTH, 24, rngs=nnx.Rngs(0), chunk_size=4, **options, **devices)
        optimizer = nnx.Optimizer(module, kernel_alone, wrt=nnx.Param)
        with jax.numpy_dtype_promotion("standard"):  # of the optimizer's own step
            for _ in range(3):
                result = nnx.jit(step)(module, optimizer, features)
        return module, optimizer, result

    def update(module, optimizer, features):
        return module.update(optimizer, features, **given)

    def gradient(module, optimizer, features):
        def loss(module, features):
            return module.loss(features, **given)

        value, (slopes, by_features) = nnx.value_and_grad(loss, argnums=(0, 1))(module, features)
        optimizer.update(module, slopes)
        return value, by_features

    got, expected = trained(update, **devices), trained(gradient)
    assert_close(*(jax.tree.leaves((nnx.state(x[:2]), x[2])) for x in (got, expected)), 2e-6)
    if placed:
        for parameter in jax.tree.leaves(nnx.state(got[0])):
            assert parameter.sharding.spec[-1] == "model"


# --- errors --------------------------------------------------------------------------------------


def call(rng, optimizer=OPTIMIZERS["adam"], **changes):
    features, params, given = split(draw_head(rng, names=("bias", "positives")))
    params = changes.pop("params", params)
    state = changes.pop("opt_state", None) or optimizer.init(params)
    return jaxbce.linear_update(optimizer, features, params, state, **given | changes)


@pytest.mark.parametrize("optimizer", MIXING.values(), ids=MIXING)
def test_an_optimizer_that_mixes_elements_is_refused(optimizer, rng):
    with pytest.raises(
        ValueError,
        match=r"linear_update: optimizer (treats elements together|keeps state of shape)",
    ):
        call(rng, optimizer)


BY_SIZE = {
    "mask": optax.adamw(
        0.1, weight_decay=1.0, mask=lambda params: jax.tree.map(lambda a: a.size > 60, params)
    ),
    "label": optax.partition(
        {"step": optax.sgd(1.0), "stay": optax.set_to_zero()},
        lambda params: jax.tree.map(lambda a: "step" if a.shape[-1] > 30 else "stay", params),
    ),
    "number": optax.stateless(
        lambda slopes, _: jax.tree.map(lambda s: -s * min(35, max(7, s.shape[-1])), slopes)
    ),
}


@pytest.mark.parametrize("optimizer", BY_SIZE.values(), ids=BY_SIZE)
def test_an_optimizer_that_depends_on_the_number_of_labels_is_refused(optimizer, rng):
    """Unless one chunk is all labels."""
    arguments = draw_head(rng, ROWS, 40, NAMES)
    whole = inside(optimizer, arguments, steps=1, chunk_size=40)
    assert_close(whole.params, apart(optimizer, arguments, steps=1).params)
    for chunk_size in (1, 7, 30):
        with pytest.raises(ValueError, match=rf"a chunk of {chunk_size} labels .* from all 40"):
            inside(optimizer, arguments, steps=1, chunk_size=chunk_size)


def test_an_optimizer_that_holds_an_array_of_the_labels_is_refused(rng):
    rates = {"kernel": jnp.ones(LABELS), "bias": jnp.ones(LABELS)}
    optimizer = optax.stateless(lambda slopes, _: jax.tree.map(jnp.multiply, slopes, rates))
    with pytest.raises(TypeError, match="an array for each label belongs in its state; got mul"):
        call(rng, optimizer)


def test_settings_that_forbid_nan_and_transfers(rng):
    """The optimizer is tried once, while the program is traced."""
    features, params, given = split(draw_head(rng, ROWS, LABELS, NAMES))
    optimizer = optax.adam(0.123)
    step = jax.jit(functools.partial(jaxbce.linear_update, optimizer, **given))
    arguments = features, params, optimizer.init(params)
    with jax.debug_nans(True), jax.debug_infs(True), jax.transfer_guard("disallow"):
        jax.block_until_ready(step(*arguments))


def test_an_optimizer_that_holds_a_traced_value_is_refused(rng):
    with pytest.raises(ValueError, match=r"must hold no traced value.*inject_hyperparams"):
        jax.jit(lambda rate: call(rng, optax.sgd(rate)))(0.1)


KERNEL = jnp.ones((WIDTH, LABELS))
ERRORS = {
    "no dict": (
        {"params": KERNEL, "opt_state": ()},
        TypeError,
        'params must be a dict of "kernel"',
    ),
    "other names": (
        {"params": {"kernel": KERNEL, "scale": KERNEL}},
        TypeError,
        r"params must be a dict .* got \['kernel', 'scale'\]",
    ),
    "no labels": (
        {"params": {"kernel": jnp.ones((WIDTH, 0))}},
        ValueError,
        r"kernel must have at least one label and feature, got \(2, 0\)",
    ),
    "another state": (
        {"opt_state": OPTIMIZERS["adam"].init({"kernel": KERNEL})},
        ValueError,
        r"opt_state must be optimizer.init\(params\)",
    ),
    "options of two losses": (
        {"loss": optax.sigmoid_binary_cross_entropy, "pos_weight": jnp.ones(LABELS)},
        ValueError,
        "pos_weight and label_smoothing belong to the loss that is built in",
    ),
    "numbers of no loss": ({"per_label": (jnp.ones(LABELS),)}, ValueError, "per_label belongs to"),
    "none": ({"reduction": "none"}, ValueError, "reduction must be one of mean, .*batchmean, got"),
    "rounding of float32": (
        {"rounding_key": jax.random.key(0)},
        ValueError,
        "rounding_key is for parameters in bfloat16, got float32",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(changes, error, message, rng):
    with pytest.raises(error, match=f"linear_update: {message}"):
        call(rng, **changes)


def test_what_is_no_optimizer(rng):
    with pytest.raises(TypeError, match="linear_update: optimizer must be an optax transformation"):
        jaxbce.linear_update(0.1, jnp.ones((2, WIDTH)), {"kernel": KERNEL}, ())


def test_an_optimizer_that_needs_the_loss(rng):
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    with pytest.raises(TypeError, match=r"optimizer.update must take .*argument: 'value'"):
        call(rng, optimizer)


def test_the_optimizer_of_another_module(rng):
    module = MultiLabelHead(WIDTH, LABELS, rngs=nnx.Rngs(0))
    other = nnx.Optimizer(
        nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param
    )
    with pytest.raises(ValueError, match="optimizer must be one of this head alone"):
        module.update(other, jnp.ones((1, WIDTH)), positives=jnp.array([[0]]))
