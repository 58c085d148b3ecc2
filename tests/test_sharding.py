"""The chunked head on a mesh of eight virtual devices against the same head on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from heads import (
    assert_close,
    draw_arguments,
    every_order,
    head,
    hessian_vector_product,
    value_and_gradients,
)
from jax.sharding import NamedSharding, PartitionSpec
from programs import collectives

import jaxbce

pytestmark = pytest.mark.usefixtures("compile_fast")

ROWS, WIDTH, LABELS = 8, 3, 24
AXES = {
    "both": {"batch_axis": "data", "label_axis": "model"},
    "batch": {"batch_axis": "data"},
    "labels": {"label_axis": "model"},
}
every_layout = pytest.mark.parametrize("axes", AXES.values(), ids=AXES)


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)


def draw(rng, target="positives", dtype=np.float32):
    drawn = draw_arguments(rng, ROWS, WIDTH, LABELS, dtype, target == "labels")
    if target == "positives":  # duplicates, padding and ids of every shard
        drawn["positives"] = jnp.asarray(rng.integers(-2, LABELS + 2, (ROWS, 6)))
    return drawn


@pytest.mark.parametrize(
    ("layout", "reduction", "target"),
    [
        ("both", "mean", "labels"),
        ("both", "none", "positives"),
        ("batch", "none", "positives"),
        ("labels", "mean", "labels"),
    ],
)
def test_value_and_gradients_are_those_of_one_device(layout, reduction, target, mesh, rng):
    """Of every argument, with chunks that do not divide a shard."""
    axes = AXES[layout]
    arguments = draw(rng, target)
    cotangent = rng.normal(size=ROWS) if reduction == "none" else 0.7
    one = functools.partial(head, reduction=reduction, chunk_size=4)
    many = functools.partial(one, mesh=mesh, **axes)
    got = value_and_gradients(many, arguments, cotangent)
    assert_close(got, value_and_gradients(one, arguments, cotangent))


def test_plain_positives_are_ids_of_the_whole_kernel(mesh, rng):
    arguments = {k: v for k, v in draw(rng).items() if k in ("features", "kernel", "positives")}
    many = functools.partial(head, mesh=mesh, **AXES["both"])
    assert_close(value_and_gradients(many, arguments), value_and_gradients(head, arguments))


@pytest.mark.parametrize(
    ("layout", "placed"),
    [("both", False), ("both", True), ("batch", False), ("labels", True)],
    ids=["both-on one device", "both-on the mesh", "batch-on one device", "labels-on the mesh"],
)
def test_explicit_axes(layout, placed, rng):
    """What a newer `jax.make_mesh` makes by default: types say how arrays are sharded."""
    axes = AXES[layout]
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)
    arguments = draw(rng)
    expected = value_and_gradients(head, arguments)
    if placed:
        sharding = NamedSharding(mesh, PartitionSpec(None, axes.get("label_axis")))
        arguments["kernel"] = jax.device_put(arguments["kernel"], sharding)
    got = value_and_gradients(functools.partial(head, mesh=mesh, chunk_size=4, **axes), arguments)
    assert_close(got, expected)


NO_IDS = np.zeros((ROWS, 0), np.int32)
FOCAL = functools.partial(jaxbce.focal_loss, reduction="none")


def of_ids(name, mesh, **given):
    """The loss of a function that takes ids, with its kernel on the mesh, if there is one."""
    on_mesh = {} if mesh is None else {"mesh": mesh, **AXES["both"]}
    features, kernel = np.full((ROWS, WIDTH), 0.3, np.float32), np.eye(WIDTH, LABELS, 2, np.float32)
    if mesh is not None:
        kernel = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(None, "model")))
    if name == "siglip_loss":
        on_ring = {} if mesh is None else {"mesh": mesh, "axis": ("data", "model")}
        return jaxbce.siglip_loss(features, features, 0.5, -1.0, **given, **on_ring)
    if name == "linear_update":
        optimizer, params = optax.sgd(0.1), {"kernel": kernel}
        state = optimizer.init(params)
        return jaxbce.linear_update(optimizer, features, params, state, **given, **on_mesh).loss
    head = {
        "linear_bce_with_logits": jaxbce.linear_bce_with_logits,
        "linear_loss": functools.partial(jaxbce.linear_loss, FOCAL),
    }[name]
    return head(features, kernel, **given, **on_mesh)


every_function_of_ids = pytest.mark.parametrize(
    "name", ["linear_bce_with_logits", "linear_loss", "linear_update", "siglip_loss"]
)
every_kind = pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2], ids=str)


@pytest.mark.thorough
@every_function_of_ids
@every_kind
def test_no_ids(name, kind):
    """As `positives_from_rows` makes of rows that are all empty, or an optional `ignored`."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2)
    for given in ({"positives": NO_IDS}, {"positives": np.ones((ROWS, 1), int), "ignored": NO_IDS}):
        assert_close(of_ids(name, mesh, **given), of_ids(name, None, **given))


