"""A step of the optimizer inside the pass against gradient, update and application apart."""

import functools
from collections import OrderedDict

import jax
import jax.experimental
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
from jaxbce._head import rounding
from jaxbce._head.update import LinearUpdate
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


def elementwise(fn):
    """An optimizer whose updates are fn of the gradients, parameter by parameter."""
    return optax.stateless(lambda slopes, _: jax.tree.map(fn, slopes))


def of_step(fn):
    """The same with the number of steps and a key as the second and third argument."""

    def init(params):
        return {"step": jnp.int32(0), "key": jax.random.key(0)}

    def update(slopes, state, params):
        updates = jax.tree.map(lambda slope: fn(slope, state["step"], state["key"]), slopes)
        return updates, {"step": state["step"] + 1, "key": jax.random.split(state["key"])[0]}

    return optax.GradientTransformation(init, update)


def keep_largest(slope):
    least = jax.lax.top_k(jnp.abs(slope).ravel(), 5)[0][-1]
    return jnp.where(jnp.abs(slope) >= least, -slope, 0)


def after_some_steps(slope, step, _):
    return jax.lax.cond(step > 10**6, centre, lambda s: s, slope)


def forward_rule(fn):
    ruled = jax.custom_jvp(fn)
    ruled.defjvps(lambda tangent, *_: tangent)
    return ruled


def backward_rule(fn):
    ruled = jax.custom_vjp(fn)
    ruled.defvjp(lambda slope: (fn(slope), None), lambda _, cotangent: (cotangent,))
    return ruled


def soft_sign(slope):
    return slope / (1 + jnp.abs(slope))


def centre(slope):
    return slope - slope.mean()


