"""`jaxbce.nnx.MultiLabelHead`: a linear layer whose loss and top labels hold no logits."""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbce
from jaxbce.nnx import MultiLabelHead

pytestmark = pytest.mark.usefixtures("compile_fast")

WIDTH, LABELS, BATCH = 8, 37, 6
POSITIVES = np.random.default_rng(1).integers(-1, LABELS, (BATCH, 3))


def make(**options):
    return MultiLabelHead(WIDTH, LABELS, rngs=nnx.Rngs(0), **options)


def features(*lead):
    return jax.random.normal(jax.random.key(2), (*(lead or (BATCH,)), WIDTH))


@pytest.mark.parametrize(
    ("method", "function"),
    [
        (MultiLabelHead.loss, jaxbce.linear_bce_with_logits),
        (MultiLabelHead.update, jaxbce.linear_update),
    ],
    ids=["loss", "update"],
)
def test_a_method_takes_what_its_function_takes(method, function):
    """In its order, but for the layer and its devices, which are those of the module."""
    of_module = {"kernel", "bias", "params", "opt_state", "transpose_kernel", "chunk_size"}
    of_module |= {"mesh", "batch_axis", "label_axis"}
    taken = inspect.signature(method).parameters.values()
    wanted = inspect.signature(function).parameters.values()
    assert [(each.name, each.default) for each in taken if each.name != "self"] == [
        (each.name, each.default) for each in wanted if each.name not in of_module
    ]


OPTIONS = {
    "plain": {},
    "weight": {"weight": jnp.arange(BATCH, dtype=jnp.float32)},
    "pos_weight": {"pos_weight": jnp.linspace(0, 3, LABELS)},
    "label_smoothing": {"label_smoothing": 0.1},
    "sum": {"reduction": "sum"},
}


# Every option with one form of the labels: the head that they are handed to has its own tests.
FORMS = [("positives", name) for name in OPTIONS] + [("labels", "weight")]


@pytest.mark.parametrize(("form", "name"), FORMS, ids="{}".format)
def test_loss_and_gradient_equal_those_of_the_logits(form, name):
    options = OPTIONS[name]
    head = make(chunk_size=5, prior=0.1)
    labels = jaxbce.multi_hot(POSITIVES, LABELS)
    targets = {form: POSITIVES if form == "positives" else labels}

    def dense(head, x):
        weight = options.get("weight")
        by_row = {} if weight is None else {"weight": weight[:, None]}
        return jaxbce.bce_with_logits(head(x), labels, **{**options, **by_row})

    def chunked(head, x):
        return head.loss(x, **targets, **options)

    expected, got = (
        nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(head, features())
        for loss in (dense, chunked)
    )
    for got_leaf, leaf in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got_leaf, leaf, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("lead", "k"), [((), 4), ((3,), LABELS), ((2, 3), 1)], ids=str)
def test_top_k_equals_that_of_the_logits(lead, k):
    head = make(chunk_size=10)
    x = features(*lead) if lead else features()[0]
    values, labels = nnx.jit(lambda head, x: head.top_k(x, k))(head, x)
    expected_values, expected_labels = jax.lax.top_k(head(x), k)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(labels, expected_labels)


def test_logits_are_those_of_a_linear_layer():
    head, linear = make(), nnx.Linear(WIDTH, LABELS, rngs=nnx.Rngs(0))
    assert {name: leaf.shape for name, leaf in nnx.state(head).items()} == {
        name: leaf.shape for name, leaf in nnx.state(linear).items()
    }
    linear.kernel[...] = head.kernel[...]
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(head(features()), linear(features()), rtol=1e-5, atol=1e-6)


