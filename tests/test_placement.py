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
from losses import LOSSES

import jaxbce
from jaxbce import _reduce

pytestmark = pytest.mark.thorough

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
}


def given(arguments, *names):
    return {name: arguments[name] for name in names}


# What each function is called with, and how each argument is sharded where it is.
CALLS = {
    "bce_with_logits": (jaxbce.bce_with_logits, LOGITS),
    "bce_with_logits, none": (
        functools.partial(jaxbce.bce_with_logits, reduction="none"),
        given(LOGITS, "logits", "labels", "pos_weight"),
    ),
    "bce_with_logits, axis": (
        functools.partial(jaxbce.bce_with_logits, axis=0, reduction="weighted_mean"),
        given(LOGITS, "logits", "labels", "weight", "where"),
    ),
    "focal_loss": (
        jaxbce.focal_loss,
        given(LOGITS, "logits", "labels", "weight", "where"),
    ),
    "asymmetric_loss": (jaxbce.asymmetric_loss, given(LOGITS, "logits", "labels", "where")),
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
# Where the first argument is, and where the others are.
CASES = [
    ("explicit", "sharded", "host"),
    ("explicit", "sharded", "replicated"),
    ("explicit", "host", "sharded"),
    ("explicit and automatic", "sharded", "sharded"),
]


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), KINDS[kind])


def value_and_gradients(call, arguments):
    """Of the squares, so that the cotangents differ."""
    moving = {n: v for n, v in arguments.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    if not moving:
        return call(**arguments)
    return jax.value_and_grad(lambda moving: jnp.sum(call(**(arguments | moving)) ** 2))(moving)


@functools.cache
def on_one_device(name):
    call, arguments = CALLS[name]
    host = {argument: value for argument, (value, _) in arguments.items()}
    return jax.jit(functools.partial(value_and_gradients, call))(host)


def place(value, spec, where, mesh):
    spec = Spec(*spec) if where == "sharded" else Spec()
    return value if where == "host" else jax.device_put(value, NamedSharding(mesh, spec))


# One of each kind in every place, since `_placement.compiled` runs them all; the others in one.
KIN = ["bce_with_logits", "linear_bce_with_logits", "linear_top_k", "siglip_loss"]
PLACES = [(name, *case) for name in CALLS for case in (CASES if name in KIN else CASES[:1])]


@pytest.mark.parametrize(
    ("name", "kind", "first", "others"),
    PLACES,
    ids=[f"{place[0]}-{place[1]}: {place[2]} first, {place[3]} others" for place in PLACES],
)
def test_the_place_of_an_argument_changes_nothing(name, kind, first, others):
    """Not a value, not a gradient; with the devices left to the compiler or named."""
    call, arguments = CALLS[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), KINDS[kind])
    placed = {
        argument: place(*arguments[argument], where, mesh)
        for argument, where in zip(arguments, [first] + [others] * len(arguments), strict=False)
    }
    both = jax.jit(functools.partial(value_and_gradients, call))
    expected = on_one_device(name)
    assert_close(both(placed), expected)
    if name in ON_A_MESH:
        shared = functools.partial(call, mesh=mesh, **ON_A_MESH[name])
        assert_close(jax.jit(functools.partial(value_and_gradients, shared))(placed), expected)


@pytest.mark.parametrize("name", CALLS)
def test_checked_on_a_mesh_of_explicit_axes(name):
    call, arguments = CALLS[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), KINDS["explicit"])
    placed = {n: place(*value, "sharded", mesh) for n, value in arguments.items()}
    jaxbce.checked(jax.jit(call))(**placed)


@pytest.mark.parametrize("name", ["bce_with_logits", "linear_bce_with_logits", "siglip_loss"])
def test_an_eager_gradient_where_the_mesh_is_set(name):
    """Without `jax.set_mesh`, JAX itself refuses one on a mesh of explicit axes."""
    call, arguments = CALLS[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), KINDS["explicit"])
    placed = {n: place(*value, "sharded", mesh) for n, value in arguments.items()}
    expected = value_and_gradients(call, {n: value for n, (value, _) in arguments.items()})
    with jax.set_mesh(mesh):
        assert_close(value_and_gradients(call, placed), expected)