SCHEDULES = {
    "cosine": optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 9),
    "one cycle": optax.cosine_onecycle_schedule(9, 0.1),
    "restarts": optax.sgdr_schedule(
        [{"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 1, "decay_steps": 3}] * 2
    ),
    "pieces": optax.piecewise_constant_schedule(0.1, {2: 0.5}),
    "pieces of a cosine": optax.piecewise_interpolate_schedule("cosine", 0.1, {2: 0.5}),
    "exponential": optax.exponential_decay(0.1, 3, 0.5, staircase=True),
    "polynomial": optax.polynomial_schedule(0.1, 0.01, 2, 9),
    "joined": optax.join_schedules([lambda step: step / 10, optax.constant_schedule(0.1)], [3]),
    "a loop": lambda step: jax.lax.fori_loop(0, 3, lambda i, rate: rate * 0.9 + i, step * 0.01),
}
# Beside OPTIMIZERS: read and accepted, without a step beside the dense one.
WELCOME = {
    "nesterov": optax.nadam(0.1),
    "adagrad": optax.adagrad(0.1),
    "adadelta": optax.adadelta(0.1),
    "centred": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "amsgrad": optax.amsgrad(0.1),
    "adamax": optax.adamax(0.1),
    "radam": optax.radam(0.1),
    "adabelief": optax.adabelief(0.1),
    "rprop": optax.rprop(0.1),
    "adan": optax.adan(0.1),
    "signs": optax.sign_sgd(0.1),
    "without a schedule": optax.contrib.schedule_free_adamw(0.1),
    "two means": optax.contrib.ademamix(0.1),
    "narrow state": optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "stays positive": optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()),
    "decay after some steps": optax.chain(
        optax.conditionally_transform(optax.add_decayed_weights(0.1), lambda step: step > 3),
        optax.sgd(0.1),
    ),
    "nothing at first": optax.conditionally_mask(optax.adam(0.1), lambda step: step > 3),
    "masked": optax.masked(optax.adam(0.1), {"kernel": True, "bias": False}),
    "over the width": elementwise(
        lambda s: s / (1 + jnp.sqrt((s * s).sum(tuple(range(s.ndim - 1)))))
    ),
    "a number for each feature": elementwise(lambda s: s * jnp.arange(3.0)[: s.ndim, None][0]),
    "sorted over the width": elementwise(
        lambda s: jnp.sort(jnp.atleast_2d(s), axis=0).reshape(s.shape)
    ),
    "running sums over the width": elementwise(lambda s: jnp.cumsum(s[None], axis=0)[0]),
    "one gradient back": optax.GradientTransformation(
        lambda params: jax.tree.map(lambda w: jnp.zeros((2, *w.shape)), params),
        lambda slopes, last, _: (
            jax.tree.map(lambda s, h: -0.1 * (s + h[0]), slopes, last),
            jax.tree.map(lambda s, h: jnp.stack([s, h[0]]), slopes, last),
        ),
    ),
    "rolled over the width": elementwise(lambda s: jnp.roll(s[None], 1, axis=0)[0]),
    "turned twice": elementwise(lambda s: soft_sign(s.T).T),
    "bits": elementwise(lambda s: jnp.where(s.view(jnp.int32) > 3, s, 0)),
    "nothing for a parameter": optax.stateless(lambda s, _: s | {"kernel": None}),
    "a forward rule": elementwise(forward_rule(soft_sign)),
    "a backward rule": elementwise(backward_rule(soft_sign)),
    "recomputed": elementwise(jax.checkpoint(soft_sign)),
    "compiled": elementwise(jax.jit(soft_sign)),
    "there and back": elementwise(lambda s: s.reshape(1, *s.shape, 1).squeeze((0, -1))),
} | {f"schedule: {name}": optax.adam(schedule) for name, schedule in SCHEDULES.items()}
MIXING = {
    "global norm": optax.clip_by_global_norm(1.0),
    "trust ratio": optax.scale_by_trust_ratio(),
    "lamb": optax.lamb(0.1),
    "lars": optax.lars(0.1),
    "centred": optax.centralize(),
    "factored": optax.adafactor(0.1, min_dim_size_to_factor=1),
    "clipped by block": optax.adafactor(0.1),
    "covers": optax.sm3(0.1),
    "second moment of a layer": optax.novograd(0.1),
    "distance": optax.contrib.prodigy(),
    "orthogonal": optax.contrib.muon(0.1),
    "skips what is not finite": optax.apply_if_finite(optax.sgd(0.1), 3),
    "norm of the update": optax.normalize_by_update_norm(),
    "global norm after a million steps": optax.conditionally_transform(
        optax.clip_by_global_norm(1.0), lambda step: step > 10**6
    ),
    "where a parameter is large": optax.stateless(
        lambda slopes, params: jax.tree.map(
            lambda slope, w: jnp.where(jnp.abs(w).max() > 1e3, 0.0, -slope), slopes, params
        )
    ),
    "noise": optax.add_noise(0.1, 0.5, 0),
    "noise, typed key": optax.add_noise(0.1, 0.5, jax.random.key(0)),
    "private": optax.noisy_sgd(0.1, key=1),
    "one key for ever": elementwise(lambda s: s + jax.random.normal(jax.random.key(0), s.shape)),
    "drop-out": of_step(lambda s, _, key: jnp.where(jax.random.bernoulli(key, 0.5, s.shape), s, 0)),
    "drop-out, old key": of_step(
        lambda s, _, key: s * jax.random.bernoulli(jax.random.key_data(key), 0.5, s.shape)
    ),
    "the largest": elementwise(keep_largest),
    "above the median": elementwise(lambda s: jnp.where(s > jnp.median(s), s, 0)),
    "the largest of all": elementwise(lambda s: jnp.where(s.argmax() == 3, s, 0)),
    "by size": elementwise(lambda s: s / s.shape[-1]),
    "reversed": elementwise(lambda s: s[..., ::-1]),
    "permuted": elementwise(lambda s: jnp.roll(s, 1, -1)),
    "sorted": elementwise(lambda s: jnp.sort(s, axis=-1)),
    "turned": elementwise(lambda s: s.reshape(s.T.shape).T),
    "running sums": elementwise(lambda s: jnp.cumsum(s, axis=-1)),
    "places": elementwise(lambda s: s * jnp.arange(s.shape[-1])),
    "places, as a constant": elementwise(lambda s: s * np.arange(s.shape[-1], dtype=np.float32)),
    "the first": elementwise(lambda s: s * s[..., :1]),
    "the others": elementwise(lambda s: jnp.concatenate([s[..., 1:], s[..., :1]], axis=-1)),
    "in other rows": elementwise(lambda s: s.reshape(s.shape[-1], -1).reshape(s.shape)),
    "products": elementwise(lambda s: s * jnp.vdot(s, s)),
    "a loop over labels": elementwise(
        lambda s: jax.lax.scan(lambda c, x: (c + x, c + x), 0.0, s.ravel())[1].reshape(s.shape)
    ),
    "a callback": elementwise(
        lambda s: jax.pure_callback(np.sort, jax.ShapeDtypeStruct(s.shape, s.dtype), s)
    ),
    "a look at it": elementwise(lambda s: jax.debug.callback(print, s) or s),
    "behind a condition": of_step(after_some_steps),
    "with a forward rule": elementwise(forward_rule(centre)),
    "with a backward rule": elementwise(backward_rule(centre)),
    "recomputed": elementwise(jax.checkpoint(centre)),
    "compiled": elementwise(jax.jit(centre)),
}
# What hides that from a look at the first step.
HIDING = {
    "": lambda optimizer: optimizer,
    "before a rate of 0": lambda optimizer: optax.chain(
        optimizer, optax.scale_by_learning_rate(optax.linear_schedule(0.0, 0.1, 9))
    ),
    "every third step": lambda optimizer: optax.MultiSteps(optimizer, 3),
    "after some steps": lambda optimizer: optax.conditionally_transform(
        optimizer, lambda step: step > 3
    ),
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
        return LinearUpdate(value, by_features, optax.apply_updates(params, updates), state)

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


@pytest.mark.thorough
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


NARROW = [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2]
every_narrow_dtype = pytest.mark.parametrize(
    "dtype", NARROW, ids=[jnp.dtype(d).name for d in NARROW]
)


def rounded_in_every_way(value, dtype):
    noise = jnp.arange(2**16, dtype=jnp.uint32)
    noise = noise.astype(jnp.uint16) if dtype == jnp.bfloat16 else noise << 16
    values = rounding.round_with(noise, jnp.full(2**16, value, np.float32), dtype)
    assert values.dtype == dtype
    return np.asarray(values, np.float64)


@every_narrow_dtype
@pytest.mark.parametrize(
    "value",
    [
        *(1.0, -1.0, 1.003, -3.1415927, 1e-30, 1.2e-38, -1e-40, 65504.1, 3.3e38, 0.0),
        *(447.9, 1.99999, 6.1e-5, -5.5e-5, 2.0**-24, 7e-6, 1.5e-3, -1.7e-8, 2.0**-14),
    ],
    ids=str,
)
def test_rounding_is_unbiased(value, dtype):
    """The mean over all 2¹⁶ random numbers is the number itself: of bfloat16 exactly."""
    info, value = jnp.finfo(dtype), float(np.float32(value))
    values = rounded_in_every_way(value, dtype)
    if value > float(info.max):
        assert (values == float(info.max)).all()
        return
    unit = max(2.0 ** (np.frexp(value)[1] - 1 - info.nmant), float(info.smallest_subnormal))
    assert set(values) <= {np.floor(value / unit) * unit, np.ceil(value / unit) * unit}
    error = 0 if dtype == jnp.bfloat16 else unit * 2.0**-16
    assert abs(values.mean() - value) <= error


@every_narrow_dtype
@pytest.mark.parametrize("sign", [1, -1], ids=["+", "-"])
def test_rounding_of_what_has_no_neighbour(sign, dtype):
    largest = float(jnp.finfo(dtype).max)
    infinity = float(jnp.asarray(np.inf, dtype))  # NaN where there is none
    cases = {np.inf: infinity, np.nan: np.nan, largest: largest, 3.4028235e38: largest, 0.0: 0.0}
    for value, expected in cases.items():
        values = rounded_in_every_way(sign * value, dtype)
        np.testing.assert_array_equal(values, np.full(2**16, sign * expected))
        if not np.isnan(expected):
            np.testing.assert_array_equal(np.signbit(values), sign < 0)


@every_narrow_dtype
def test_what_is_narrow_already_stays(dtype):
    """Every number of 8 bits, and as many of 16."""
    info = jnp.finfo(dtype)
    codes = np.arange(2**info.bits).astype(f"uint{info.bits}")
    values = jax.lax.bitcast_convert_type(jnp.asarray(codes), dtype)
    noise = jax.random.bits(jax.random.key(0), values.shape, jnp.uint32)
    if dtype == jnp.bfloat16:
        noise = noise.astype(jnp.uint16)
    got = rounding.round_with(noise, jnp.asarray(np.asarray(values, np.float32)), dtype)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(values, np.float32))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