def test_train_step():
    head = make(prior=0.1)
    optimizer = nnx.Optimizer(head, optax.adam(1e-1), wrt=nnx.Param)

    @nnx.jit
    def train_step(head, optimizer):
        loss, grads = nnx.value_and_grad(lambda head: head.loss(features(), positives=POSITIVES))(
            head
        )
        optimizer.update(head, grads)
        return loss

    with jax.numpy_dtype_promotion("standard"):
        losses = [float(train_step(head, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]
    _, best = head.top_k(features(), 1)
    assert all(label in row for (label,), row in zip(best, POSITIVES, strict=True))


RATES = np.linspace(1e-6, 0.9, LABELS)
PRIORS = {
    "one number": 0.01,
    "list": RATES.tolist(),
    "on the host": RATES,
    "on a device": jnp.asarray(RATES),
    "Param": nnx.Param(jnp.asarray(RATES)),
    "from counts": jax.nn.sigmoid(jaxbce.prior_bias(positives=POSITIVES, num_labels=LABELS)),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=list(PRIORS))
def test_zero_features_predict_the_prior(prior):
    """Wherever the head is made."""
    assert nnx.eval_shape(lambda: make(prior=prior)).bias.shape == (LABELS,)
    for made in (make(prior=prior), nnx.jit(lambda: make(prior=prior))()):
        rates = jax.nn.sigmoid(made(jnp.zeros((1, WIDTH))))[0]
        np.testing.assert_allclose(rates, np.full(LABELS, np.asarray(prior)), rtol=1e-5)


@pytest.mark.parametrize(
    "where",
    [nnx.jit, lambda fn: functools.partial(nnx.eval_shape, fn)],
    ids=["jit", "eval_shape"],
)
@pytest.mark.parametrize("prior", [1.0, RATES - 1, jnp.ones(LABELS)], ids=["1", "host", "device"])
def test_a_known_prior_is_checked_where_the_head_is_traced(prior, where):
    with pytest.raises(ValueError, match=r"prior must be in \(0, 1\), got"):
        where(lambda: make(prior=prior))()


@pytest.mark.parametrize("dtype", ["float64", np.float64], ids=["name", "type"])
def test_the_prior_of_a_bias_in_float64(dtype):
    with jax.enable_x64(True):
        bias = make(prior=0.1, param_dtype=dtype).bias[...]
    np.testing.assert_allclose(bias, np.full(LABELS, np.log(0.1 / 0.9)), rtol=1e-15)


def test_a_traced_prior_is_not_checked():
    bias = nnx.jit(lambda rate: make(prior=rate).bias[...])(jnp.float32(1.0))
    assert np.isinf(bias).all()


def test_without_bias():
    head = make(use_bias=False)
    assert list(nnx.state(head)) == ["kernel"]
    expected = jaxbce.bce_with_logits(head(features()), jaxbce.multi_hot(POSITIVES, LABELS))
    np.testing.assert_allclose(head.loss(features(), positives=POSITIVES), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [(None, "float32"), (None, "bfloat16"), ("bfloat16", "float32")],
    ids=str,
)
@jax.numpy_dtype_promotion("standard")
def test_dtypes(dtype, param_dtype):
    """Parameters and their gradients in param_dtype; logits and loss in float32."""
    head = make(dtype=dtype, param_dtype=param_dtype, prior=0.1)
    x = features().astype(param_dtype)

    @nnx.jit
    def evaluate(head):
        loss, grads = nnx.value_and_grad(lambda head: head.loss(x, positives=POSITIVES))(head)
        return loss, grads, head(x), head.top_k(x, 2)[0]

    loss, grads, logits, top = evaluate(head)
    assert {leaf.dtype for leaf in jax.tree.leaves((nnx.state(head), grads))} == {
        jnp.dtype(param_dtype)
    }
    assert loss.dtype == logits.dtype == top.dtype == jnp.float32
    expected = jaxbce.bce_with_logits(logits, jaxbce.multi_hot(POSITIVES, LABELS))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    rounded = [np.float64(array.astype(dtype or param_dtype)) for array in (x, head.kernel[...])]
    expected = rounded[0] @ rounded[1] + np.float64(head.bias[...])
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def optimizer_of(head):
    return nnx.Optimizer(head, optax.sgd(0.1), wrt=nnx.Param)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@jax.numpy_dtype_promotion("standard")
def test_update_multiplies_in_dtype(param_dtype):
    """As `loss` does, of features of another dtype."""
    head = make(dtype=param_dtype, param_dtype=param_dtype)
    x = features().astype("float32" if param_dtype == "bfloat16" else "bfloat16")
    expected = nnx.value_and_grad(lambda _, x: head.loss(x, positives=POSITIVES), argnums=1)(0, x)
    got = head.update(optimizer_of(head), x, positives=POSITIVES)
    assert [each.dtype for each in got] == [each.dtype for each in expected]
    for each, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.float32(each), np.float32(other), rtol=1e-2)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)


def test_abstract_and_jitted_creation():
    shapes = nnx.eval_shape(lambda: make(prior=0.1))
    assert shapes.kernel.shape == (WIDTH, LABELS)
    np.testing.assert_allclose(nnx.jit(make)().kernel[...], make().kernel[...], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(prior=0.5, use_bias=False), "prior sets the bias, got use_bias=False"),
        (lambda: make(prior=np.zeros(3)), r"shape \(37,\), got \(3,\)"),
        (lambda: make(prior=0.0), r"prior must be in \(0, 1\), got 0.0 .*prior_bias"),
        (lambda: make(prior=np.full(LABELS, 1.0)), r"prior must be in \(0, 1\), got 1.0"),
        (lambda: make(prior=float("nan")), r"prior must be in \(0, 1\), got nan"),
        (lambda: make()(np.zeros((2, 3))), r"features must have shape \(..., 8\), got \(2, 3\)"),
        (lambda: make().loss(features()), "exactly one of positives and labels"),
        (lambda: make().top_k(features(), 38), "k must be .* at most 37"),
        (
            lambda: (head := make(dtype="bfloat16")).update(
                optimizer_of(head), features(), positives=POSITIVES
            ),
            "update multiplies in float32, .* got dtype=bfloat16; make .* param_dtype=bfloat16",
        ),
    ],
    ids=[
        "prior without bias",
        "shape of prior",
        "prior 0",
        "prior 1",
        "prior NaN",
        "width",
        "no labels",
        "k",
        "narrower dtype",
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda head, x: head(x),
        lambda head, x: head.top_k(x, 1),
        lambda head, x: head.loss(x, positives=POSITIVES),
        lambda head, x: head.update(
            nnx.Optimizer(head, optax.sgd(0.1), wrt=nnx.Param), x, positives=POSITIVES
        ),
    ],
    ids=["call", "top_k", "loss", "update"],
)
def test_features_that_are_no_floats(call):
    with pytest.raises(TypeError, match="features must be floating-point, got int"):
        call(make(), np.ones((BATCH, WIDTH), int))


def test_update_takes_an_optimizer_of_flax():
    with pytest.raises(TypeError, match=r"a flax.nnx.Optimizer, got Gradient.*nnx.Optimizer\(head"):
        make().update(optax.sgd(0.1), features(), positives=POSITIVES)


WRT = {
    "everything": nnx.Param,
    "the kernel": nnx.All(nnx.Param, nnx.PathContains("kernel")),
    "the bias": nnx.All(nnx.Param, nnx.PathContains("bias")),
}