@pytest.mark.thorough
@every_function_of_ids
@every_kind
def test_checked(name, kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2)
    call, right = functools.partial(of_ids, name, mesh), {"positives": np.full((ROWS, 2), 3)}
    right["positives"][0] = -1
    assert_close(jaxbce.checked(call)(**right), call(**right))
    for wrong in (
        right | {"ignored": right["positives"] + 30},
        {"positives": right["positives"] - 5},
    ):
        with pytest.raises(ValueError, match=rf"^{name}: (positives|ignored) must be in \[0, "):
            jaxbce.checked(call)(**wrong)


def test_bfloat16_on_a_mesh(mesh, rng):
    arguments = draw(rng, "labels", jnp.bfloat16)
    many = functools.partial(head, mesh=mesh, chunk_size=4, **AXES["both"])
    got, expected = value_and_gradients(many, arguments), value_and_gradients(head, arguments)
    assert_close(got, expected, 1e-2)


def test_eager_gradient_on_a_mesh(mesh, rng):
    arguments = draw(rng)
    features = arguments.pop("features")

    def loss(features, **options):
        return head({"features": features} | arguments, **options)

    got = jax.grad(loss)(features, mesh=mesh, **AXES["both"])
    assert_close(got, jax.grad(loss)(features))


@pytest.mark.thorough
@every_order
def test_hessian_vector_product(order, mesh, rng):
    arguments = draw(rng)
    point = {name: arguments[name] for name in ("features", "kernel", "bias")}
    along = {n: jnp.asarray(rng.normal(size=v.shape), v.dtype) for n, v in point.items()}

    def product(**options):
        def total(point):
            return head(arguments | point, chunk_size=4, reduction="sum", **options)

        return hessian_vector_product(total, point, along, order)

    assert_close(product(mesh=mesh, **AXES["both"]), product())


# --- communication, from the compiler ------------------------------------------------------------


def placed_shape(mesh, shape, *spec, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def compiled_gradients(num_labels, mesh, axes, batch=64, width=16):
    batch_axis, label_axis = axes.get("batch_axis"), axes.get("label_axis")
    array = functools.partial(placed_shape, mesh)

    def loss(features, kernel, bias, positives):
        return jaxbce.linear_bce_with_logits(
            features, kernel, bias, positives=positives, mesh=mesh, chunk_size=512, **axes
        )

    arguments = (
        array((batch, width), batch_axis, None),
        array((width, num_labels), None, label_axis),
        array((num_labels,), label_axis),
        array((batch, 4), batch_axis, None, dtype=np.int32),
    )
    gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))
    return jax.jit(gradients).lower(*arguments).compile()


def test_no_collective_grows_with_the_labels(mesh):
    small, large = (
        collectives(compiled_gradients(labels, mesh, AXES["labels"]).as_text())
        for labels in (2**14, 2**17)
    )
    assert small
    assert sorted(small) == sorted(large)