def test_narrow_state_does_not_freeze(param_dtype, dtype):
    """A second moment that shrinks by less than half a unit in a step."""
    decay, steps, labels = 1 - 2.0**-13, 40, 2**10
    params = {"kernel": jnp.ones((WIDTH, labels), param_dtype)}
    features, positives = jnp.zeros((1, WIDTH), param_dtype), jnp.array([[-1]])
    optimizer = optax.adam(0.0, b1=decay, b2=decay)
    step = jax.jit(functools.partial(jaxbce.linear_update, optimizer, chunk_size=300))

    def after(dtype, key):
        state = optimizer.init(jax.tree.map(lambda array: array.astype(dtype), params))
        ones = {"kernel": jnp.ones((WIDTH, labels), dtype)}
        state = state[0]._replace(mu=ones, nu=ones), *state[1:]
        for i in range(steps):
            rounding = {} if key is None else {"rounding_key": jax.random.fold_in(key, i)}
            state = step(features, params, state, positives=positives, **rounding).opt_state
        mu, nu = state[0].mu["kernel"], state[0].nu["kernel"]
        assert mu.dtype == nu.dtype == dtype
        return np.asarray(mu, np.float64), np.asarray(nu, np.float64)

    assert all((moment == 1).all() for moment in after(dtype, None))
    mu, nu = after(dtype, jax.random.key(0))
    for moment in (mu, nu):
        np.testing.assert_allclose(moment.mean(), decay**steps, atol=3e-4)
    assert (mu != nu).any()  # other random numbers in each array, column and chunk
    assert not (nu[:, :300] == nu[:, 300:600]).all()
    if param_dtype == "bfloat16":
        for moment in after("float32", jax.random.key(0)):
            np.testing.assert_allclose(moment, decay**steps, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_steps_are_not_lost(dtype):
    """Each is a 50th of a unit of the parameter: to the nearest, it would stay where it is."""
    params = {"kernel": jnp.ones((WIDTH, 2**10), dtype)}
    features, positives = jnp.zeros((1, WIDTH), dtype), jnp.array([[-1]])
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


@pytest.mark.thorough
def test_rounding_on_a_mesh_is_the_same_on_every_replica(mesh, rng):
    """Of parameters, moments, and of a rate that is one number."""
    arguments = draw_head(rng, 8, 24, ("positives",))
    narrow = {n: v if n == "positives" else v.astype(jnp.bfloat16) for n, v in arguments.items()}
    options = {"mesh": mesh, "batch_axis": "data", "label_axis": "model"}

    def shrink(slopes, rate, params):
        return jax.tree.map(lambda slope: rate * slope, slopes), rate * (1 - 2.0**-9)

    shrinking = optax.GradientTransformation(lambda _: jnp.bfloat16(1), shrink)
    optimizer = optax.chain(optax.adam(0.1), shrinking)
    got = inside(optimizer, narrow, rounding_key=jax.random.key(0), chunk_size=3, **options)
    assert got.opt_state[1].dtype == jnp.bfloat16
    for array in jax.tree.leaves((got.params, got.opt_state)):
        by_column = {}
        for shard in array.addressable_shards:
            first = by_column.setdefault(str(shard.index), shard.data)
            np.testing.assert_array_equal(shard.data, first)
        assert len(by_column) == (4 if array.ndim else 1)


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


def read(optimizer, rng, **options):
    """As `call`, without running a step."""
    features, params, given = split(draw_head(rng, names=("bias", "positives")))

    def step(params, state):
        return jaxbce.linear_update(optimizer, features, params, state, **given, **options)

    return jax.eval_shape(step, params, jax.eval_shape(optimizer.init, params))


# Each by itself, and a few behind everything that can hide what they do.
REFUSED = [(name, "") for name in MIXING]
REFUSED += [
    (name, hiding)
    for name in ("global norm", "noise", "the largest", "behind a condition", "a callback")
    for hiding in list(HIDING)[1:]
]


@pytest.mark.thorough
@pytest.mark.parametrize(("optimizer", "hiding"), REFUSED, ids=map(" ".join, REFUSED))
def test_an_optimizer_that_mixes_elements_is_refused(optimizer, hiding, rng):
    optimizer, hidden = MIXING[optimizer], HIDING[hiding]
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(
            ValueError,
            match=r"linear_update: optimizer "
            r"(is not known to treat each label apart|keeps state of shape|"
            r"does not treat 8 labels as .* all 7)",
        ),
    ):
        read(hidden(optimizer), rng)


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", WELCOME.values(), ids=WELCOME)
@pytest.mark.parametrize("chunk_size", [1, 3], ids=str)
def test_an_optimizer_that_treats_elements_apart_is_welcome(optimizer, chunk_size, rng):
    with jax.numpy_rank_promotion("allow"):
        read(optimizer, rng, chunk_size=chunk_size)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("optimizer", "placed"),
    [
        *((optimizer, False) for optimizer in (OPTIMIZERS | WELCOME).values()),
        *((optimizer, True) for optimizer in OPTIMIZERS.values()),
    ],
    ids=[*(OPTIMIZERS | WELCOME), *(f"placed-{name}" for name in OPTIMIZERS)],
)
def test_an_optimizer_is_welcome_on_explicit_axes_too(optimizer, placed, rng):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)
    arguments = draw_head(rng, 8, 24, names=("bias", "positives"))
    features, params, given = split(arguments)

    def step(params):
        axes = {"mesh": mesh, "batch_axis": "data", "label_axis": "model"} if placed else {}
        state = optimizer.init(params)
        return jaxbce.linear_update(optimizer, features, params, state, **given, **axes).loss

    with jax.numpy_rank_promotion("allow"), jax.set_mesh(mesh):
        if placed:
            params = {
                name: jax.device_put(array, PartitionSpec(*[None] * (array.ndim - 1), "model"))
                for name, array in params.items()
            }
        jax.eval_shape(step, params)


