"""Where arguments live changes no result: meshes of every kind, shards, symbolic and huge sizes."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec
from losses import FIRST, FUNCTIONS, LOSSES

import jaxbce
from jaxbce import _reduce

# No test here asks what the compiler makes of a program.
pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("compile_fast")]

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ROWS, LABELS, WIDTH = 8, 24, 3
SMALL_INTS = np.random.default_rng(0).integers(-1, LABELS, (ROWS, 4)).astype(np.int32)
RNG = np.random.default_rng(1)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def positive(*shape):
    return RNG.uniform(0.5, 2, shape).astype(np.float32)


LOGITS = {
    "logits": (normal(ROWS, LABELS), ("data", "model")),
    "labels": (RNG.random((ROWS, LABELS)).astype(np.float32), ("data", "model")),
    "weight": (positive(ROWS, 1), ("data", None)),
    "pos_weight": (positive(LABELS), ("model",)),
    "where": (RNG.random((ROWS, LABELS)) < 0.7, ("data", "model")),
}
LAYER = {
    "features": (normal(ROWS, WIDTH), ("data", None)),
    "kernel": (normal(WIDTH, LABELS), (None, "model")),
    "bias": (normal(LABELS), ("model",)),
}
HEAD = LAYER | {"positives": (SMALL_INTS, ("data", None)), "weight": (positive(ROWS), ("data",))}
PAIRS = {
    "image_embeddings": (normal(ROWS, WIDTH), ("data", None)),
    "text_embeddings": (normal(ROWS, WIDTH), ("data", None)),
    "log_scale": (np.float32(0.3), ()),
    "bias": (np.float32(-1), ()),
    "ignored": (np.roll(np.arange(ROWS, dtype=np.int32), 1)[:, None], ("data", None)),
    "weight": (positive(ROWS), ("data",)),
    "text_bias": (normal(ROWS), ("data",)),
}


def given(arguments, *names):
    return {name: arguments[name] for name in names}


def by_elements(name):
    """The call of a loss of the matrix, with what it requires."""
    fn, loss = getattr(jaxbce, name), FIRST[name]
    score_name = next(iter(inspect.signature(fn).parameters))
    scores, _ = loss.draw(RNG, (ROWS, LABELS))
    required = {
        own: (np.float32(value), ("data", "model")[2 - value.ndim :])
        for own, value in loss.required(RNG, (ROWS, LABELS)).items()
    }
    arguments = {score_name: (scores, ("data", "model"))} | given(LOGITS, "labels")
    return fn, arguments | required | given(LOGITS, "weight", "where")


# What each function is called with, and how each argument is sharded where it is.
CALLS = {name: by_elements(name) for name in FUNCTIONS if FIRST[name].own_kernel} | {
    "bce_with_logits": (jaxbce.bce_with_logits, LOGITS),
    "bce_with_logits, none": (
        functools.partial(jaxbce.bce_with_logits, reduction="none"),
        given(LOGITS, "logits", "labels", "pos_weight"),
    ),
    "bce_with_logits, axis": (
        functools.partial(jaxbce.bce_with_logits, axis=0, reduction="weighted_mean"),
        given(LOGITS, "logits", "labels", "weight", "where"),
    ),
    "sparse_bce_with_logits": (
        jaxbce.sparse_bce_with_logits,
        given(LOGITS, "logits", "where") | given(HEAD, "positives"),
    ),
    "linear_bce_with_logits": (
        functools.partial(jaxbce.linear_bce_with_logits, chunk_size=5),
        HEAD,
    ),
    "linear_bce_with_logits, none": (
        functools.partial(jaxbce.linear_bce_with_logits, reduction="none", chunk_size=5),
        LAYER | given(LOGITS, "labels", "pos_weight"),
    ),
    "linear_top_k": (
        lambda **options: jaxbce.linear_top_k(**options, k=3, chunk_size=5)[0],
        LAYER,
    ),
    "siglip_loss": (functools.partial(jaxbce.siglip_loss, chunk_size=3), PAIRS),
    "balanced_pos_weight": (jaxbce.balanced_pos_weight, given(LOGITS, "labels", "where")),
    "prior_bias": (
        functools.partial(jaxbce.prior_bias, num_labels=LABELS),
        given(HEAD, "positives"),
    ),
    "multi_hot": (functools.partial(jaxbce.multi_hot, num_labels=LABELS), given(HEAD, "positives")),
    "positives_from_multi_hot": (
        lambda where: jaxbce.positives_from_multi_hot(where, LABELS),
        given(LOGITS, "where"),
    ),
}
ON_A_MESH = {
    "linear_bce_with_logits": {"batch_axis": "data", "label_axis": "model"},
    "linear_bce_with_logits, none": {"batch_axis": "data", "label_axis": "model"},
    "linear_top_k": {"batch_axis": "data", "label_axis": "model"},
    "siglip_loss": {"axis": "data"},
}
KINDS = {
    "explicit": (EXPLICIT, EXPLICIT),
    "explicit and automatic": (EXPLICIT, AUTO),
    "automatic and explicit": (AUTO, EXPLICIT),
    "automatic": (AUTO, AUTO),
}


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), KINDS[kind])


def value_and_gradients(call, arguments):
    """Of the squares, so that the cotangents differ."""
    moving = {n: v for n, v in arguments.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    if not moving:
        return call(**arguments)
    return jax.value_and_grad(lambda moving: jnp.sum(call(**(arguments | moving)) ** 2))(moving)


def host_arguments(name):
    return {argument: value for argument, (value, _) in CALLS[name][1].items()}


@functools.cache
def on_one_device(name):
    call, _ = CALLS[name]
    return jax.jit(functools.partial(value_and_gradients, call))(host_arguments(name))


def shared_on(mesh, name):
    return functools.partial(CALLS[name][0], mesh=mesh, **ON_A_MESH[name])


def put(value, spec, where, mesh):
    spec = Spec(*spec) if where == "sharded" else Spec()
    return value if where == "host" else jax.device_put(value, NamedSharding(mesh, spec))


# Where the first argument is, and where the others are.
PLACES = [
    ("explicit", "sharded", "host"),
    ("explicit", "sharded", "replicated"),
    ("explicit", "host", "sharded"),
    ("explicit and automatic", "sharded", "sharded"),
]
# One of each kind in every place, since `_placement.compiled` runs them all; the others in one.
KIN = ["bce_with_logits", "linear_bce_with_logits", "linear_top_k", "siglip_loss"]
# What also runs on a named mesh: the head and the pairs, each in some of the places.
NAMED = {
    PLACES[0]: ["linear_bce_with_logits", "linear_bce_with_logits, none"],
    PLACES[1]: ["siglip_loss"],
    PLACES[2]: ["linear_bce_with_logits", "siglip_loss"],
    PLACES[3]: ["linear_bce_with_logits", "siglip_loss"],
}


@pytest.mark.parametrize(
    "place",
    PLACES,
    ids=[f"{kind}: {first} first, {others} others" for kind, first, others in PLACES],
)
def test_the_place_of_an_argument_changes_nothing(place):
    """Not a value, not a gradient; with the devices left to the compiler or named."""
    kind, first, others = place
    mesh = mesh_of(kind)
    placed = {
        name: {
            argument: put(*value, where, mesh)
            for (argument, value), where in zip(
                arguments.items(), [first] + [others] * len(arguments), strict=False
            )
        }
        for name, (_, arguments) in CALLS.items()
        if name in KIN or place == PLACES[0]
    }
    named = {name: shared_on(mesh, name) for name in NAMED[place]}

    @jax.jit
    def everything(placed):
        """In one program: most of the time of many is that of preparing each."""
        results = {n: value_and_gradients(CALLS[n][0], each) for n, each in placed.items()}
        return results, {n: value_and_gradients(fn, placed[n]) for n, fn in named.items()}

    results, on_named = everything(placed)
    expected = {name: on_one_device(name) for name in placed}
    assert_close(results, expected)
    assert_close(on_named, {name: expected[name] for name in named})


# jax 0.8 and 0.9 lose the type of an array on the way back through their own slices.
MADE_BEFORE = [*KIN, "linear_bce_with_logits, none"]
if jax.__version_info__ < (0, 10):
    MADE_BEFORE.remove("linear_top_k")


@pytest.mark.parametrize("name", MADE_BEFORE)
def test_arrays_made_before_the_mesh_around(name):
    """Their types name no mesh, and those of new arrays do."""
    arguments = jax.tree.map(jnp.asarray, host_arguments(name))
    with jax.set_mesh(mesh_of("explicit")):
        got = value_and_gradients(CALLS[name][0], arguments)
    assert_close(got, on_one_device(name))


@pytest.mark.parametrize("name", CALLS)
def test_checked_on_a_mesh_of_explicit_axes(name):
    call, arguments = CALLS[name]
    mesh = mesh_of("explicit")
    placed = {n: put(*value, "sharded", mesh) for n, value in arguments.items()}
    jaxbce.checked(jax.jit(call))(**placed)


@pytest.mark.parametrize("name", ["bce_with_logits", "linear_bce_with_logits", "siglip_loss"])
def test_an_eager_gradient_where_the_mesh_is_set(name):
    """Without `jax.set_mesh`, JAX itself refuses one on a mesh of explicit axes."""
    call, arguments = CALLS[name]
    mesh = mesh_of("explicit")
    placed = {n: put(*value, "sharded", mesh) for n, value in arguments.items()}
    with jax.set_mesh(mesh):
        assert_close(value_and_gradients(call, placed), on_one_device(name))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("linear_bce_with_logits", "explicit"),
        ("linear_bce_with_logits, none", "automatic and explicit"),
        ("siglip_loss", "explicit"),
        ("siglip_loss", "automatic and explicit"),
    ],
)
def test_an_eager_gradient_on_a_named_mesh_of_arrays_on_the_host(name, kind):
    shared = shared_on(mesh_of(kind), name)
    assert_close(value_and_gradients(shared, host_arguments(name)), on_one_device(name))


# Of the logits, with which the other arguments below have axes of the mesh in common.
OVERLAPPING = {
    "rows on both": (("data", "model"), None),
    "labels on both": (None, ("model", "data")),
    "rows on the axis of labels": ("model", None),
}


@pytest.mark.parametrize("spec", OVERLAPPING.values(), ids=OVERLAPPING)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_loss_of_each_element_is_sharded_as_its_logits(loss, spec):
    """Also where an axis of the mesh shards another axis of another argument."""
    mesh = mesh_of("explicit")
    scores, labels = loss.draw(np.random.default_rng(2), (ROWS, LABELS))
    options = {"weight": positive(1, LABELS), "where": np.ones((ROWS, LABELS), bool)}
    if loss.pos_weight:
        options["pos_weight"] = positive(LABELS)
    expected = loss.unreduced(scores, labels, **options)
    others = {n: put(v, (None, "model")[-v.ndim :], "sharded", mesh) for n, v in options.items()}
    for labels_spec in [(None, "model"), ("data", "model")]:
        got = jax.jit(loss.unreduced)(
            put(scores, spec, "sharded", mesh), put(labels, labels_spec, "sharded", mesh), **others
        )
        assert_close(got, expected)
        assert jax.typeof(got).sharding.spec == Spec(*spec)


@pytest.mark.parametrize("num_labels", [5, 6])
def test_a_sparse_loss_is_not_sharded_by_place_among_the_ids(num_labels):
    """The last axis of ids is not that of labels, whatever shards it."""
    mesh = mesh_of("explicit")
    logits, ids = np.zeros((4, num_labels), np.float32), np.array([[0, 4]] * 4)
    loss = jax.jit(functools.partial(jaxbce.sparse_bce_with_logits, reduction="none"))
    expected = loss(logits, ids)
    got = loss(
        put(logits, ("data", None), "sharded", mesh), put(ids, (None, "model"), "sharded", mesh)
    )
    assert_close(got, expected)
    assert jax.typeof(got).sharding.spec == Spec("data", None)


@pytest.mark.parametrize("call", ["multi_hot", "positives_from_multi_hot"])
def test_labels_are_sharded_by_row_as_what_they_are_made_of(call):
    """Each row is whole: none of its labels is on another device."""
    made = {
        "multi_hot": functools.partial(jaxbce.multi_hot, num_labels=LABELS),
        "positives_from_multi_hot": functools.partial(
            jaxbce.positives_from_multi_hot, max_positives=4
        ),
    }[call]
    rows = put(np.ones((ROWS, 4), np.int32), ("data", None), "sharded", mesh_of("explicit"))
    assert jax.typeof(jax.jit(made)(rows)).sharding.spec == Spec("data", None)


# --- in the shards of jax.shard_map --------------------------------------------------------------


# Each in a program of its own, as one that JAX refuses should be named.
SHARDED = [(name, True) for name in CALLS if name != "siglip_loss"]
SHARDED += [(name, False) for name in ("bce_with_logits", "linear_bce_with_logits")]


@pytest.mark.parametrize(
    ("name", "check_vma"), SHARDED, ids=[f"{row[0]}-{'no ' * (not row[1])}vma" for row in SHARDED]
)
def test_in_shards_of_the_rows(name, check_vma):
    """Each device has its rows; what is the same on all gets the sum of the gradients of all."""
    call, arguments = CALLS[name]
    by_row = {n: Spec("data" if "data" in spec else None) for n, (_, spec) in arguments.items()}

    def squares(arguments):
        return jnp.sum(call(**arguments).astype(jnp.float32) ** 2)

    parts = jax.shard_map(
        lambda arguments: jax.lax.psum(squares(arguments), "data"),
        mesh=mesh_of("automatic"),
        in_specs=(by_row,),
        out_specs=Spec(),
        check_vma=check_vma,
    )
    got = jax.jit(functools.partial(of_all_floats, parts))(host_arguments(name))
    assert_close(got, of_each_share(name, by_row, squares))


def of_all_floats(fn, arguments):
    """The value of `fn` of a dictionary, and its gradient where there are floats in it."""
    moving = {n: v for n, v in arguments.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    return jax.value_and_grad(lambda moving: fn(arguments | moving))(moving)


def of_each_share(name, by_row, squares):
    """What `test_in_shards_of_the_rows` expects: four calls of one program, put together."""
    arguments = host_arguments(name)
    own = [n for n in arguments if by_row[n] == Spec("data")]
    program = jax.jit(functools.partial(of_all_floats, squares))
    shares = []
    for rows in np.split(np.arange(ROWS), 4):
        shares.append(program(arguments | {n: arguments[n][rows] for n in own}))
    value = sum(value for value, _ in shares)
    slopes = {n: [gradient[n] for _, gradient in shares] for n in shares[0][1]}
    together = {n: np.concatenate(s) if n in own else sum(s) for n, s in slopes.items()}
    return value, together


def test_pairs_in_shards():
    """Images by device, texts the same on all."""
    mesh = mesh_of("automatic")
    images, texts = PAIRS["image_embeddings"][0], normal(2, WIDTH)

    def loss(images, texts):
        return jaxbce.siglip_loss(images, texts, 0.3, -1.0, chunk_size=1)

    def shared(images, texts):
        part = jax.shard_map(
            lambda *arguments: jax.lax.psum(loss(*arguments), "data"),
            mesh=mesh,
            in_specs=(Spec("data"), Spec()),
            out_specs=Spec(),
        )
        return part(images, texts)

    def dense(images, texts):
        return sum(loss(images[2 * i : 2 * i + 2], texts) for i in range(4))

    both = (
        jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(images, texts) for fn in (shared, dense)
    )
    assert_close(*both)


# --- sizes ---------------------------------------------------------------------------------------

BATCHED = {"logits", "probs", "labels", "weight", "where", "features", "positives"}
BATCHED |= {"image_embeddings", "text_embeddings", "ignored", "text_bias"}
HUGE = jax.ShapeDtypeStruct((2**18, 2**17), jnp.bfloat16)  # 2^35 elements
HUGE_MASKS = {"none": None, "full": HUGE.shape, "rows": (2**18, 1), "labels": (2**17,)}
REDUCTIONS = ["mean", "weighted_mean", "sum", "batchmean", "none"]


def with_options(name):
    """The function called, with each reduction that it takes."""
    call, _ = CALLS[name]
    plain = getattr(call, "func", call)
    if name == "siglip_loss":
        return {name: plain}  # no chunk_size: it divides a known number of texts
    if "reduction" not in inspect.signature(plain).parameters:
        return {name: call}
    some = REDUCTIONS if name in KIN else REDUCTIONS[:1]
    return {f"{name}, {how}": functools.partial(plain, reduction=how) for how in some}


# In programs of many: most of the time of one is that of preparing it.
EXPORTED = {name: with_options(name) for name in ("bce_with_logits", "linear_bce_with_logits")}
EXPORTED["the others"] = {
    name: call
    for other in CALLS
    if ", " not in other and other not in EXPORTED
    for name, call in with_options(other).items()
}


@pytest.mark.parametrize("calls", EXPORTED.values(), ids=list(EXPORTED))
def test_export_with_a_symbolic_batch(calls):
    (batch,) = jax.export.symbolic_shape("batch")
    arguments = {name: host_arguments(name.split(",")[0]) for name in calls}

    def batched(change):
        return {
            name: {n: change(v) if n in BATCHED else v for n, v in each.items()}
            for name, each in arguments.items()
        }

    @jax.jit
    def everything(arguments):
        return {n: value_and_gradients(calls[n], each) for n, each in arguments.items()}

    symbolic = batched(lambda v: jax.ShapeDtypeStruct((batch, *v.shape[1:]), v.dtype))
    exported = jax.export.export(everything)(symbolic)
    for rows in (1, 5) if "bce_with_logits, mean" in calls else (5,):
        some = batched(lambda v, rows=rows: v[:rows])
        assert_close(exported.call(some), everything(some))


@pytest.mark.parametrize("mask", [(ROWS, 1), (LABELS,), ()], ids=["rows", "labels", "scalar"])
def test_export_with_a_mask_that_broadcasts(mask):
    (batch,) = jax.export.symbolic_shape("batch")
    logits, where = LOGITS["logits"][0], RNG.random(mask) < 0.7
    fn = jax.jit(lambda x, where: jaxbce.bce_with_logits(x, x > 0, where=where))
    symbolic = (batch, 1) if mask == (ROWS, 1) else mask
    exported = jax.export.export(fn)(
        jax.ShapeDtypeStruct((batch, LABELS), np.float32), jax.ShapeDtypeStruct(symbolic, bool)
    )
    assert_close(exported.call(logits, where), fn(logits, where))


def test_export_of_a_head_asks_for_the_number_of_labels():
    (labels,) = jax.export.symbolic_shape("labels")
    shapes = ((ROWS, WIDTH), np.float32), ((WIDTH, labels), np.float32), ((ROWS, 4), np.int32)
    fn = jax.jit(lambda f, k, p: jaxbce.linear_bce_with_logits(f, k, positives=p))
    with pytest.raises(ValueError, match=r"kernel must have a number of labels that is known"):
        jax.export.export(fn)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))


def test_export_of_pairs_asks_for_no_chunk():
    (batch,) = jax.export.symbolic_shape("batch")
    array = jax.ShapeDtypeStruct((batch, WIDTH), np.float32)
    fn = jax.jit(lambda i, t: jaxbce.siglip_loss(i, t, 0.0, 0.0, chunk_size=2))
    with pytest.raises(ValueError, match=r"chunk_size must be None .* symbolic, got 2"):
        jax.export.export(fn)(array, array)


# Every loss reduces by the same code: each by a full mask, one by every mask in every way.
HUGE_CASES = [(loss, "full", "mean") for loss in LOSSES[1:]]
HUGE_CASES += [(LOSSES[0], mask, how) for mask in HUGE_MASKS for how in REDUCTIONS]


@pytest.mark.parametrize(
    ("loss", "mask", "reduction"),
    HUGE_CASES,
    ids=[f"{loss.name}-{mask}-{how}" for loss, mask, how in HUGE_CASES],
)
def test_more_elements_than_an_int32_counts(loss, mask, reduction):
    shape = HUGE_MASKS[mask]
    where = None if shape is None else jax.ShapeDtypeStruct(shape, bool)
    labels = jax.ShapeDtypeStruct(HUGE.shape, np.float32)

    def total(scores, labels, where):
        return jnp.sum(loss.call(scores, labels, where=where, reduction=reduction))

    assert jax.eval_shape(jax.grad(total), HUGE, labels, where).shape == HUGE.shape


def test_a_huge_mean_is_right():
    """2^34 elements, of a mask that broadcasts: the divisor is a product that no int32 holds."""
    where = jnp.array([[True], [False]])
    counted = _reduce.count_true(where, (0, 1), jnp.float32)
    counted = counted * _reduce.repeats(where.shape, (2, 2**33), (0, 1), jnp.float32)
    assert counted == 2.0**33


def test_a_huge_head_and_huge_counts():
    ids = jax.ShapeDtypeStruct((2**20, 3), np.int32)
    features = jax.ShapeDtypeStruct((2**20, 8), np.float32)
    kernel = jax.ShapeDtypeStruct((8, 2**27), np.float32)
    mask = jax.ShapeDtypeStruct(HUGE.shape, bool)
    jax.eval_shape(
        jax.grad(lambda f, k, p: jaxbce.linear_bce_with_logits(f, k, positives=p), (0, 1)),
        features,
        kernel,
        ids,
    )
    jax.eval_shape(lambda f, k: jaxbce.linear_top_k(f, k, k=3), features, kernel)
    jax.eval_shape(jax.grad(lambda x: jaxbce.siglip_loss(x, x, 0.0, 0.0)), features)
    jax.eval_shape(lambda y, where: jaxbce.balanced_pos_weight(y, where=where), mask, mask)
    jax.eval_shape(jaxbce.sparse_bce_with_logits, HUGE, jax.ShapeDtypeStruct((2**18, 3), np.int32))