@pytest.mark.parametrize("make_tx", [optax.sgd, optax.adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("wrt", WRT.values(), ids=WRT)
@jax.numpy_dtype_promotion("standard")
def test_update_trains_what_the_optimizer_does(wrt, make_tx):
    """What its wrt leaves out is used, and stays."""
    got, expected = make(prior=0.1, chunk_size=10), make(prior=0.1)
    of_got, of_expected = (nnx.Optimizer(head, make_tx(0.1), wrt=wrt) for head in (got, expected))
    for _ in range(2):
        gradient = nnx.value_and_grad(
            lambda head: head.loss(features(), positives=POSITIVES), argnums=nnx.DiffState(0, wrt)
        )
        loss, slopes = gradient(expected)
        of_expected.update(expected, slopes)
        np.testing.assert_allclose(
            got.update(of_got, features(), positives=POSITIVES)[0], loss, rtol=1e-6
        )
    for one, other in zip(
        *(jax.tree.leaves(nnx.state(each)) for each in ((got, of_got), (expected, of_expected))),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def in_its_place(value):
    """As optax has it: a hyperparameter is an entry of a dictionary."""

    def put(optimizer):
        optimizer.opt_state.hyperparams["learning_rate"] = value

    return put


def into_its_variable(value):
    def put(optimizer):
        optimizer.opt_state.hyperparams["learning_rate"][...] = value

    return put


def in_place_of_the_state(optimizer):
    """As a checkpoint that knows nothing of Flax restores it."""
    into_its_variable(jnp.float32(0.01))(optimizer)
    optimizer.opt_state = nnx.data(
        jax.tree.map(
            lambda variable: variable[...],
            optimizer.opt_state,
            is_leaf=lambda value: isinstance(value, nnx.Variable),
        )
    )


RATES_OF_LEARNING = {
    "array": in_its_place(jnp.float32(0.01)),
    "NumPy array": in_its_place(np.full((), 0.01, np.float32)),
    "NumPy number": in_its_place(np.float32(0.01)),
    "Python float": in_its_place(0.01),
    "Variable": in_its_place(nnx.Variable(jnp.float32(0.01))),
    "array in the Variable": into_its_variable(jnp.float32(0.01)),
    "Python float in the Variable": into_its_variable(0.01),
    "arrays everywhere": in_place_of_the_state,
}


@pytest.mark.thorough
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nnx.jit"])
@pytest.mark.parametrize("put", RATES_OF_LEARNING.values(), ids=RATES_OF_LEARNING)
@jax.numpy_dtype_promotion("standard")
def test_update_takes_a_hyperparameter_however_it_was_set(put, compiled):
    """Twice, the second time in a state that it has written itself."""
    tx = optax.inject_hyperparams(optax.adam)(0.1)
    head, expected = make(prior=0.1, chunk_size=10), make(prior=0.1)
    optimizer, of_expected = (nnx.Optimizer(each, tx, wrt=nnx.Param) for each in (head, expected))
    put(optimizer)
    in_its_place(jnp.float32(0.01))(of_expected)
    held = optimizer.opt_state.hyperparams

    def step(head, optimizer):
        return head.update(optimizer, features(), positives=POSITIVES)[0]

    if compiled:
        step = nnx.jit(step)
    for count in (1, 2):
        loss, slopes = nnx.value_and_grad(lambda head: head.loss(features(), positives=POSITIVES))(
            expected
        )
        of_expected.update(expected, slopes)
        np.testing.assert_allclose(step(head, optimizer), loss, rtol=1e-6)
        assert optimizer.step[...] == count
    got = jax.tree.leaves((nnx.state(head), optimizer.opt_state))
    wanted = jax.tree.leaves((nnx.state(expected), of_expected.opt_state))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    if not compiled and put is not in_place_of_the_state:  # `nnx.jit` makes another
        assert held is optimizer.opt_state.hyperparams


class Model(nnx.Module):
    def __init__(self, head):
        self.head = head


OTHERS = {
    "of the model around it": lambda head, tx: nnx.Optimizer(
        Model(head), tx, wrt=nnx.All(nnx.Param, nnx.PathContains("head"))
    ),
    "of nothing": lambda head, tx: nnx.Optimizer(head, tx, wrt=nnx.BatchStat),
    "of a wider layer": lambda _, tx: nnx.Optimizer(
        nnx.Linear(WIDTH, LABELS + 1, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param
    ),
    "of a layer without a bias": lambda _, tx: nnx.Optimizer(
        nnx.Linear(WIDTH, LABELS, use_bias=False, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param
    ),
}


@pytest.mark.parametrize("make_optimizer", OTHERS.values(), ids=OTHERS)
def test_update_refuses_the_optimizer_of_something_else(make_optimizer):
    """And its remedy works."""
    head = make()
    other = make_optimizer(head, optax.adam(0.1))
    with pytest.raises(ValueError, match=r"must be one of this head alone, .*wrt=flax.nnx.Param\)"):
        head.update(other, features(), positives=POSITIVES)
    head.update(nnx.Optimizer(head, other.tx, wrt=nnx.Param), features(), positives=POSITIVES)


def test_update_refuses_a_wrt_of_nothing_without_a_state():
    head = make()
    nothing = nnx.Optimizer(head, optax.sgd(0.1), wrt=nnx.BatchStat)
    with pytest.raises(ValueError, match=r"whose wrt selects \[\] of the head"):
        head.update(nothing, features(), positives=POSITIVES)


# --- on a mesh -----------------------------------------------------------------------------------

EXPLICIT, AUTO = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto
BOTH = ("batch", "labels")
ON_MESHES = {
    "automatic": ((AUTO, AUTO), "labels"),
    "automatic, two axes": ((AUTO, AUTO), BOTH),
    "explicit": ((EXPLICIT, EXPLICIT), "labels"),
    "explicit, two axes": ((EXPLICIT, EXPLICIT), BOTH),
    "mixed": ((AUTO, EXPLICIT), "labels"),
}


def on_meshes(*names):
    cases = [ON_MESHES[name] for name in names]
    return pytest.mark.parametrize(("kinds", "axis"), cases, ids=names)


def made_on(kinds, axis):
    """A head and its optimizer, on eight devices."""
    mesh = jax.make_mesh((4, 2), BOTH, kinds)
    head = MultiLabelHead(WIDTH, 40, mesh=mesh, label_axis=axis, rngs=nnx.Rngs(0))
    return head, nnx.Optimizer(head, optax.adam(0.1), wrt=nnx.Param)


def assert_sharded(state, axis):
    """Every array of a size that follows the labels."""
    own = 20 if axis == "labels" else 5
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    assert shapes == [(*leaf.shape[:-1], own) for leaf in leaves]


@on_meshes(*ON_MESHES)
def test_parameters_and_moments_say_how_they_are_sharded(kinds, axis):
    head, optimizer = made_on(kinds, axis)
    for state in (nnx.state(head), nnx.state(optimizer)["opt_state"][0]["mu"]):
        assert jax.tree.leaves(nnx.get_partition_spec(state)) == [
            jax.sharding.PartitionSpec(axis),
            jax.sharding.PartitionSpec(None, axis),
        ]


def test_without_a_mesh_parameters_say_nothing():
    specs = jax.tree.leaves(nnx.get_partition_spec(nnx.state(make())))
    assert specs == [jax.sharding.PartitionSpec()] * 2


# On mixed axes `jax.lax.with_sharding_constraint` refuses the explicit ones.
@on_meshes(*[name for name in ON_MESHES if name != "mixed"])
def test_creation_by_the_recipe_of_flax(kinds, axis):
    @nnx.jit
    def create():
        head, optimizer = made_on(kinds, axis)
        state = nnx.state((head, optimizer))
        specs = nnx.get_partition_spec(state)
        nnx.update((head, optimizer), jax.lax.with_sharding_constraint(state, specs))
        return head, optimizer

    with jax.set_mesh(jax.make_mesh((4, 2), BOTH, kinds)):
        assert_sharded(nnx.state(create()), axis)


@pytest.mark.thorough
@pytest.mark.parametrize("own", [False, True], ids=["Optimizer.update", "head.update"])
@pytest.mark.parametrize("creation", [lambda fn: fn, nnx.jit], ids=["eager", "nnx.jit"])
@on_meshes(*ON_MESHES)
@jax.numpy_dtype_promotion("standard")
def test_after_a_step_moments_are_sharded_as_their_parameters(kinds, axis, creation, own):
    @nnx.jit
    def step(head, optimizer):
        if own:
            head.update(optimizer, features(), positives=POSITIVES)
        else:
            grads = nnx.grad(lambda head: head.loss(features(), positives=POSITIVES))(head)
            optimizer.update(head, grads)

    head, optimizer = creation(lambda: made_on(kinds, axis))()
    step(head, optimizer)
    assert_sharded(nnx.state((head, optimizer)), axis)


@on_meshes(*[name for name in ON_MESHES if name != "mixed"])
def test_moments_made_with_their_head_are_sharded_as_it_is(kinds, axis):
    """As those of `nnx.Linear` are, where the mesh is set."""
    with jax.set_mesh(jax.make_mesh((4, 2), BOTH, kinds)):
        head, optimizer = nnx.jit(lambda: made_on(kinds, axis))()
    assert_sharded(nnx.state((head, optimizer)), axis)


@on_meshes("automatic", "automatic, two axes")
def test_moments_made_after_their_head_are_sharded_as_it_is(kinds, axis):
    """Where no mesh is set."""
    head, _ = made_on(kinds, axis)
    assert_sharded(nnx.state(nnx.Optimizer(head, optax.adam(0.1), wrt=nnx.Param)), axis)
    assert nnx.eval_shape(lambda: made_on(kinds, axis)[0]).kernel.shape == (WIDTH, 40)


class OwnUpdate(nnx.Optimizer):
    def update(self, model, grads, **options):
        super().update(model, jax.tree.map(lambda g: 0 * g, grads), **options)


class Half(nnx.Param):
    def get_value(self, **options):
        return super().get_value(**options) / 2


OWN = {
    "update": (OwnUpdate, lambda a: nnx.Param(a), "an update of its own, OwnUpdate"),
    "get_value": (nnx.Optimizer, Half, "kernel must be a flax.nnx.Param as it is, got Half"),
    "hook": (
        nnx.Optimizer,
        lambda a: nnx.Param(a, on_get_value=lambda variable, value: 2 * value),
        "kernel must be a flax.nnx.Param as it is",
    ),
}


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
@pytest.mark.parametrize(("optimizer", "kernel", "message"), OWN.values(), ids=OWN)
def test_update_refuses_what_it_would_pass_by(optimizer, kernel, message):
    head = make()
    head.kernel = kernel(head.kernel[...])
    own = optimizer(head, optax.sgd(1.0), wrt=nnx.Param)
    with pytest.raises(TypeError, match=message):
        head.update(own, features(), positives=POSITIVES)


# --- a table -------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("placed", [False, True], ids=["one device", "mesh"])
def test_a_head_with_a_table_is_that_of_its_kernel(placed):
    devices = {}
    if placed:
        mesh = jax.make_mesh((2, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
        devices = {"mesh": mesh, "batch_axis": "data", "label_axis": "model"}
    features, positives = jnp.ones((4, 3)), jnp.array([[1], [5], [2], [0]])

    def trained(transpose_kernel):
        rngs = nnx.Rngs(0)
        head = jaxbce.nnx.MultiLabelHead(
            3, 8, prior=0.1, transpose_kernel=transpose_kernel, **devices, rngs=rngs
        )
        optimizer = nnx.Optimizer(head, optax.adam(0.1), wrt=nnx.Param)
        for _ in range(2):
            loss, slope = head.update(optimizer, features, positives=positives)
        kernel = head.kernel[...]
        if placed:
            place = ("model", None) if transpose_kernel else (None, "model")
            place = jax.sharding.PartitionSpec(*place)
            assert kernel.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, place), 2)
            assert place in jax.tree.leaves(nnx.get_partition_spec(nnx.state(head)))
        kernel = kernel.T if transpose_kernel else kernel
        own = loss, slope, kernel, head(features), head.top_k(features, 2)
        return *own, head.loss(features, positives=positives)

    for got, expected in zip(
        *(jax.tree.leaves(trained(how)) for how in (True, False)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_table_is_shared_with_an_embedding():
    """Tags in and tags out: one table, and the gradient of both uses."""

    class Tagger(nnx.Module):
        def __init__(self, rngs):
            self.tags = nnx.Embed(8, 3, rngs=rngs)
            self.head = jaxbce.nnx.MultiLabelHead(3, 8, transpose_kernel=True, rngs=rngs)
            self.head.kernel = self.tags.embedding

        def loss(self, given, positives):
            return self.head.loss(self.tags(given).mean(axis=1), positives=positives)

    model = Tagger(nnx.Rngs(0))
    given, positives = jnp.array([[0, 1], [2, 3]]), jnp.array([[4], [5]])
    slopes = nnx.grad(lambda model: model.loss(given, positives))(model)
    assert len(jax.tree.leaves(slopes)) == 2

    def dense(table, bias):
        logits = table[given].mean(axis=1) @ table.T + bias
        return jaxbce.bce_with_logits(logits, jaxbce.multi_hot(positives, 8))

    expected = jax.grad(dense)(model.tags.embedding[...], jnp.zeros((1, 8)))
    got = slopes["tags"]["embedding"] if "tags" in slopes else slopes["head"]["kernel"]
    np.testing.assert_allclose(jax.tree.leaves(got)[0], expected, rtol=1e-5, atol=1e-7)


# --- a number of labels that the devices do not divide -------------------------------------------

rng = np.random.default_rng(5)
MASKS = {
    "no mask": {},
    "rows": {"where": np.arange(BATCH)[:, None] % 3 > 0},
    "rows and ids": {
        "where": np.arange(BATCH)[:, None] % 3 > 0,
        "ignored": np.insert(POSITIVES[:, :1], 1, 2**32 + 3, axis=1),  # no label, nor one mod 2^32
    },
    "labels": {"where": np.arange(LABELS) % 5 > 0},
    "both": {"where": rng.random((BATCH, LABELS)) > 0.2, "ignored": POSITIVES[:, :1]},
}
TARGETS = {
    "positives": {"positives": POSITIVES},
    "labels": {"labels": rng.random((BATCH, LABELS), np.float32), "pos_weight": np.arange(37.0)},
}


def alone_and_padded(kinds, axis, **options):
    """A head of 37 labels on one device, and the same one on eight."""
    mesh = jax.make_mesh((4, 2), BOTH, kinds)
    return make(prior=0.1, **options), make(prior=0.1, mesh=mesh, label_axis=axis, **options)


def assert_same_labels(got, expected):
    """Of arrays whose padding, which is 0, is cut off."""
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        padding = one[tuple(map(slice, other.shape))]
        assert np.count_nonzero(one) == np.count_nonzero(padding)
        np.testing.assert_allclose(padding, other, rtol=1e-5, atol=2e-6)


# Each mask with each reduction, and both with positives and with labels.
PADDED_LOSSES = [
    (mask, reduction, list(TARGETS)[(i + j) % 2])
    for i, mask in enumerate(MASKS)
    for j, reduction in enumerate(["mean", "sum", "weighted_mean", "batchmean", "none"])
]


@pytest.mark.thorough
@pytest.mark.parametrize(("mask", "reduction", "target"), PADDED_LOSSES)
def test_padding_has_no_part_in_a_loss(mask, reduction, target):
    options = {**MASKS[mask], **TARGETS[target], "reduction": reduction}

    def loss(head, x):
        return head.loss(x, **options, weight=jnp.arange(6.0)).sum()

    expected, got = (
        nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(head, features())
        for head in alone_and_padded((AUTO, AUTO), BOTH)
    )
    assert_same_labels(got, expected)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kinds", "axis", "transposed"),
    [(*mesh, i % 2 > 0) for i, mesh in enumerate(ON_MESHES.values())],
    ids=[f"{name}-{('kernel', 'table')[i % 2]}" for i, name in enumerate(ON_MESHES)],
)
def test_padding_shows_nowhere(kinds, axis, transposed):
    own = jaxbce.Loss(lambda x, y, margin: jnp.square(x - y * margin), ("margin",))

    def trained(head):
        optimizer = nnx.Optimizer(head, optax.adamw(0.1), wrt=nnx.Param)
        for _ in range(2):
            result = head.update(optimizer, features(), positives=POSITIVES)
        options = {"per_label": (np.arange(37.0),), "where": np.arange(LABELS) > 3}
        result += head.update(optimizer, features(), loss=own, positives=POSITIVES, **options)
        top = head.top_k(features(), LABELS)
        assert nnx.jit(lambda head: head(features()))(head).shape == (BATCH, LABELS)
        return result, head(features()), top, nnx.state(head), nnx.state(optimizer)

    expected, got = map(trained, alone_and_padded(kinds, axis, transpose_kernel=transposed))
    assert_same_labels(got, expected)


def test_top_labels_without_a_bias_are_no_padding():
    for head in alone_and_padded((AUTO, AUTO), BOTH):
        head.kernel[...] = -jnp.abs(head.kernel[...])
        head.bias = None
        assert head.top_k(jnp.ones((1, WIDTH)), LABELS)[1].max() == LABELS - 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dtype", "bias"),
    [("float32", False), ("bfloat16", True), ("float8_e5m2", True)],
    ids=["float32, no bias", "bfloat16", "float8_e5m2"],
)
@jax.numpy_dtype_promotion("standard")
def test_padding_is_no_top_label_of_a_row_that_is_not_finite(dtype, bias):
    """Its logits are infinite or NaN, whose sign depends on the shape of the product."""
    special = list(itertools.product([np.inf, -np.inf, np.nan, -np.nan, 0, 1], repeat=3))
    x = np.pad(np.array(special, np.float32), ((0, 0), (0, WIDTH - 3)), constant_values=1)
    for axis in BOTH, "labels":
        alone, padded = alone_and_padded((AUTO, AUTO), axis, param_dtype=dtype)
        for head in alone, padded:
            # Some labels have 0 · ∞ where the others have ∞ or −∞.
            head.kernel[...] = head.kernel[...].at[:3, 3:LABELS:4].set(0)
            head.bias = head.bias if bias else None
        for k in 1, 6, LABELS:
            (expected, expected_labels), (got, labels) = (h.top_k(x, k) for h in (alone, padded))
            np.testing.assert_array_equal(labels, expected_labels)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


IDS = np.zeros((BATCH, 1), int)
ROWS = np.ones((BATCH, 1), bool)
OF_ELEMENTS = jaxbce.Loss(lambda x, y, margin: jnp.square(x - y * margin), ("margin",))
BAD_ARGUMENTS = {
    "labels, padded": {"labels": np.zeros((BATCH, 40))},
    "labels, transposed": {"labels": np.zeros((LABELS, BATCH))},
    "labels, list": {"labels": np.zeros((BATCH, LABELS)).tolist()},
    "labels, complex": {"labels": np.zeros((BATCH, LABELS), complex)},
    "labels and positives": {"labels": np.zeros((BATCH, LABELS)), "positives": IDS},
    "neither": {},
    "positives, list": {"positives": IDS.tolist()},
    "positives, float": {"positives": IDS + 0.5},
    "pos_weight, padded": {"positives": IDS, "pos_weight": np.ones(40)},
    "pos_weight, one": {"positives": IDS, "pos_weight": 2.0},
    "pos_weight, list": {"positives": IDS, "pos_weight": [1.0] * LABELS},
    "pos_weight, words": {"positives": IDS, "pos_weight": np.array(["1"] * LABELS)},
    "weight": {"positives": IDS, "weight": np.ones(LABELS)},
    "label_smoothing": {"positives": IDS, "label_smoothing": 2.0},
    "where, padded": {"positives": IDS, "where": np.ones(40, bool)},
    "where, int": {"positives": IDS, "where": np.ones(LABELS, int)},
    "where, list": {"positives": IDS, "where": [True] * LABELS},
    "where, rows": {"positives": IDS, "where": ROWS[:5]},
    "where, axes": {"positives": IDS, "where": ROWS[None, None]},
    "ignored, float": {"positives": IDS, "where": ROWS, "ignored": IDS + 0.7},
    "ignored, list": {"positives": IDS, "where": ROWS, "ignored": IDS.tolist()},
    "ignored, axes": {"positives": IDS, "where": ROWS, "ignored": IDS[0]},
    "ignored, bool": {"positives": IDS, "ignored": IDS > 0},
}
BAD_PER_LABEL = {
    "padded": (np.ones(40),),
    "array": np.ones(LABELS),
    "list": ([1.0] * LABELS,),
    "too many": (np.ones(LABELS),) * 2,
    "None": (None,),
}
BAD_VALUES = {
    "positives": {"positives": IDS + LABELS},
    "positives beyond padding": {"positives": IDS + 40},
    "ignored": {"positives": IDS, "ignored": IDS + LABELS, "where": ROWS},
    "labels": {"labels": np.eye(BATCH, LABELS, LABELS - 1) * 2},
    "pos_weight": {"positives": IDS, "pos_weight": -np.ones(LABELS)},
}


def losses_and_updates(arguments):
    yield lambda head: head.loss(features(), **arguments)
    yield lambda head: head.update(optimizer_of(head), features(), **arguments)[0]


BAD_CALLS = {
    **{
        f"{name}, {method}": call
        for name, arguments in BAD_ARGUMENTS.items()
        for method, call in zip(("loss", "update"), losses_and_updates(arguments), strict=True)
    },
    **{
        f"per_label, {name}": lambda head, per_label=per_label: head.update(
            optimizer_of(head), features(), loss=OF_ELEMENTS, positives=IDS, per_label=per_label
        )
        for name, per_label in BAD_PER_LABEL.items()
    },
    **{
        f"checked {name}, {method}": jaxbce.checked(call)
        for name, arguments in BAD_VALUES.items()
        for method, call in zip(("loss", "update"), losses_and_updates(arguments), strict=True)
    },
    **{
        f"k, {k!r}": lambda head, k=k: head.top_k(features(), k)
        for k in (0, LABELS + 1, 40, 2.5, "2", None, True, np.ones(1))
    },
}


def error_of(call, head):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(head)
    return caught.type, str(caught.value)


@pytest.fixture(scope="module")
def unchanged():
    """Heads for calls that fail, which changes nothing."""
    return alone_and_padded((AUTO, AUTO), BOTH)


@pytest.mark.thorough
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_padding_changes_no_error(call, unchanged):
    alone, padded = unchanged
    assert error_of(call, padded) == error_of(call, alone)


@pytest.mark.parametrize("writable", [True, False], ids=["writable", "read-only"])
@pytest.mark.parametrize("optimizer_too", [False, True], ids=["head", "head and optimizer"])
def test_arrays_of_numpy_that_were_loaded_stay_as_they_are(writable, optimizer_too):
    """As `np.load` or `jax.device_get` gives them: a step replaces them in the modules."""
    head, twin = make(), make()
    optimizers = [nnx.Optimizer(each, optax.adam(0.1), wrt=nnx.Param) for each in (head, twin)]
    modules = (head, optimizers[0]) if optimizer_too else (head,)
    loaded = jax.tree.map(np.array, nnx.state(modules))
    for leaf in jax.tree.leaves(loaded):
        leaf.flags.writeable = writable
    before = jax.tree.map(np.copy, loaded)
    nnx.update(modules, loaded)
    for each, optimizer in zip((head, twin), optimizers, strict=True):
        each.update(optimizer, features(), positives=POSITIVES)
    chex.assert_trees_all_equal(loaded, before)
    chex.assert_trees_all_equal(nnx.state(head), nnx.state(twin))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(modules)))


@pytest.mark.parametrize("method", ["loss", "update", "top_k", "__call__"])
def test_a_shared_table_without_room_for_the_padding(method, mesh):
    head = MultiLabelHead(
        WIDTH, 5, mesh=mesh, label_axis="batch", transpose_kernel=True, rngs=nnx.Rngs(0)
    )
    optimizer = optimizer_of(head)
    head.kernel = nnx.Embed(5, WIDTH, rngs=nnx.Rngs(1)).embedding
    calls = {
        "loss": lambda: head.loss(features(), positives=POSITIVES % 5),
        "update": lambda: head.update(optimizer, features(), positives=POSITIVES % 5),
        "top_k": lambda: head.top_k(features(), 2),
        "__call__": lambda: head(features()),
    }
    with pytest.raises(ValueError, match="kernel must be of 8 labels, as the bias is, got 5"):
        calls[method]()


def test_a_further_parameter_is_named():
    head = make()
    head.temperature = nnx.Param(jnp.ones(()))
    with pytest.raises(ValueError, match="wrt that also selects temperature; hold that in"):
        head.update(optimizer_of(head), features(), positives=POSITIVES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 10.0}, "num_labels must be an int of at least 1, got 10.0"),
        ({"in_features": 0}, "in_features must be an int of at least 1, got 0"),
        ({"label_axis": "labels"}, "mesh and batch_axis or label_axis go together"),
        ({"chunk_size": 0}, "chunk_size must be an int of at least 1, got 0"),
    ],
    ids=["num_labels", "in_features", "label_axis", "chunk_size"],
)
def test_a_wrong_option_is_found_where_the_head_is_made(options, message):
    sizes = {"in_features": WIDTH, "num_labels": LABELS}
    with pytest.raises(ValueError, match=f"MultiLabelHead: {message}"):
        MultiLabelHead(**(sizes | options), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("method", ["__call__", "loss", "update"])
def test_features_that_are_a_list_are_refused(method):
    """As the functions refuse them, and what an encoder returns beside its features."""
    head, rows = make(), [features()[0], features()[1]]
    arguments = {"positives": POSITIVES[:2]} if method != "__call__" else {}
    first = (optimizer_of(head),) if method == "update" else ()
    with pytest.raises(TypeError, match="features must be an array or a number, got list"):
        getattr(head, method)(*first, rows, **arguments)


# --- an encoder and the head in one call ---------------------------------------------------------


class Encoder(nnx.Module):
    def __init__(self, rngs, dtype):
        self.linear = nnx.Linear(4, WIDTH, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, inputs, scale):
        self.calls[...] += 1
        return self.dropout(self.norm(self.linear(inputs))) * scale


def trained_apart(model, optimizers, inputs, positives):
    """The encoder by `nnx.value_and_grad` of the whole loss, the head by its gradient."""

    def loss(encoder, head):
        return head.loss(encoder(*inputs), positives=positives)

    value, slopes = nnx.value_and_grad(loss, argnums=(0, 1))(*model)
    for module, optimizer, slope in zip(model, optimizers, slopes, strict=True):
        optimizer.update(module, slope)
    return value


def trained_together(model, optimizers, inputs, positives):
    value, slopes = model[1].update_with_encoder(
        optimizers[1], model[0], *inputs, positives=positives
    )
    optimizers[0].update(model[0], slopes)
    return value


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dtype", "of_encoder", "compiled"),
    [
        (None, optax.adam(0.1), False),
        (None, optax.MultiSteps(optax.adam(0.1), 2), True),
        (jnp.bfloat16, optax.adam(0.1), True),
        (jnp.bfloat16, optax.MultiSteps(optax.adam(0.1), 2), False),
    ],
    ids=[
        *("float32, eager", "float32, accumulated, nnx.jit"),
        *("mixed, nnx.jit", "mixed, accumulated, eager"),
    ],
)
@jax.numpy_dtype_promotion("standard")
def test_an_encoder_trains_as_with_the_whole_gradient(dtype, of_encoder, compiled):
    """With dropout, batch statistics and a count of its own."""

    def after(step):
        model = Encoder(nnx.Rngs(3), dtype), make(prior=0.1)
        optimizers = tuple(
            nnx.Optimizer(module, tx, wrt=nnx.Param)
            for module, tx in zip(model, (of_encoder, optax.sgd(0.5)), strict=True)
        )
        step = nnx.jit(step) if compiled else step
        inputs = jax.random.normal(jax.random.key(5), (3, BATCH, 4))
        losses = [step(model, optimizers, (each, 2.0), POSITIVES) for each in inputs]
        assert model[0].calls[...] == len(inputs)
        return losses, *(nnx.to_pure_dict(nnx.state(part)) for part in (model[0], model[1]))

    expected, got = after(trained_apart), after(trained_together)
    bound = 1e-5 if dtype is None else 2e-2
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(one, other, rtol=bound, atol=bound)
        else:
            assert jnp.array_equal(jax.random.key_data(one), jax.random.key_data(other))