def test_updates_of_another_dtype_under_strict_promotion(rng):
    def update(slopes, state, params):
        return jax.tree.map(lambda slope: (-0.1 * slope).astype(jnp.bfloat16), slopes), state

    optimizer = optax.GradientTransformation(lambda _: (), update)
    arguments = draw_head(rng, names=NAMES)
    got, expected = inside(optimizer, arguments, 1), inside(optax.sgd(0.1), arguments, 1)
    assert_close(got.params, expected.params, 1e-2)


def test_what_is_refused_is_named(rng):
    with pytest.raises(ValueError, match="its update uses cumsum on arrays of labels"):
        read(MIXING["running sums"], rng)


@pytest.mark.thorough
@pytest.mark.parametrize("new_key", [jax.random.PRNGKey, jax.random.key], ids=["old", "typed"])
def test_a_key_in_the_state(new_key, rng):
    """One number for all elements mixes none."""

    def update(slopes, key, params):
        key, now = jax.random.split(key)
        rate = jax.random.uniform(now)
        return jax.tree.map(lambda slope: -rate * slope, slopes), key

    optimizer = optax.GradientTransformation(lambda _: new_key(1), update)
    arguments = draw_head(rng, names=NAMES)
    got, expected = inside(optimizer, arguments, chunk_size=3), apart(optimizer, arguments)
    assert_close(got[:3], expected[:3], 2e-6)
    assert (got.opt_state == expected.opt_state).all()


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
        with pytest.raises(ValueError, match=rf"not treat {chunk_size} labels as .* all 40"):
            inside(optimizer, arguments, steps=1, chunk_size=chunk_size)