@pytest.mark.parametrize("name", ON_A_MESH)
@pytest.mark.parametrize("kind", ["explicit", "automatic and explicit"])
def test_an_eager_gradient_on_a_named_mesh_of_arrays_on_the_host(name, kind):
    call, arguments = CALLS[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), KINDS[kind])
    host = {argument: value for argument, (value, _) in arguments.items()}
    shared = functools.partial(call, mesh=mesh, **ON_A_MESH[name])
    assert_close(value_and_gradients(shared, host), value_and_gradients(call, host))


# --- in the shards of jax.shard_map --------------------------------------------------------------


SHARDED = [(name, True) for name in CALLS if name != "siglip_loss"]
SHARDED += [(name, False) for name in KIN if name != "siglip_loss"]


@pytest.mark.parametrize(
    ("name", "check_vma"), SHARDED, ids=[f"{row[0]}-{'no ' * (not row[1])}vma" for row in SHARDED]
)
def test_in_shards_of_the_rows(name, check_vma):
    """Each device has its rows; what is the same on all gets the sum of the gradients of all."""
    call, arguments = CALLS[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), KINDS["automatic"])
    by_row = {n: Spec("data" if "data" in spec else None) for n, (_, spec) in arguments.items()}
    host = {n: value for n, (value, _) in arguments.items()}

    def parts(arguments):
        """The sum over devices of what each makes of its rows."""

        def part(arguments):
            result = call(**arguments)
            return jax.lax.psum(jnp.sum(result.astype(jnp.float32) ** 2), "data")

        return jax.shard_map(
            part, mesh=mesh, in_specs=(by_row,), out_specs=Spec(), check_vma=check_vma
        )(arguments)

    def dense(arguments):
        total = 0.0
        for i in range(4):
            rows = slice(i * ROWS // 4, (i + 1) * ROWS // 4)
            own = {n: v[rows] if by_row[n] == Spec("data") else v for n, v in arguments.items()}
            total += jnp.sum(call(**own).astype(jnp.float32) ** 2)
        return total

    def both(fn):
        return jax.jit(lambda arguments: value_and_gradients(lambda **a: fn(a), arguments))(host)

    assert_close(both(parts), both(dense))


def test_pairs_in_shards():
    """Images by device, texts the same on all."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), KINDS["automatic"])
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

BATCHED = {"logits", "labels", "weight", "where", "features", "positives"}
BATCHED |= {"image_embeddings", "text_embeddings"}
HUGE = jax.ShapeDtypeStruct((2**18, 2**17), jnp.bfloat16)  # 2^35 elements
HUGE_MASKS = {"none": None, "full": HUGE.shape, "rows": (2**18, 1), "labels": (2**17,)}
REDUCTIONS = ["mean", "weighted_mean", "sum", "batchmean", "none"]


def with_options(name):
    """The function called, with each reduction that it takes."""
    call, _ = CALLS[name]
    plain = getattr(call, "func", call)
    if name == "siglip_loss":
        return [("", plain)]  # no chunk_size: it divides a known number of texts
    if "reduction" not in inspect.signature(plain).parameters:
        return [("", call)]
    some = REDUCTIONS if name in KIN else REDUCTIONS[:1]
    return [(f", {how}", functools.partial(plain, reduction=how)) for how in some]


EXPORTED = {
    name + option: (call, CALLS[name][1])
    for name in CALLS
    if ", " not in name
    for option, call in with_options(name)
}


@pytest.mark.parametrize(("call", "arguments"), EXPORTED.values(), ids=list(EXPORTED))
def test_export_with_a_symbolic_batch(call, arguments):
    (batch,) = jax.export.symbolic_shape("batch")
    symbolic = {
        n: jax.ShapeDtypeStruct((batch, *v.shape[1:]) if n in BATCHED else v.shape, v.dtype)
        for n, (v, _) in arguments.items()
    }
    fn = jax.jit(functools.partial(value_and_gradients, call))
    exported = jax.export.export(fn)(symbolic)
    for rows in (1, 5) if call is jaxbce.bce_with_logits else (5,):
        host = {n: v[:rows] if n in BATCHED else v for n, (v, _) in arguments.items()}
        assert_close(exported.call(host), fn(host))


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
