"""Programs that combine transformations, with every public function in them, against dense code.

A part may be right and a combination wrong: the same loss differentiated twice, each time for
another argument; a mask beside a mapped weight; sharded logits beside labels on the host.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composing import (
    ELEMENTWISE,
    FLAX,
    FLAX_TOP_K,
    HEADS,
    OPTIONAL,
    PLAIN,
    SIGLIP,
    SOFT,
    TOP_K,
    split,
)
from heads import assert_close
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jaxbce

# No test here asks what the compiler makes of a program.
pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("compile_fast")]


def over(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def scalar(loss):
    """The loss summed with a factor of its own for each element."""

    def total(arguments):
        rows = loss(arguments)
        factors = np.cos(np.arange(np.prod(rows.shape, dtype=int))).reshape(rows.shape)
        return jnp.sum(rows * factors.astype(rows.dtype))

    return total


def moving(arguments):
    """The names of what can be differentiated."""
    return sorted(n for n, v in arguments.items() if jnp.issubdtype(v.dtype, jnp.floating))


def stop(arguments, *names):
    """The arguments with these constant."""
    return arguments | {name: jax.lax.stop_gradient(arguments[name]) for name in names}


def value_and_gradient(loss, arguments, names=None):
    """The gradient by name."""
    part = {name: arguments[name] for name in (moving(arguments) if names is None else names)}
    return jax.value_and_grad(lambda part: loss(arguments | part))(part)


def gradient(loss, arguments, names=None):
    return value_and_gradient(loss, arguments, names)[1]


def stack(value):
    return jnp.stack([value, value * 0.75])


def mapped(fn, arguments, names):
    """`fn` for two values of the arguments of these names; the others are shared."""
    axes = {name: 0 if name in names else None for name in arguments}
    stacked = {n: stack(v) if n in names else v for n, v in arguments.items()}
    return jax.vmap(fn, (axes,))(stacked)


# --- programs: (loss, arguments, main arguments) -> pytree ---------------------------------------


def everything(loss, arguments, main):
    return value_and_gradient(loss, arguments)


def each_alone(loss, arguments, main):
    return [gradient(loss, arguments, [name]) for name in moving(arguments)]


def halves(loss, arguments, main):
    """The same loss twice, each time with the other argument constant."""
    first, second = main

    def both(arguments):
        return loss(stop(arguments, second)) + loss(stop(arguments, first))

    return gradient(both, arguments, main)


def gradient_penalty(loss, arguments, main):
    """The loss and the norm of its gradient."""
    first, second = main

    def penalized(arguments):
        value, slope = loss(arguments), gradient(loss, arguments, [first])[first]
        return value + jnp.sqrt(jnp.sum(slope**2))

    return gradient(penalized, arguments, [second])


def adversarial_training(loss, arguments, main):
    """The loss, and that of one argument moved along the sign of its gradient."""
    first, second = main

    def attacked(arguments):
        value, slope = loss(arguments), gradient(loss, arguments, [first])[first]
        return value + loss(arguments | {first: arguments[first] + 0.1 * jnp.sign(slope)})

    return gradient(attacked, arguments, [second])


def teacher(loss, arguments, main):
    """The loss, and that of constant parameters."""

    def distilled(arguments):
        return loss(arguments) + 0.5 * loss(stop(arguments, main[1]))

    return gradient(distilled, arguments, main)


def interleaved(loss, arguments, main):
    """Two pullbacks, made one after the other and called in the same order."""

    def pull_back(name):
        return jax.vjp(lambda value: loss(arguments | {name: value}), arguments[name])

    (value, first), (_, second) = (pull_back(name) for name in main)
    return first(value), second(value)


def hessian_product_beside_the_loss(loss, arguments, main):
    first, second = main

    def curved(arguments):
        value, slope = loss(arguments), gradient(loss, arguments, [first])[first]
        return value + jnp.sum(slope * jnp.cos(arguments[first]))

    return gradient(curved, arguments, [second])


def hessian_product(order, loss, arguments, main):
    """Of all arguments together."""
    point = {name: arguments[name] for name in moving(arguments)}
    along = jax.tree.map(jnp.cos, point)

    def slope(point):
        return gradient(loss, arguments | point, list(point))

    if order == "forward":
        return jax.jvp(slope, (point,), (along,))[1]
    return jax.vjp(slope, point)[1](along)


def vmap_over_each_alone(loss, arguments, main):
    """The value and the gradient of the main arguments; all but one argument is shared."""

    def both(arguments):
        return value_and_gradient(loss, arguments, main)

    return [mapped(both, arguments, [name]) for name in moving(arguments)]


def gradient_of_vmap(loss, arguments, main):
    """Of all arguments, through a map over one."""
    return gradient(lambda arguments: mapped(loss, arguments, [main[0]]).sum(), arguments)


def vmap_over_all(loss, arguments, main):
    return mapped(lambda arguments: gradient(loss, arguments), arguments, moving(arguments))


def training_loop(loss, arguments, main):
    """Two steps of gradient descent in a scan."""
    point = {name: arguments[name] for name in main}

    def step(point, rate):
        value, slopes = value_and_gradient(loss, arguments | point, main)
        return jax.tree.map(lambda p, slope: p - rate * slope, point, slopes), value

    return jax.lax.scan(step, point, jnp.array([0.01, 0.02], jnp.float32))


def gradient_of_scan(loss, arguments, main):
    """With another value of one argument in each step."""

    def total(arguments):
        def step(carry, value):
            return carry + loss(arguments | {main[0]: value}), None

        return jax.lax.scan(step, jnp.float32(0), stack(arguments[main[0]]))[0]

    return gradient(total, arguments)


def gradient_of_cond(loss, arguments, main):
    """Each branch stops another gradient."""
    first, second = main

    def total(arguments):
        branches = (lambda a: loss(stop(a, first))), (lambda a: loss(stop(a, second)))
        return jax.lax.cond(arguments[first].sum() > 0, *branches, arguments)

    return gradient(total, arguments, main)


PROGRAMS = {
    "everything": everything,
    "each argument alone": each_alone,
    "halves": halves,
    "gradient penalty": gradient_penalty,
    "adversarial training": adversarial_training,
    "teacher": teacher,
    "interleaved": interleaved,
    "hessian product beside the loss": hessian_product_beside_the_loss,
    "forward over reverse": functools.partial(hessian_product, "forward"),
    "reverse over reverse": functools.partial(hessian_product, "reverse"),
    "vmap over each argument alone": vmap_over_each_alone,
    "gradient of vmap": gradient_of_vmap,
    "vmap over all arguments": vmap_over_all,
    "training loop": training_loop,
    "gradient of scan": gradient_of_scan,
    "gradient of cond": gradient_of_cond,
}
# Every program with the head, and with every other function some that have caught one.
FEW = ["halves", "vmap over each argument alone"]
COMBINATIONS = [(PLAIN, name) for name in PROGRAMS]
COMBINATIONS += [
    (case, name)
    for case in (OPTIONAL, SOFT, SIGLIP)
    for name in (*FEW, "gradient penalty", "teacher", "reverse over reverse", "gradient of scan")
]
COMBINATIONS += [(ELEMENTWISE[0], name) for name in PROGRAMS if name.startswith("vmap")]
COMBINATIONS += [(case, "halves") for case in (*ELEMENTWISE, FLAX, TOP_K, FLAX_TOP_K)]


def compare(case, arguments, program, rtol=1e-4):
    """`program(loss, arguments, main)` with our loss and with the dense one."""

    def run(loss):
        return jax.jit(functools.partial(program, scalar(loss), main=case.main))(arguments)

    assert_close(run(case.ours), run(case.dense), rtol)


@pytest.mark.parametrize(
    ("case", "program"), COMBINATIONS, ids=[f"{case.name}-{name}" for case, name in COMBINATIONS]
)
def test_a_program_gives_what_it_gives_with_dense_code(case, program, rng):
    jax.clear_caches()  # JAX shares what it has traced between programs
    compare(case, case.draw(rng), PROGRAMS[program])


@over([OPTIONAL, SOFT, SIGLIP])
def test_a_gradient_is_the_same_after_a_program_that_takes_it_by_halves(case, rng):
    """In the same process, for the same shapes, without an outer `jax.jit`."""
    jax.clear_caches()
    arguments = case.draw(rng)
    loss, dense = scalar(case.ours), scalar(case.dense)
    together = halves(loss, arguments, case.main)
    afterwards = gradient(loss, arguments, case.main)
    expected = gradient(dense, arguments, case.main)
    assert_close(afterwards, expected)
    assert_close(together, expected)


# --- rematerialization ---------------------------------------------------------------------------

# Those that keep something on the device, by name.
POLICIES = {
    name: getattr(jax.checkpoint_policies, name)
    for name in dir(jax.checkpoint_policies)
    if name.endswith(("saveable", "dots", "batch_dims")) and "offload" not in name
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@over([PLAIN])
def test_remat_by_halves(case, policy, rng):
    """Whatever may be kept for the backward pass."""
    jax.clear_caches()

    def program(loss, arguments, main):
        return halves(jax.checkpoint(loss, policy=policy), arguments, main)

    compare(case, case.draw(rng), program)


# --- drawn programs ------------------------------------------------------------------------------
#
# Each step makes of a function of the arguments, which returns a number, another such function.


def summed_scan(loss, arguments, names):
    def step(carry, values):
        return carry + loss(arguments | values), None

    stacked = {name: stack(arguments[name]) for name in names}
    return jax.lax.scan(step, jnp.float32(0), stacked)[0]


def twice(loss, arguments, names):
    others = [name for name in moving(arguments) if name not in names]
    return loss(stop(arguments, *names)) + loss(stop(arguments, *others))


def with_slope(loss, arguments, names):
    value, slopes = value_and_gradient(loss, arguments, names)
    terms = jax.tree.map(lambda slope, at: jnp.sum(slope * jnp.cos(at)), slopes, slopes)
    return value + sum(jax.tree.leaves(terms))


def checkpointed(policy):
    return lambda loss, arguments, names: jax.checkpoint(loss, policy=policy)(arguments)


STEPS = {
    "jit": lambda loss, arguments, names: jax.jit(loss)(arguments),
    "stop": lambda loss, arguments, names: loss(stop(arguments, *names)),
    "twice": twice,
    "vmap": lambda loss, arguments, names: mapped(loss, arguments, names).sum(),
    "scan": summed_scan,
    "remat": checkpointed(None),
    "remat, all kept": checkpointed(jax.checkpoint_policies.everything_saveable),
    "remat, products kept": checkpointed(jax.checkpoint_policies.dots_saveable),
    "slope": with_slope,
}


@st.composite
def drawn_programs(draw):
    """A case, three steps with the arguments each is about, and what to differentiate at last."""
    case = draw(st.sampled_from(HEADS))
    subsets = st.sets(st.sampled_from(case.main), min_size=1).map(sorted)
    steps = draw(st.lists(st.tuples(st.sampled_from(list(STEPS)), subsets), min_size=3, max_size=3))
    # One derivative inside, one outside: a third takes long to compile.
    kept = [s for i, s in enumerate(steps) if s[0] != "slope" or "slope" not in dict(steps[:i])]
    return case, kept, draw(subsets | st.none())


@settings(max_examples=7, phases=[Phase.generate])
@given(drawn=drawn_programs())
def test_any_program_three_transformations_deep(drawn):
    case, steps, names = drawn
    jax.clear_caches()

    def program(loss, arguments, main):
        for step, about in steps:
            loss = functools.partial(STEPS[step], loss, names=about)
        return value_and_gradient(loss, arguments, names)

    compare(case, case.draw(np.random.default_rng(0)), program, 1e-3)


# --- steps of linear_update ----------------------------------------------------------------------

LAYER = ("kernel", "bias")


def step_inside(arguments):
    """The loss, its gradient by the features, and the layer after a step."""
    features, params, given = split(arguments)
    optimizer = optax.sgd(0.1)
    step = jaxbce.linear_update(
        optimizer, features, params, optimizer.init(params), chunk_size=4, **given
    )
    return step.loss, step.features_gradient, step.params


def step_apart(arguments):
    value, slopes = value_and_gradient(OPTIONAL.dense, arguments, ("features", *LAYER))
    return value, slopes["features"], {n: arguments[n] - 0.1 * slopes[n] for n in LAYER}


def scan_of_steps(step, arguments):
    def one(layer, features):
        value, slope, layer = step(arguments | layer | {"features": features})
        return layer, (value, slope)

    batches = stack(arguments["features"])
    return jax.lax.scan(one, {name: arguments[name] for name in LAYER}, batches)


def below_a_model(step, arguments):
    """The gradient of the features goes on into the layer that made them."""

    def model(w):
        return jnp.tanh(arguments["features"] @ w)

    features, backward = jax.vjp(model, jnp.eye(len(arguments["kernel"])))
    value, slope, layer = step(arguments | {"features": features})
    return value, backward(slope), layer


def some_times(step, arguments):
    """As gradient accumulation and skipped steps are written."""
    layer = {name: arguments[name] for name in LAYER}

    def one(i, layer):
        return jax.lax.cond(i != 1, lambda: step(arguments | layer)[2], lambda: layer)

    return jax.lax.fori_loop(0, 3, one, layer)


STEP_PROGRAMS = {
    "eager": lambda step, arguments: step(arguments),
    "scan": scan_of_steps,
    "below a model": below_a_model,
    "cond in a loop": some_times,
    "vmap over heads": lambda step, arguments: mapped(step, arguments, LAYER),
    "vmap over everything": lambda step, arguments: mapped(step, arguments, moving(arguments)),
}


@pytest.mark.parametrize("program", STEP_PROGRAMS.values(), ids=STEP_PROGRAMS)
def test_a_program_of_steps_gives_what_it_gives_with_gradients(program, rng):
    arguments = OPTIONAL.draw(rng)
    assert_close(program(step_inside, arguments), program(step_apart, arguments))


# --- flags ---------------------------------------------------------------------------------------

FLAGS = {
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "standard promotion": lambda: jax.numpy_dtype_promotion("standard"),
}


FLAGGED = [(case, flag) for case in (ELEMENTWISE[0], OPTIONAL) for flag in FLAGS]
FLAGGED += [(case, "x64") for case in (SOFT, SIGLIP, FLAX, TOP_K, FLAX_TOP_K)]


@pytest.mark.parametrize(
    ("case", "flag"), FLAGGED, ids=[f"{case.name}-{flag}" for case, flag in FLAGGED]
)
def test_a_flag_changes_nothing(case, flag, rng):
    """Called eagerly, as one does who looks for a NaN; strict promotion is on anyway."""
    with FLAGS[flag]():
        arguments = case.draw(rng)
        got = value_and_gradient(scalar(case.ours), arguments)
        assert_close(got, value_and_gradient(scalar(case.dense), arguments))
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_changes_nothing_in_a_step(flag, rng):
    with FLAGS[flag]():
        arguments = OPTIONAL.draw(rng)
        got = step_inside(arguments)
        assert_close(got, step_apart(arguments))
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}


@over([SOFT, SIGLIP, FLAX, TOP_K])
def test_float64(case, rng):
    with jax.enable_x64(True):
        arguments = {
            name: value.astype(np.float64) if name in moving(case.draw(rng)) else value
            for name, value in case.draw(rng).items()
        }
        compare(case, arguments, everything, 1e-12)


def test_debug_nans_with_nan_behind_a_mask(rng):
    case = ELEMENTWISE[0]
    clean = case.draw(rng)
    dirty = clean | {"labels": jnp.where(clean["where"], clean["labels"], jnp.nan)}
    with jax.debug_nans(True):
        value, slopes = value_and_gradient(case.ours, dirty)
    assert_close((value, slopes), value_and_gradient(case.dense, clean))


@over([ELEMENTWISE[0], SOFT, SIGLIP])
def test_a_step_with_donated_parameters(case, rng):
    def step(parameters, arguments, loss):
        slopes = gradient(scalar(loss), arguments | parameters, case.main)
        return jax.tree.map(lambda p, slope: p - 0.1 * slope, parameters, slopes)

    results = []
    for loss in (case.ours, case.dense):
        arguments = case.draw(np.random.default_rng(0))
        parameters = {name: arguments.pop(name) for name in case.main}
        donating = jax.jit(functools.partial(step, loss=loss), donate_argnums=0)
        results.append(donating(parameters, arguments))
        assert all(value.is_deleted() for value in parameters.values())
    assert_close(*results)