def test_an_optimizer_that_holds_an_array_of_the_labels_is_refused(rng):
    """And works with it in its state, as the error says."""
    rates = {"kernel": jnp.arange(1.0, LABELS + 1), "bias": jnp.arange(1.0, LABELS + 1)}
    optimizer = elementwise(lambda s: s * rates["bias"])
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(TypeError, match=r"an array for each label belongs in its state.*got mul"),
    ):
        call(rng, optimizer)

    def init(params):
        return {argument: jnp.zeros(array.shape[-1]) for argument, array in params.items()}

    def update(slopes, state, params):
        return jax.tree.map(lambda slope, rate: -slope * rate, slopes, state), state

    optimizer = optax.GradientTransformation(init, update)
    arguments = draw_head(rng, names=NAMES)
    features, params, given = split(arguments)
    with jax.numpy_rank_promotion("allow"):
        got = jaxbce.linear_update(optimizer, features, params, rates, chunk_size=3, **given)
        assert_close(
            got.params, apart(elementwise(lambda s: -s * rates["bias"]), arguments, 1).params
        )


class Changing:
    """What an optimizer may read of an object."""

    rate = 0.1

    def schedule(self, step):
        return self.rate


CHANGING = {
    "a number": lambda owner: optax.sgd(lambda step: owner.rate),
    "a method": lambda owner: optax.adam(owner.schedule),
    "an array": lambda owner: elementwise(lambda s: -s * jnp.full(s.ndim, owner.rate)[0]),
    "a constant": lambda owner: elementwise(lambda s: -s * owner.array[s.ndim]),
    "a branch": lambda owner: elementwise(lambda s: s if owner.rate > 0.5 else -s),
}