def test_only_what_wrt_selects_of_the_encoder_has_a_gradient():
    encoder = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    head = MultiLabelHead(5, LABELS, rngs=nnx.Rngs(1))
    of_head = nnx.Optimizer(head, optax.sgd(0.1), wrt=nnx.Param)
    bias = nnx.All(nnx.Param, nnx.PathContains("bias"))
    _, slopes = head.update_with_encoder(
        of_head, encoder, jnp.ones((BATCH, 4)), wrt=bias, positives=POSITIVES
    )
    assert [leaf.shape for leaf in jax.tree.leaves(slopes)] == [(5,)]


@jax.custom_vjp
def without_derivative(x):
    return x


def no_derivative(_, slope):
    raise ArithmeticError("no derivative")


without_derivative.defvjp(lambda x: (x, None), no_derivative)
BAD_ENCODERS = {
    "no derivative": (without_derivative, ArithmeticError, "no derivative"),
    "rows": (list, TypeError, "encoder must return the features alone, got list"),
    "integers": (jnp.int32, TypeError, "features must be floating-point, got int32"),
}


class Through(nnx.Module):
    def __init__(self, fn):
        self.fn, self.scale, self.calls = fn, nnx.Param(jnp.ones(())), nnx.BatchStat(jnp.zeros(()))

    def __call__(self, inputs):
        self.calls[...] += 1
        return self.fn(inputs * self.scale)


