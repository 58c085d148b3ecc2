"""The chunked head on a mesh of eight virtual devices against the same head on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
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

ROWS, WIDTH, LABELS = 8, 3, 24
AXES = {
    "both": {"batch_axis": "data", "label_axis": "model"},
    "batch": {"batch_axis": "data"},
    "labels": {"label_axis": "model"},
}


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


def compiled_gradients(num_labels, mesh, axes, batch=64, width=16):
    batch_axis, label_axis = axes.get("batch_axis"), axes.get("label_axis")

    def array(shape, *spec, dtype=np.float32):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

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


# --- pairs of embeddings -------------------------------------------------------------------------


def test_siglip_loss_on_a_mesh(mesh, rng):
    images, texts = (jnp.asarray(rng.normal(size=(8, 3)), jnp.float32) for _ in range(2))
    arguments = images, texts, jnp.float32(0.5), jnp.float32(-1.0)

    def value_and_gradients(**options):
        loss = functools.partial(jaxbce.siglip_loss, **options)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*arguments)

    assert_close(value_and_gradients(mesh=mesh, axis="model", chunk_size=3), value_and_gradients())


def test_siglip_loss_on_a_mesh_holds_no_pairs(mesh):
    batch = 2048
    sharding = NamedSharding(mesh, PartitionSpec("model", None))
    array = jax.ShapeDtypeStruct((batch, 16), np.float32, sharding=sharding)
    loss = functools.partial(jaxbce.siglip_loss, mesh=mesh, axis="model", chunk_size=256)
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(array, array, 0.0, 0.0).compile().as_text()
    assert f"[{batch // 4},{batch}]" not in text
    assert max(collectives(text)) <= batch * 16


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_axis": "model", "label_axis": "data"}, "label_axis 'data' has 2 .* the size 23"),
        ({"batch_axis": "seven"}, "batch_axis must be an axis of the mesh, one of data, model"),
        ({}, "mesh and batch_axis or label_axis go together"),
        ({"mesh": None, "batch_axis": "data"}, "mesh and batch_axis or label_axis go together"),
        (
            {"batch_axis": "data", "label_axis": "data"},
            "batch_axis and label_axis must be two .* 'data'",
        ),
    ],
    ids=["does not divide", "unknown axis", "no axis", "no mesh", "one axis for both"],
)
def test_errors_name_the_axis(options, message, mesh):
    with pytest.raises(ValueError, match=f"linear_bce_with_logits: {message}"):
        jaxbce.linear_bce_with_logits(
            jnp.ones((8, 3)),
            jnp.ones((3, 23)),
            positives=jnp.zeros((8, 1), jnp.int32),
            **({"mesh": mesh} | options),
        )


def test_siglip_loss_names_its_axis(mesh):
    with pytest.raises(ValueError, match=r"siglip_loss: axis 'model' has 4 .* the size 6"):
        jaxbce.siglip_loss(jnp.ones((6, 2)), jnp.ones((6, 2)), 0.0, 0.0, mesh=mesh, axis="model")