@pytest.mark.thorough
@pytest.mark.parametrize("make", CHANGING.values(), ids=CHANGING)
def test_an_optimizer_that_reads_what_changes(make, rng):
    """Without jit a call of the same optimizer sees the new value."""
    owner = Changing()
    optimizer, arguments = make(owner), draw_head(rng, names=NAMES)
    features, params, given = split(arguments)
    for rate in (0.1, 0.9, 0.1):
        owner.rate, owner.array = rate, jnp.full(3, rate)
        got = jaxbce.linear_update(optimizer, features, params, optimizer.init(params), **given)
        assert_close(got.params, apart(optimizer, arguments, 1).params, 2e-6)


def counted(kind):
    """An optimizer that changes something outside of it, once for each chunk."""
    rate = jax.new_ref(jnp.float32(0))

    def update(gradients, state, params=None):
        if kind == "callback":
            number = jax.ShapeDtypeStruct((), jnp.float32)
            step = jax.experimental.io_callback(lambda: np.float32(1), number)
        else:
            rate[...] += 0.1
            step = rate[...]
        return jax.tree.map(lambda g: -step * g, gradients), state

    return optax.GradientTransformation(lambda params: (), update)


@pytest.mark.parametrize("kind", ["reference", "callback"])
def test_an_optimizer_with_effects_is_refused(kind, rng):
    with pytest.raises(ValueError, match="optimizer must change nothing outside of it"):
        inside(counted(kind), draw_head(rng, names=NAMES), chunk_size=3)


class Called:
    rate = 0.1

    def init(self, params):
        return ()

    def update(self, gradients, state, params=None):
        rate = self.rate
        number = jax.ShapeDtypeStruct((), jnp.float32)
        step = jax.pure_callback(lambda: np.float32(rate), number)
        return jax.tree.map(lambda g: -step * jnp.sign(g), gradients), state