@pytest.mark.parametrize(("fn", "error", "message"), BAD_ENCODERS.values(), ids=BAD_ENCODERS)
def test_an_encoder_that_fails_leaves_all_as_it_was(fn, error, message):
    head, encoder = make(prior=0.1), Through(fn)
    optimizer = nnx.Optimizer(head, optax.adam(0.1), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state((head, optimizer, encoder)))
    with pytest.raises(error, match=message):
        head.update_with_encoder(optimizer, encoder, features(), positives=POSITIVES)
    after = nnx.to_pure_dict(nnx.state((head, optimizer, encoder)))
    jax.tree.map(np.testing.assert_array_equal, after, before)


class Normalised(nnx.Module):
    """Writes its own kernel, as nnx.WeightNorm does, and takes its keys with the inputs."""

    def __init__(self):
        self.layer = nnx.Linear(4, WIDTH, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, inputs, rngs):
        kernel = self.layer.kernel[...]
        self.layer.kernel[...] = kernel / jnp.linalg.norm(kernel)
        return self.dropout(self.layer(inputs), rngs=rngs)


@pytest.mark.parametrize("transform", [lambda fn: fn, nnx.jit], ids=["eager", "jit"])
def test_what_the_forward_pass_writes_is_kept(transform):
    """Also to parameters, and to a module among the inputs."""

    def whole(head, encoder, of_head, inputs, rngs):
        def loss(head, encoder, rngs):
            return head.loss(encoder(inputs, rngs), positives=POSITIVES)

        value, slopes = nnx.value_and_grad(loss, argnums=(0, 1))(head, encoder, rngs)
        of_head.update(head, slopes[0])
        return value, slopes[1]

    def fused(head, encoder, of_head, inputs, rngs):
        return head.update_with_encoder(of_head, encoder, inputs, rngs, positives=POSITIVES)

    inputs, results = rng.normal(size=(BATCH, 4)).astype(np.float32), []
    for step in whole, fused:
        head, encoder, rngs = make(prior=0.1), Normalised(), nnx.Rngs(1)
        of_head, of_encoder = (
            nnx.Optimizer(part, optax.sgd(0.5), wrt=nnx.Param) for part in (head, encoder)
        )
        for _ in range(3):
            value, slopes = transform(step)(head, encoder, of_head, inputs, rngs)
            of_encoder.update(encoder, slopes)
        results.append((value, nnx.to_pure_dict(nnx.state((head, encoder, rngs.default.count)))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


class Permuted(nnx.Module):
    def __init__(self):
        self.order = nnx.Param(jnp.arange(BATCH))

    def __call__(self, inputs):
        return inputs[self.order[...]]


def test_an_encoder_with_parameters_that_are_no_floats_is_refused():
    head = make()
    of_head = nnx.Optimizer(head, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(TypeError, match="floats in what wrt selects, got int32; hold it in"):
        head.update_with_encoder(of_head, Permuted(), features(), positives=POSITIVES)
    with pytest.raises(ValueError, match="wrt selects nothing of the encoder"):
        head.update_with_encoder(
            of_head, Permuted(), features(), wrt=nnx.BatchStat, positives=POSITIVES
        )
    with pytest.raises(TypeError, match=r"no argument train, .*takes its inputs by position"):
        head.update_with_encoder(of_head, Permuted(), features(), positives=POSITIVES, train=True)
    with pytest.raises(ValueError, match=r"one of positives and labels must be given, got neither"):
        head.update_with_encoder(of_head, Permuted(), features(), POSITIVES)
    several = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="encoder must return the features alone, got tuple"):
        head.update_with_encoder(of_head, Both(several), features(), positives=POSITIVES)
    assert of_head.step[...] == 0


class Both(nnx.Module):
    def __init__(self, linear):
        self.linear = linear

    def __call__(self, inputs):
        return self.linear(inputs), inputs


def test_an_encoder_that_cannot_be_trained_apart():
    head, table = make(), nnx.Embed(LABELS, WIDTH, rngs=nnx.Rngs(0))
    of_head = nnx.Optimizer(head, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"encoder must be a flax.nnx.Module.*got function"):
        head.update_with_encoder(of_head, lambda x: x, features(), positives=POSITIVES)
    tied = make(transpose_kernel=True)
    tied.kernel = table.embedding
    with pytest.raises(ValueError, match="encoder must have parameters of its own"):
        tied.update_with_encoder(of_head, table, jnp.arange(BATCH), positives=POSITIVES)