def test_with_data_parallel_rows_only_the_gradient_of_kernel_and_bias_is_reduced(mesh):
    num_labels = 2**16
    text = compiled_gradients(num_labels, mesh, AXES["both"]).as_text()
    growing = [size for size in collectives(text) if size >= num_labels // 4]
    assert sorted(growing) == [num_labels // 4, 16 * num_labels // 4]
    assert f"[64,{num_labels}]" not in text
    assert f"[32,{num_labels // 4}]" not in text


def test_over_one_device_nothing_is_reduced(rng):
    one = jax.make_mesh((1, 1), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    assert not collectives(compiled_gradients(2**14, one, AXES["both"]).as_text())


# --- top k ---------------------------------------------------------------------------------------


@every_layout
def test_zeros_of_both_signs_are_equal_logits_on_a_mesh(axes, mesh):
    features, kernel = -np.ones((ROWS, 1), np.float32), np.zeros((1, LABELS), np.float32)
    kernel[0, ::2] = -0.0
    _, ids = jaxbce.linear_top_k(features, kernel, k=9, mesh=mesh, chunk_size=3, **axes)
    np.testing.assert_array_equal(ids, [range(9)] * ROWS)


@pytest.mark.parametrize("k", [1, 5, 9, LABELS], ids="k={}".format)
@every_layout
def test_top_k_is_that_of_the_dense_logits(axes, k, mesh, rng):
    """Ties within and across shards included, and more than a shard has labels (6)."""
    features = rng.integers(-2, 3, (2, ROWS // 2, WIDTH)).astype(np.float32)
    kernel = rng.integers(-1, 2, (WIDTH, LABELS)).astype(np.float32)
    bias = np.zeros(LABELS, np.float32)
    bias[[1, 6]] = -np.inf
    expected = jax.lax.top_k(features @ kernel + bias[None, None], k)
    got = jaxbce.linear_top_k(features, kernel, bias, k=k, mesh=mesh, chunk_size=2, **axes)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@every_layout
def test_gradients_of_top_k_are_those_of_the_dense_logits(axes, bias, mesh, rng):
    names = ("features", "kernel", "bias")[: 2 + bias]
    arguments = {name: array for name, array in draw(rng).items() if name in names}
    cotangent = rng.normal(size=(ROWS, 9))

    def dense(arguments):
        logits = arguments["features"] @ arguments["kernel"]
        return jax.lax.top_k(logits + arguments["bias"][None] if bias else logits, 9)[0]

    def ours(arguments):
        return jaxbce.linear_top_k(**arguments, k=9, mesh=mesh, chunk_size=4, **axes)[0]

    expected = value_and_gradients(dense, arguments, cotangent)
    assert_close(value_and_gradients(ours, arguments, cotangent), expected)


@pytest.mark.parametrize("with_gradients", [False, True], ids=["values", "gradients"])
def test_no_collective_of_top_k_grows_with_the_labels(with_gradients, mesh):
    batch, k = 64, 5

    def compiled(num_labels):
        def top(features, kernel):
            options = {"mesh": mesh, "chunk_size": 512, **AXES["labels"]}
            values, ids = jaxbce.linear_top_k(features, kernel, k=k, **options)
            return jnp.sum(values**2), ids

        features = placed_shape(mesh, (batch, 16))
        kernel = placed_shape(mesh, (16, num_labels), None, "model")
        fn = jax.grad(top, argnums=(0, 1), has_aux=True) if with_gradients else top
        return collectives(jax.jit(fn).lower(features, kernel).compile().as_text())

    small, large = compiled(2**14), compiled(2**17)
    assert batch * 4 * k in small  # k candidates of each device
    assert sorted(small) == sorted(large)


# --- pairs of embeddings -------------------------------------------------------------------------

PAIR_NAMES = ("image_embeddings", "text_embeddings", "log_scale", "bias")


def draw_pairs(rng, batch=16, dtype=np.float32):
    embeddings = (rng.normal(size=(batch, WIDTH)) for _ in range(2))
    values = (*embeddings, np.float64(0.5), np.float64(-1.0))
    return {n: jnp.asarray(v, dtype) for n, v in zip(PAIR_NAMES, values, strict=True)}


def pairs(arguments, **options):
    return jaxbce.siglip_loss(**arguments, **options)


RINGS = {"one axis": "model", "both axes": ("data", "model"), "reversed": ("model", "data")}
every_ring = pytest.mark.parametrize("axis", RINGS.values(), ids=RINGS)


@pytest.mark.thorough
@every_ring
@pytest.mark.parametrize("several", [False, True], ids=["its own text", "several texts"])
def test_siglip_loss_on_a_ring(axis, several, mesh, rng):
    """Each device has to meet every text once, and knows which of them belong to its images."""
    arguments = draw_pairs(rng)
    if several:
        arguments["positives"] = jnp.asarray(rng.integers(-1, 17, (16, 3)))
    got = value_and_gradients(
        functools.partial(pairs, mesh=mesh, axis=axis, chunk_size=3), arguments, 0.7
    )
    assert_close(got, value_and_gradients(pairs, arguments, 0.7))


@pytest.mark.thorough
@every_order
def test_hessian_vector_product_on_a_ring(order, mesh, rng):
    point, along = draw_pairs(rng), draw_pairs(rng)

    def product(**options):
        return hessian_vector_product(functools.partial(pairs, **options), point, along, order)

    assert_close(product(mesh=mesh, axis=("data", "model")), product())


def test_gradients_of_bfloat16_texts_are_rounded_once(rng):
    """They are what one device makes, to the last digit of bfloat16, after eight devices."""
    mesh = jax.make_mesh((8,), ("all",), (jax.sharding.AxisType.Auto,))
    arguments = draw_pairs(rng, 64, jnp.bfloat16)
    wide = {name: array.astype(np.float32) for name, array in arguments.items()}
    _, got = value_and_gradients(functools.partial(pairs, mesh=mesh, axis="all"), arguments)
    _, exact = value_and_gradients(pairs, wide)
    got, exact = got["text_embeddings"], exact["text_embeddings"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), exact, rtol=2**-8, atol=1e-6)


def ring_program(devices, own=256, width=16, **options):
    mesh = jax.make_mesh((devices,), ("all",), (jax.sharding.AxisType.Auto,))
    array = placed_shape(mesh, (own * devices, width), "all")
    loss = functools.partial(jaxbce.siglip_loss, mesh=mesh, axis="all", **options)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(array, array, 0.0, 0.0)


def test_a_device_of_a_ring_holds_as_much_however_many_there_are():
    few, many = (ring_program(devices, chunk_size=64).compile() for devices in (2, 8))
    text = many.as_text()
    assert "all-gather" not in text
    assert max(collectives(text)) == 256 * 16  # the texts of one device, and their gradients
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (few, many)]
    assert abs(sizes[1] - sizes[0]) <= 8 * 64  # but for a list of the devices


def test_the_program_of_a_ring_does_not_grow_with_it():
    few, many = (len(ring_program(devices).as_text().splitlines()) for devices in (2, 8))
    assert few == many


# --- several axes for one thing ------------------------------------------------------------------


@pytest.fixture
def mesh_of_four():
    kinds = (jax.sharding.AxisType.Auto,) * 4
    return jax.make_mesh((2, 2, 2, 1), ("data", "fsdp", "model", "one"), kinds)


TUPLES = {
    "rows": {"batch_axis": ("data", "fsdp"), "label_axis": "model"},
    "labels": {"batch_axis": ("one", "data"), "label_axis": ("model", "fsdp")},
    "all for the labels": {"label_axis": ("fsdp", "data", "one", "model")},
}
every_tuple = pytest.mark.parametrize("axes", TUPLES.values(), ids=TUPLES)


@pytest.mark.thorough
@every_tuple
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tuples_of_axes(axes, reduction, mesh_of_four, rng):
    arguments = draw(rng)
    one = functools.partial(head, reduction=reduction, chunk_size=4)
    many = functools.partial(one, mesh=mesh_of_four, **axes)
    assert_close(value_and_gradients(many, arguments), value_and_gradients(one, arguments))


@every_tuple
def test_top_k_with_tuples_of_axes(axes, mesh_of_four, rng):
    arguments = draw(rng)
    layer = [arguments[name] for name in ("features", "kernel", "bias")]
    got = jaxbce.linear_top_k(*layer, k=5, mesh=mesh_of_four, **axes)
    assert_close(got, jaxbce.linear_top_k(*layer, k=5))


def test_an_axis_of_one_device_is_not_reduced_over(mesh_of_four):
    """Not even as a group of one in a collective over the other axes of its tuple."""

    def reduced_over(axes):
        def loss(features, kernel, positives):
            return head(
                {"features": features, "kernel": kernel, "positives": positives},
                mesh=mesh_of_four,
                **axes,
            )

        shapes = ((ROWS, WIDTH), np.float32), ((WIDTH, LABELS), np.float32), ((ROWS, 2), np.int32)
        arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*arguments))

    assert reduced_over({"label_axis": ("one",)}).count("psum") == 0
    text = reduced_over({"label_axis": ("one", "model")})
    assert set(re.findall(r"axes=\(('[^)]*)\)", text)) == {"'model',"}


# --- inside jax.shard_map over other axes --------------------------------------------------------


def within_shards(name):
    """A number of a layer's arrays by one of the functions, given a mesh, `axes` of it or none."""

    def call(layer, positives, mesh=None):
        where = {} if mesh is None else {"mesh": mesh}
        axes = where and where | {"batch_axis": "data", "label_axis": "model"}
        features, kernel, bias = layer
        if name == "top k":
            return jnp.sum(jaxbce.linear_top_k(*layer, k=5, chunk_size=2, **axes)[0] ** 2)
        if name == "pairs":
            ring = where and where | {"axis": ("model", "data")}
            return jaxbce.siglip_loss(features, features + 1, kernel[0, 0], bias[0], **ring)
        options = {"positives": positives, "chunk_size": 2, "reduction": name, **axes}
        return jnp.sum(jaxbce.linear_bce_with_logits(*layer, **options) ** 2)

    return call


@pytest.mark.thorough
@pytest.mark.parametrize("named", [False, True], ids=["without mesh", "with mesh"])
@pytest.mark.parametrize("name", ["sum", "none", "top k", "pairs"])
def test_inside_a_shard_map_over_another_axis(name, named, rng):
    """Rows by stage; what remains of the mesh is automatic, and shares the work of each stage."""
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("stage", "data", "model"), kinds)
    arguments = draw(rng)
    layer = tuple(arguments[name] for name in ("features", "kernel", "bias"))
    call = within_shards(name)

    def stages(layer, positives):
        def own(layer, positives):
            return jax.lax.psum(call(layer, positives, mesh if named else None), "stage")

        whole, rows = PartitionSpec(), PartitionSpec("stage")
        specs = (rows, whole, whole), rows
        return jax.shard_map(own, mesh=mesh, axis_names={"stage"}, in_specs=specs, out_specs=whole)(
            layer, positives
        )

    def one_device(layer, positives):
        halves = [slice(0, ROWS // 2), slice(ROWS // 2, ROWS)]
        return sum(call((layer[0][half], *layer[1:]), positives[half]) for half in halves)

    got, expected = (
        jax.jit(jax.value_and_grad(fn))(layer, arguments["positives"])
        for fn in (stages, one_device)
    )
    assert_close(got, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("named", [False, True], ids=["without mesh", "with mesh"])
def test_hessian_vector_product_inside_a_shard_map(named, mesh, rng):
    """Forward over reverse, of the rows of each stage: here the stages are the axis of the rows."""
    arguments = draw(rng)
    features, kernel, positives = (arguments[n] for n in ("features", "kernel", "positives"))
    devices = {"mesh": mesh, "label_axis": "model"} if named else {}

    def product(features, kernel, positives, devices=devices):
        def total(kernel):
            given = {"features": features, "kernel": kernel, "positives": positives}
            return head(given, reduction="sum", chunk_size=2, **devices)

        return jax.jvp(jax.grad(total), (kernel,), (jnp.cos(kernel),))[1]

    rows, whole = PartitionSpec("data"), PartitionSpec()
    inside = jax.shard_map(
        product, mesh=mesh, axis_names={"data"}, in_specs=(rows, whole, rows), out_specs=whole
    )
    got, expected = jax.jit(inside), jax.jit(functools.partial(product, devices={}))
    assert_close(got(features, kernel, positives), expected(features, kernel, positives))


@pytest.mark.parametrize(
    ("axis_names", "shape", "message"),
    [
        ({"data", "model"}, (2, 4), "label_axis must be an axis that jax.shard_map leaves .*'mode"),
        ({"data"}, (4, 2), r"mesh must be that of the jax.shard_map around, .* got .*'data': 4"),
    ],
    ids=["an axis that is taken", "another mesh"],
)
def test_errors_inside_a_shard_map(axis_names, shape, message, mesh, rng):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    other = jax.make_mesh(shape, ("data", "model"), kinds)
    arguments = {n: v for n, v in draw(rng).items() if n in ("features", "kernel", "positives")}

    def loss(arguments):
        return head(arguments, mesh=other, label_axis="model")

    specs = {"features": PartitionSpec(), "kernel": PartitionSpec(), "positives": PartitionSpec()}
    inside = jax.shard_map(
        loss, mesh=mesh, axis_names=axis_names, in_specs=(specs,), out_specs=PartitionSpec()
    )
    with pytest.raises(ValueError, match=f"linear_bce_with_logits: {message}"):
        jax.jit(inside)(arguments)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_axis": "model", "label_axis": "data"},
            "label_axis 'data' has 2 .* the size 23 .* pad to 24, the next.* by where",
        ),
        ({"batch_axis": "seven"}, "batch_axis must be an axis of the mesh, one of data, model"),
        ({}, "mesh and batch_axis or label_axis go together"),
        ({"mesh": None, "batch_axis": "data"}, "mesh and batch_axis or label_axis go together"),
        (
            {"batch_axis": "data", "label_axis": "data"},
            "batch_axis and label_axis must be different axes of the mesh, got 'data' twice",
        ),
        (
            {"batch_axis": "data", "label_axis": ("model", "data")},
            "batch_axis and label_axis must be different axes of the mesh, got 'data' twice",
        ),
        (
            {"label_axis": ("model", "seven")},
            r"label_axis must be an axis of the mesh, .* or a tuple of them, got .*'seven'",
        ),
        (
            {"label_axis": ("data", "model")},
            r"label_axis \('data', 'model'\) has 8 .* the size 23 .* pad to 24, .* by where",
        ),
    ],
    ids=[
        "does not divide",
        "unknown axis",
        "no axis",
        "no mesh",
        "one axis for both",
        "one name in both",
        "unknown name",
        "tuple does not divide",
    ],
)
def test_errors_name_the_axis(options, message, mesh):
    with pytest.raises(ValueError, match=f"linear_bce_with_logits: {message}"):
        jaxbce.linear_bce_with_logits(
            jnp.ones((8, 3)),
            jnp.ones((3, 23)),
            positives=jnp.zeros((8, 1), jnp.int32),
            **({"mesh": mesh} | options),
        )


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (
            "model",
            "axis 'model' .* the size 6 .* pad to 8, .* by ignored, and multiply the loss by 8 / 6",
        ),
        (("data", "model"), r"axis \('data', 'model'\) has 8 .* the size 6"),
        (("data", "data"), "axis must be different axes of the mesh, got 'data' twice"),
    ],
    ids=["does not divide", "tuple does not divide", "twice"],
)
def test_siglip_loss_names_its_axis(axis, message, mesh):
    with pytest.raises(ValueError, match=f"siglip_loss: {message}"):
        jaxbce.siglip_loss(jnp.ones((6, 2)), jnp.ones((6, 2)), 0.0, 0.0, mesh=mesh, axis=axis)