def test_a_callback_that_was_replaced(rng):
    optimizer, arguments = Called(), draw_head(rng, names=NAMES)
    features, params, given = split(arguments)
    for optimizer.rate in (0.1, 0.5):
        after = jaxbce.linear_update(optimizer, features, params, (), **given).params["bias"]
        moved = jnp.max(jnp.abs(after - params["bias"]))
        np.testing.assert_allclose(moved, optimizer.rate, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.1, mu_dtype=jnp.bfloat16),
        optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.float16),
    ],
    ids=["mu_dtype", "accumulator_dtype"],
)
def test_state_that_the_optimizer_rounds_itself(optimizer, rng):
    """It would be rounded to the nearest, whatever the key."""
    arguments = draw_head(rng, names=NAMES)
    inside(optimizer, arguments)
    with pytest.raises(ValueError, match=r"rounding_key cannot round state that .*mu_dtype"):
        inside(optimizer, arguments, rounding_key=jax.random.key(0))


def test_whole_numbers_that_become_fractions_are_refused(rng):
    """A dense step would have them in float32 from the first step on."""

    def update(gradients, state, params=None):
        return gradients, jax.tree.map(lambda count: count + 0.5, state)

    counts = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), params), update
    )
    with pytest.raises(ValueError, match=r"state of int32 into float32, .* make float32"):
        call(rng, counts)


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
    "ordered": (
        {"params": OrderedDict(kernel=KERNEL), "opt_state": ()},
        TypeError,
        r'params must be a dict .* got OrderedDict; pass \{"kernel": kernel, .*init of it',
    ),
    "other names": (
        {"params": {"kernel": KERNEL, "scale": KERNEL}},
        TypeError,
        r"params must be a dict .* got \['kernel', 'scale'\]",
    ),
    "no labels": (
        {"params": {"kernel": jnp.ones((WIDTH, 0))}},
        ValueError,
        r"kernel must have two axes, of at least one label and one feature, got \(2, 0\)",
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
    "no numbers of no loss": ({"per_label": None}, ValueError, "per_label belongs to"),
    "none": ({"reduction": "none"}, ValueError, "reduction must be one of mean, .*batchmean, got"),
    "rounding of float32": (
        {"rounding_key": jax.random.key(0)},
        ValueError,
        "rounding_key is for parameters or state of less than 32 bits, got float32",
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


# --- a kernel that a TPU lays out as a table ---------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", [{}, {"batch_axis": "data", "label_axis": "model"}], ids=len)
def test_a_step_on_the_transposed_kernel_is_the_same(axes, dtype, mesh, monkeypatch, rng):
    """The form for a TPU, run here: 200 columns on a device need less padding as rows."""
    options = {"mesh": mesh, **axes} if axes else {}
    width, labels = 128, 200 * (mesh.shape["model"] if axes else 1)
    params = {"kernel": rng.normal(size=(width, labels)) / 11, "bias": rng.normal(size=labels)}
    params = jax.tree.map(lambda array: jnp.asarray(array, dtype), params)
    if dtype == "bfloat16":
        options["rounding_key"] = jax.random.key(0)
    features = jnp.asarray(rng.normal(size=(8, width)), dtype)
    positives = jnp.asarray(rng.integers(-1, labels, (8, 5)))
    forms_of_tpu = []
    original = jax.lax.platform_dependent

    def as_on_tpu(*arrays, **forms):
        if "tpu" not in forms:
            return original(*arrays, **forms)
        forms_of_tpu.append(forms["tpu"])
        return forms["tpu"](*arrays)

    def step():
        optimizer = optax.adamw(0.1)  # a new one is compiled anew
        state = optimizer.init(params)
        given = {"positives": positives, "chunk_size": 64, **options}
        return jaxbce.linear_update(optimizer, features, params, state, **given)

    expected = step()
    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_tpu)
    assert_close(step(), expected)
    assert forms_of_tpu