def test_padded_as_the_errors_say():
    """23 labels on eight devices: a mask for the loss, a bias of -inf for the highest logits."""
    mesh = jax.make_mesh((8,), ("labels",))
    arguments = draw_arguments(np.random.default_rng(0), 4, 5, 23, jnp.float32, dense=False)
    features, kernel, bias = (arguments[name] for name in ("features", "kernel", "bias"))
    real, wide = jnp.arange(24) < 23, jnp.pad(kernel, [(0, 0), (0, 1)])
    padded = jnp.pad(bias, (0, 1))

    def loss(features, kernel, bias, **options):
        return jaxbce.linear_bce_with_logits(
            features, kernel, bias, positives=jnp.array([[22], [0], [-1], [7]]), **options
        )

    on_mesh = {"mesh": mesh, "label_axis": "labels"}
    own = functools.partial(loss, where=real, **on_mesh)
    got = jax.value_and_grad(own, argnums=(0, 1))(features, wide, padded)
    expected = jax.value_and_grad(loss, argnums=(0, 1))(features, kernel, bias)
    value, (slope, of_kernel) = expected
    expected = value, (slope, jnp.pad(of_kernel, [(0, 0), (0, 1)]))
    assert_close(got, expected)
    last = jnp.where(real, padded, -jnp.inf)
    got = jaxbce.linear_top_k(features, wide, last, k=23, **on_mesh)
    expected = jaxbce.linear_top_k(features, kernel, bias, k=23)
    assert_close(got, expected)
    with pytest.raises(ValueError, match=r"linear_top_k: .* pad to 24, .* by a bias of -inf"):
        jaxbce.linear_top_k(features, kernel, bias, k=5, **on_mesh)
